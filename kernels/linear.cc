// Linear layers with what stands before or after them in a decoder: RMS norm, bias, SwiGLU, the residual stream.
//
// Weights are f32 [N, K], one row an output. A block of outputs times tokens is computed as dot products along K with all its
// sums in registers, so each weight is read from memory once for up to kTokenTile tokens: at small batches that traffic is
// what a step costs.
#include <algorithm>
#include <cmath>

#include "operator.h"
#include "thread_pool.h"

namespace native {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kBlockTokens = 6, kBlockRows = 4;  // 24 sums in 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kBlockTokens = 3, kBlockRows = 4;  // 12 in 16
#else
constexpr int kLanes = 4, kBlockTokens = 6, kBlockRows = 4;  // NEON: 24 in 32
#endif
constexpr int64_t kTokenTile = 96;  // tokens that pass over a panel of weights together

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
inline Four sums(Lanes a, Lanes b, Lanes c, Lanes d) {
  const Four p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const Four pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const Four rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

// out[t][n] = x[t] . w[n] for M tokens and four weight rows.
template <int M>
inline void block(const float *x, const float *const *w, int64_t k_size, float (*out)[kBlockRows]) {
  Lanes acc[M][kBlockRows] = {};
  int64_t k = 0;
  for (; k + kLanes <= k_size; k += kLanes) {
    Lanes weight[kBlockRows];
    for (int n = 0; n < kBlockRows; ++n) weight[n] = load(w[n] + k);
    for (int m = 0; m < M; ++m) {
      const Lanes token = load(x + m * k_size + k);
      for (int n = 0; n < kBlockRows; ++n) acc[m][n] += token * weight[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    const Four total = sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
    std::memcpy(out[m], &total, sizeof(total));
    for (int n = 0; n < kBlockRows; ++n)
      for (int64_t i = k; i < k_size; ++i) out[m][n] += x[m * k_size + i] * w[n][i];
  }
}

void block_of(int tokens, const float *x, const float *const *w, int64_t k_size, float (*out)[kBlockRows]) {
  switch (tokens) {
    case 1: return block<1>(x, w, k_size, out);
    case 2: return block<2>(x, w, k_size, out);
    case 3: return block<3>(x, w, k_size, out);
#if !defined(__AVX2__) || defined(__AVX512F__)
    case 4: return block<4>(x, w, k_size, out);
    case 5: return block<5>(x, w, k_size, out);
    case 6: return block<6>(x, w, k_size, out);
#endif
  }
}

// Calls store(token, row, dot) for every token and every weight row, on all threads. Rows
// 2i and 2i + 1 are stored by one thread, in this order.
template <typename Store>
void multiply(const float *x, const float *weight, int64_t tokens, int64_t rows, int64_t k_size, const Store &store) {
  auto &pool = ThreadPool::shared();
  const int64_t share = rows / (pool.threads() * 4) / kBlockRows * kBlockRows;
  const int64_t panel = std::clamp<int64_t>(share, kBlockRows, 64);  // weight rows of a task: they stay in the L2 cache
  const int64_t panels = (rows + panel - 1) / panel, tiles = (tokens + kTokenTile - 1) / kTokenTile;
  pool.run(panels * tiles, [&](int64_t task) {
    const int64_t first_row = task % panels * panel, last_row = std::min(rows, first_row + panel);
    const int64_t first = task / panels * kTokenTile, last = std::min(tokens, first + kTokenTile);
    float out[kBlockTokens][kBlockRows];
    for (int64_t t = first; t < last; t += kBlockTokens) {
      const int here = static_cast<int>(std::min<int64_t>(kBlockTokens, last - t));
      for (int64_t n = first_row; n < last_row; n += kBlockRows) {
        const int width = static_cast<int>(std::min<int64_t>(kBlockRows, last_row - n));
        const float *w[kBlockRows];  // at the end of the weight its last row fills the block
        for (int i = 0; i < kBlockRows; ++i) w[i] = weight + std::min(n + i, last_row - 1) * k_size;
        block_of(here, x + t * k_size, w, k_size, out);
        for (int m = 0; m < here; ++m)
          for (int i = 0; i < width; ++i) store(t + m, n + i, out[m][i]);
      }
    }
  });
}

// The tokens divided by their root mean square and scaled: [T, K]. `norm` holds K weights and then epsilon.
const float *normalized(const float *x, const float *norm, int64_t tokens, int64_t k_size) {
  static std::vector<float> memory;  // of the runtime's one operator thread; grows to the largest step
  if (memory.size() < static_cast<size_t>(tokens * k_size)) memory.resize(static_cast<size_t>(tokens * k_size));
  float *y = memory.data();
  const float eps = norm[k_size];
  for (int64_t t = 0; t < tokens; ++t) {
    const float *from = x + t * k_size;
    float *to = y + t * k_size, squares = 0.f;
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < k_size; ++k) squares += from[k] * from[k];
    const float scale = 1.f / std::sqrt(squares / static_cast<float>(k_size) + eps);
    for (int64_t k = 0; k < k_size; ++k) to[k] = from[k] * scale * norm[k];
  }
  return y;
}

}  // namespace
}  // namespace native

using native::Arguments;
using native::guarded;
using native::require;

// Inputs: 0 x f32 [T, K]; 1 norm f32 [K + 1], weights then epsilon; 2 weight f32 [N, K]; optionally 3 bias f32 [N].
// Output: f32 [T, N], norm(x) * weight^T + bias.
extern "C" int NormLinear(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("NormLinear", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    require(count == 4 || count == 5, "takes 3 or 4 inputs");
    const int y_index = count - 1;
    const float *x = a.data<float>(0, "float32", 2), *norm = a.data<float>(1, "float32", 1);
    const float *weight = a.data<float>(2, "float32", 2), *bias = count == 5 ? a.data<float>(3, "float32", 1) : nullptr;
    float *y = a.data<float>(y_index, "float32", 2);
    const int64_t tokens = a.dim(0, 0), k_size = a.dim(0, 1), rows = a.dim(2, 0);
    a.expect_dim(1, 0, k_size + 1);
    a.expect_dim(2, 1, k_size);
    if (bias) a.expect_dim(3, 0, rows);
    a.expect_dim(y_index, 0, tokens);
    a.expect_dim(y_index, 1, rows);
    native::multiply(native::normalized(x, norm, tokens, k_size), weight, tokens, rows, k_size,
                     [&](int64_t t, int64_t n, float dot) { y[t * rows + n] = bias ? dot + bias[n] : dot; });
  });
}

