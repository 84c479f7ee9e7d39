// Dot products of tokens with float32 rows: the reference format, in blocks of tokens times rows with all sums in
// registers.
#pragma once

#include <algorithm>
#include <cstring>

#include "packed_weight.h"

namespace native {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kFloatTokens = 6, kFloatRows = 4;  // 24 sums in 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kFloatTokens = 3, kFloatRows = 4;  // 12 in 16
#else
constexpr int kLanes = 4, kFloatTokens = 6, kFloatRows = 4;  // NEON: 24 in 32
#endif

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Four __attribute__((vector_size(4 * sizeof(float))));

inline Lanes load(const float *p) {
  Lanes v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// The sum of the vector's quarters (or of what a narrower one has).
inline Four fold(Lanes v) {
  Four parts[kLanes / 4], total;
  std::memcpy(parts, &v, sizeof(v));
  total = parts[0];
  for (int i = 1; i < kLanes / 4; ++i) total += parts[i];
  return total;
}

// The sums of four vectors, as one.
inline Four sums_of(Lanes a, Lanes b, Lanes c, Lanes d) {
  const Four p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const Four pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const Four rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

// out[m][n] = x[m] . w[n] for M tokens and four rows; `stride` floats from token to token of `out`.
template <int M>
inline void float_block(const float *x, const float *const *w, int64_t columns, float *out, int64_t stride) {
  Lanes sums[M][kFloatRows] = {};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    Lanes weight[kFloatRows];
    for (int n = 0; n < kFloatRows; ++n) weight[n] = load(w[n] + k);
    for (int m = 0; m < M; ++m) {
      const Lanes token = load(x + m * columns + k);
      for (int n = 0; n < kFloatRows; ++n) sums[m][n] += token * weight[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    const Four total = sums_of(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
    for (int n = 0; n < kFloatRows; ++n) {
      float dot = total[n];
      for (int64_t i = k; i < columns; ++i) dot += x[m * columns + i] * w[n][i];
      out[m * stride + n] = dot;
    }
  }
}

template <int M = kFloatTokens>
inline void float_block_of(int count, const float *x, const float *const *w, int64_t columns, float *out, int64_t stride) {
  if constexpr (M > 1) {
    if (count < M) return float_block_of<M - 1>(count, x, w, columns, out, stride);
  }
  float_block<M>(x, w, columns, out, stride);
}

// out[m][n] = token m . row first_row + n, for rows up to a multiple of four: `out` has room for the last one's fellows.
inline void float_rows(const float *tokens, int64_t count, const Weight &weight, int64_t first_row, int64_t rows, float *out,
                       int64_t stride) {
  for (int64_t t = 0; t < count; t += kFloatTokens) {
    const int here = static_cast<int>(std::min<int64_t>(kFloatTokens, count - t));
    for (int64_t n = 0; n < rows; n += kFloatRows) {
      const float *w[kFloatRows];  // at the end of the weight its last row fills the block
      for (int i = 0; i < kFloatRows; ++i) w[i] = weight.floats(first_row + std::min(n + i, rows - 1));
      float_block_of(here, tokens + t * weight.columns, w, weight.columns, out + t * stride + n, stride);
    }
  }
}

}  // namespace native
