// Dot products of tokens with float32 rows: the reference format, in blocks of tokens times rows with all sums in
// registers.
#pragma once

#include <algorithm>

#include "lanes.h"
#include "packed_weight.h"

namespace native {

constexpr int kFloatTokens = lanes::kBlock, kFloatRows = 4;

// out[m][n] = x[m] . w[n] for M tokens and four rows; `stride` floats from token to token of `out`.
template <int M>
inline void float_block(const float *x, const float *const *w, int64_t columns, float *out, int64_t stride) {
  using namespace lanes;
  Lanes dots[M][kFloatRows] = {};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    Lanes weight[kFloatRows];
    for (int n = 0; n < kFloatRows; ++n) weight[n] = load(w[n] + k);
    for (int m = 0; m < M; ++m) {
      const Lanes token = load(x + m * columns + k);
      for (int n = 0; n < kFloatRows; ++n) dots[m][n] += token * weight[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    const Four total = sums(dots[m][0], dots[m][1], dots[m][2], dots[m][3]);
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