// Inputs: 0 x f32 [T, K]; 1 norm f32 [K + 1]; 2 weight f32 [2 * I, K], rows of gate and up in turn.
// Output: f32 [T, I], silu(gate) * up.
extern "C" int NormGatedLinear(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("NormGatedLinear", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    a.expect(4);
    const float *x = a.data<float>(0, "float32", 2), *norm = a.data<float>(1, "float32", 1);
    const float *weight = a.data<float>(2, "float32", 2);
    float *y = a.data<float>(3, "float32", 2);
    const int64_t tokens = a.dim(0, 0), k_size = a.dim(0, 1), rows = a.dim(2, 0);
    require(rows % 2 == 0, "the weight must have a gate row for every up row");
    a.expect_dim(1, 0, k_size + 1);
    a.expect_dim(2, 1, k_size);
    a.expect_dim(3, 0, tokens);
    a.expect_dim(3, 1, rows / 2);
    // A block holds gate and up of the same output (kBlockRows is even), gate first
    native::multiply(native::normalized(x, norm, tokens, k_size), weight, tokens, rows, k_size,
                     [&](int64_t t, int64_t n, float dot) {
                       float &out = y[t * (rows / 2) + n / 2];
                       out = n % 2 == 0 ? dot / (1.f + std::exp(-dot)) : out * dot;
                     });
  });
}

// Inputs: 0 residual f32 [T, N]; 1 x f32 [T, K]; 2 weight f32 [N, K]; optionally 3 bias f32 [N].
// Output: f32 [T, N], residual + x * weight^T + bias.
extern "C" int ResidualLinear(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("ResidualLinear", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    require(count == 4 || count == 5, "takes 3 or 4 inputs");
    const int y_index = count - 1;
    const float *residual = a.data<float>(0, "float32", 2), *x = a.data<float>(1, "float32", 2);
    const float *weight = a.data<float>(2, "float32", 2), *bias = count == 5 ? a.data<float>(3, "float32", 1) : nullptr;
    float *y = a.data<float>(y_index, "float32", 2);
    const int64_t tokens = a.dim(1, 0), k_size = a.dim(1, 1), rows = a.dim(2, 0);
    a.expect_dim(0, 0, tokens);
    a.expect_dim(0, 1, rows);
    a.expect_dim(2, 1, k_size);
    if (bias) a.expect_dim(3, 0, rows);
    a.expect_dim(y_index, 0, tokens);
    a.expect_dim(y_index, 1, rows);
    native::multiply(x, weight, tokens, rows, k_size, [&](int64_t t, int64_t n, float dot) {
      y[t * rows + n] = residual[t * rows + n] + dot + (bias ? bias[n] : 0.f);
    });
  });
}

extern "C" {

std::vector<int64_t> NormLinearInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[2][0]}; }
std::vector<int64_t> NormGatedLinearInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[2][0] / 2}; }
std::vector<int64_t> ResidualLinearInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[1][0], shapes[2][0]}; }
TypeId NormLinearInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }
TypeId NormGatedLinearInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }
TypeId ResidualLinearInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }

}  // extern "C"
