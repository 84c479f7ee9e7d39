// Linear layers with what stands before or after them in a decoder: embedding, RMS norm, bias, SwiGLU, the residual stream.
//
// Weights come in any format of packed_weight.h. A task is a few panels of rows times up to kTokenTile tokens: its rows
// stay in the nearest cache while all tokens pass, so each weight is read from memory once a tile. At small batches that
// traffic is what a step costs.
#include <cmath>
#include <numeric>

#include "block_dot.h"
#include "float_dot.h"
#include "thread_pool.h"
#include "tile_dot.h"

namespace native {
namespace {

constexpr int64_t kTokenTile = 96;  // tokens of a task
constexpr int64_t kTaskRows = 64;   // rows of a task at most: a multiple of kPanelRows and kFloatRows
constexpr int64_t kRun = 64;        // neighbouring logits of which the head tells the largest
constexpr int64_t kFineRuns = 8;    // of a token that are worked out at full precision

// One operator's tokens; they belong to the runtime's one operator thread.
struct TokenMemory {
  std::vector<float> floats;
  std::vector<uint16_t> bfloats;
  std::vector<int8_t> codes, rests;
  std::vector<Tokens::Block> blocks;
};

// The tokens [T, K], divided by their norm if there is one, as dot products with this weight take them; `finely` keeps what
// the codes of their numbers leave.
Tokens prepare(const float *x, const float *norm, int64_t count, const Weight &weight, bool finely = false) {
  static TokenMemory memory;
  const int64_t columns = weight.columns, blocks = weight.blocks();
  const int64_t places = meet_in_tiles(weight.format, count) ? (count + kTileTokens - 1) / kTileTokens * kTileTokens : count;
  const bool bytes = NATIVE_BYTE_DOTS && weight.format != Format::kF32 && weight.format != Format::kBf16;
  const bool bfloats = NATIVE_BFLOAT_DOTS && weight.format == Format::kBf16;
  Tokens tokens;
  tokens.columns = columns;
  tokens.floats = x;
  float *normed = norm ? room(memory.floats, count * columns) : nullptr;
  if (normed) tokens.floats = normed;
  uint16_t *rounded = bfloats ? room(memory.bfloats, places * columns) : nullptr;
  int8_t *codes = bytes ? room(memory.codes, places * columns) : nullptr;
  int8_t *rests = bytes && finely ? room(memory.rests, count * columns) : nullptr;
  Tokens::Block *of_token = bytes ? room(memory.blocks, places * blocks) : nullptr;
  tokens.bfloats = rounded;
  tokens.codes = codes;
  tokens.rests = rests;
  tokens.blocks = of_token;
  if (!normed && !rounded && !codes) return tokens;
  const int64_t share = std::max<int64_t>(1, 8192 / columns);  // tokens of a task: less is not worth another thread
  ThreadPool::shared().run((count + share - 1) / share, [&](int64_t task) {
    for (int64_t t = task * share; t < std::min(count, (task + 1) * share); ++t) {
      if (normed) rms_norm(x + t * columns, norm, columns, norm[columns], normed + t * columns);
      const float *token = tokens.floats + t * columns;
      if (rounded)
        for (int64_t k = 0; k < columns; ++k) rounded[t * columns + k] = to_bfloat(token[k]);
#if NATIVE_BYTE_DOTS
      for (int64_t b = 0; codes && b < blocks; ++b)
        quantise_block(token + b * kBlockColumns, zero_of(weight.format), codes + t * columns + b * kBlockColumns,
                       rests ? rests + t * columns + b * kBlockColumns : nullptr, of_token[t * blocks + b]);
#endif
    }
  });
  return tokens;
}

// Panels of a task: as many as share the rows evenly among the threads.
int64_t task_panels(int64_t panels, int64_t tiles, int64_t threads) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t size = 1; size <= kTaskRows / kPanelRows; ++size) {
    const int64_t tasks = (panels + size - 1) / size * tiles, longest = (tasks + threads - 1) / threads * size;
    if (longest <= least) best = size, least = longest;
  }
  return best;
}

template <Format F>
void packed_rows(const Tokens &x, int64_t first, int64_t count, const Weight &weight, int64_t first_row, int64_t rows, float *out) {
  thread_local std::vector<uint8_t> padded;
  const uint8_t *panels[kTaskRows / kPanelRows];  // only the weight's last one may be padded
  for (int64_t n = 0; n < rows; n += kPanelRows) panels[n / kPanelRows] = weight.panel(first_row + n, padded);
#if NATIVE_TILES && NATIVE_BYTE_DOTS
  if constexpr (fit_tiles(F)) {
    if (meet_in_tiles(F, count) && !x.rests) {
      for (int64_t n = 0; n < rows; n += kPanelRows) tile_dots<F>(count, panels[n / kPanelRows], x, first, out + n, kTaskRows);
      return;
    }
  }
#endif
  constexpr int kAtOnce = tokens_at_once(F);
  for (int64_t t = 0; t < count; t += kAtOnce) {  // the tokens stay in the L1 cache while panels pass
    const int here = static_cast<int>(std::min<int64_t>(kAtOnce, count - t));
    for (int64_t n = 0; n < rows; n += kPanelRows)
      panel_dots_of<F>(here, panels[n / kPanelRows], x, first + t, out + t * kTaskRows + n, kTaskRows);
  }
}

// out[t][n] = token first + t . row first_row + n, for tokens of a task and neighbouring rows.
void task_dots(const Tokens &x, int64_t first, int64_t count, const Weight &weight, int64_t first_row, int64_t rows, float *out) {
  switch (weight.format) {
    case Format::kF32: float_rows(x.floats + first * x.columns, count, weight, first_row, rows, out, kTaskRows); break;
    case Format::kBf16: packed_rows<Format::kBf16>(x, first, count, weight, first_row, rows, out); break;
    case Format::kQ8: packed_rows<Format::kQ8>(x, first, count, weight, first_row, rows, out); break;
    case Format::kQ4_0: packed_rows<Format::kQ4_0>(x, first, count, weight, first_row, rows, out); break;
    case Format::kQ4_1: packed_rows<Format::kQ4_1>(x, first, count, weight, first_row, rows, out); break;
  }
}

// Task `number` of `count` that threads take in turn, as a place in memory: each thread goes through a part of its own, so that
// what it asks memory for beyond the end of a task is what it needs next.
int64_t place_of(int64_t number, int64_t count, int64_t threads) {
  const int64_t thread = number % threads, longer = count % threads;
  return thread * (count / threads) + std::min(thread, longer) + number / threads;
}

// Calls store(token, first row, dots, rows) for every token and neighbouring rows of the weight, on all threads: up to
// kTaskRows of them, beginning at an even row. `whole` tasks begin at a multiple of kTaskRows.
template <typename Store>
void multiply(const Tokens &x, int64_t count, const Weight &weight, bool whole, const Store &store) {
  auto &pool = ThreadPool::shared();
  const int64_t panels = (weight.rows + kPanelRows - 1) / kPanelRows, tiles = (count + kTokenTile - 1) / kTokenTile;
  const int64_t share = whole ? kTaskRows : task_panels(panels, tiles, pool.threads()) * kPanelRows;
  const int64_t shares = (weight.rows + share - 1) / share;
  pool.run(shares * tiles, [&](int64_t task) {
    alignas(64) float out[kTokenTile * kTaskRows];
    const int64_t first_row = place_of(task % shares, shares, pool.threads()) * share, rows = std::min(share, weight.rows - first_row);
    const int64_t first = task / shares * kTokenTile, here = std::min(kTokenTile, count - first);
    task_dots(x, first, here, weight, first_row, rows, out);
    for (int64_t t = 0; t < here; ++t) store(first + t, first_row, out + t * kTaskRows, rows);
  });
}

// The largest of `count` numbers, NaN if one is.
float largest(const float *values, int64_t count) {
  float top = values[0], poison = 0.f;
#pragma omp simd reduction(max : top) reduction(+ : poison)
  for (int64_t i = 0; i < count; ++i) {
    top = std::max(top, values[i]);
    poison += values[i] != values[i] ? 1.f : 0.f;
  }
  return poison > 0.f ? NAN : top;
}

// The numbers of the `kFineRuns` runs with the largest maxima, in any order; NaN counts as largest.
void best_runs(const float *maxima, int64_t runs, int32_t *best) {
  thread_local std::vector<int32_t> all;
  all.resize(runs);
  std::iota(all.begin(), all.end(), 0);
  const auto key = [&](int32_t run) { return maxima[run] == maxima[run] ? maxima[run] : INFINITY; };
  const int64_t kept = std::min(runs, kFineRuns);
  std::nth_element(all.begin(), all.begin() + kept - 1, all.end(), [&](int32_t a, int32_t b) { return key(a) > key(b); });
  std::copy(all.begin(), all.begin() + kept, best);
}

void unpack_any_row(const Weight &weight, int64_t row, float *out) {
  switch (weight.format) {
    case Format::kF32: std::memcpy(out, weight.floats(row), weight.columns * sizeof(float)); break;
    case Format::kBf16: unpack_row<Format::kBf16>(weight, row, out); break;
    case Format::kQ8: unpack_row<Format::kQ8>(weight, row, out); break;
    case Format::kQ4_0: unpack_row<Format::kQ4_0>(weight, row, out); break;
    case Format::kQ4_1: unpack_row<Format::kQ4_1>(weight, row, out); break;
  }
}

}  // namespace
}  // namespace native

using namespace native;

// Inputs: 0 token_ids i32 [T]; 1 weight [N, K] in any format; 2 norm f32 [K + 1], of which only the length is used: packed
// rows do not tell how many numbers they hold; optionally 3 first i32 [1], the token of the weight's first row, where other
// ranks have the other rows: theirs are zeros here. Output: f32 [T, K], the tokens' rows.
extern "C" int Embedding(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("Embedding", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    require(count == 4 || count == 5, "takes 3 or 4 inputs");
    const int32_t *ids = a.data<int32_t>(0, "int32", 1);
    a.data<float>(2, "float32", 1);
    const int64_t columns = a.dim(2, 0) - 1;
    const Weight weight = read_weight(a, 1, columns);
    const bool shared = count == 5;
    if (shared) a.expect_dim(3, 0, 1);
    const int64_t first = shared ? *a.data<int32_t>(3, "int32", 1) : 0;
    float *y = a.data<float>(count - 1, "float32", 2);
    a.expect_dim(count - 1, 0, a.dim(0, 0));
    a.expect_dim(count - 1, 1, columns);
    for (int64_t t = 0; t < a.dim(0, 0); ++t) {
      const int64_t row = ids[t] - first;
      const bool here = row >= 0 && row < weight.rows;
      require(here || (shared && ids[t] >= 0),
              [&] { return "token " + std::to_string(ids[t]) + " of " + std::to_string(weight.rows); });
      here ? unpack_any_row(weight, row, y + t * columns) : void(std::memset(y + t * columns, 0, columns * sizeof(float)));
    }
  });
}

// Inputs: 0 x f32 [T, K]; 1 norm f32 [K + 1], weights then epsilon; 2 weight [N, K]; optionally 3 bias f32 [N].
// Output: f32 [T, N], norm(x) * weight^T + bias.
extern "C" int NormLinear(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("NormLinear", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    require(count == 4 || count == 5, "takes 3 or 4 inputs");
    const float *x = a.data<float>(0, "float32", 2), *norm = a.data<float>(1, "float32", 1);
    const int64_t tokens = a.dim(0, 0), columns = a.dim(0, 1);
    a.expect_dim(1, 0, columns + 1);
    const Weight weight = read_weight(a, 2, columns);
    const float *bias = count == 5 ? a.data<float>(3, "float32", 1) : nullptr;
    if (bias) a.expect_dim(3, 0, weight.rows);
    float *y = a.data<float>(count - 1, "float32", 2);
    a.expect_dim(count - 1, 0, tokens);
    a.expect_dim(count - 1, 1, weight.rows);
    multiply(prepare(x, norm, tokens, weight), tokens, weight, false, [&](int64_t t, int64_t n, const float *dots, int64_t rows) {
      float *to = y + t * weight.rows + n;
      for (int64_t i = 0; i < rows; ++i) to[i] = bias ? dots[i] + bias[n + i] : dots[i];
    });
  });
}

// The end of a network. Inputs: 0 x f32 [T, K]; 1 logits_indices i32 [L], the tokens whose logits are wanted; 2 norm f32
// [K + 1]; 3 weight [V, K]. Outputs: 4 logits f32 [L, V]; 5 f32 [L, ceil(V / 64)], the largest of each 64 neighbouring logits
// (NaN if one is), from which the best tokens are found without another look at them all.
//
// Where tokens are quantised, their codes alone first say which runs hold a token's best logits, and only those runs are worked
// out again with what the codes leave. Codes alone are off by a few hundredths: that can decide which token is the best, and
// changes no token's chances that one could notice.
extern "C" int Head(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("Head", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    a.expect(6);
    const float *x = a.data<float>(0, "float32", 2), *norm = a.data<float>(2, "float32", 1);
    const int32_t *indices = a.data<int32_t>(1, "int32", 1);
    const int64_t tokens = a.dim(1, 0), columns = a.dim(0, 1);
    a.expect_dim(2, 0, columns + 1);
    const Weight weight = read_weight(a, 3, columns);
    require(weight.rows > 0, "the vocabulary is empty");
    const int64_t runs = (weight.rows + kRun - 1) / kRun;
    float *logits = a.data<float>(4, "float32", 2), *maxima = a.data<float>(5, "float32", 2);
    a.expect_dim(4, 0, tokens);
    a.expect_dim(4, 1, weight.rows);
    a.expect_dim(5, 0, tokens);
    a.expect_dim(5, 1, runs);
    static std::vector<float> memory;  // of the runtime's one operator thread
    float *wanted = room(memory, tokens * columns);
    for (int64_t t = 0; t < tokens; ++t) {
      require(indices[t] >= 0 && indices[t] < a.dim(0, 0),
              [&] { return "token " + std::to_string(indices[t]) + " of " + std::to_string(a.dim(0, 0)); });
      std::memcpy(wanted + t * columns, x + indices[t] * columns, columns * sizeof(float));
    }
    static_assert(kRun == kTaskRows, "a task has a whole run");
    const Tokens fine = prepare(wanted, norm, tokens, weight, true);
    Tokens coarse = fine;
    coarse.rests = nullptr;
    const auto store = [&](int64_t t, int64_t n, const float *dots, int64_t rows) {
      std::memcpy(logits + t * weight.rows + n, dots, rows * sizeof(float));
      maxima[t * runs + n / kRun] = largest(dots, rows);
    };
    multiply(coarse, tokens, weight, true, store);
    if (!fine.rests) return;
    static std::vector<int32_t> best;  // of the runtime's one operator thread
    const int64_t kept = std::min(runs, kFineRuns);
    best.resize(tokens * kept);
    auto &pool = ThreadPool::shared();
    pool.run(tokens, [&](int64_t t) { best_runs(maxima + t * runs, runs, best.data() + t * kept); });
    pool.run(tokens * kept, [&](int64_t task) {
      alignas(64) float out[kTaskRows];
      const int64_t t = task / kept, n = best[task] * kRun, rows = std::min(kRun, weight.rows - n);
      task_dots(fine, t, 1, weight, n, rows, out);
      store(t, n, out, rows);
    });
  });
}

// Inputs: 0 x f32 [T, K]; 1 norm f32 [K + 1]; 2 weight [2 * I, K], rows of gate and up in turn.
// Output: f32 [T, I], silu(gate) * up.
extern "C" int NormGatedLinear(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("NormGatedLinear", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    a.expect(4);
    const float *x = a.data<float>(0, "float32", 2), *norm = a.data<float>(1, "float32", 1);
    const int64_t tokens = a.dim(0, 0), columns = a.dim(0, 1);
    a.expect_dim(1, 0, columns + 1);
    const Weight weight = read_weight(a, 2, columns);
    require(weight.rows % 2 == 0, "the weight must have a gate row for every up row");
    float *y = a.data<float>(3, "float32", 2);
    a.expect_dim(3, 0, tokens);
    a.expect_dim(3, 1, weight.rows / 2);
    multiply(prepare(x, norm, tokens, weight), tokens, weight, false, [&](int64_t t, int64_t n, const float *dots, int64_t rows) {
      float *to = y + (t * weight.rows + n) / 2;
      for (int64_t i = 0; i < rows / 2; ++i) to[i] = silu(dots[2 * i]) * dots[2 * i + 1];
    });
  });
}

// Inputs: 0 residual f32 [T, N]; 1 x f32 [T, K]; 2 weight [N, K]; optionally 3 bias f32 [N].
// Output: f32 [T, N], residual + x * weight^T + bias.
extern "C" int ResidualLinear(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("ResidualLinear", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    require(count == 4 || count == 5, "takes 3 or 4 inputs");
    const float *residual = a.data<float>(0, "float32", 2), *x = a.data<float>(1, "float32", 2);
    const int64_t tokens = a.dim(1, 0);
    const Weight weight = read_weight(a, 2, a.dim(1, 1));
    const float *bias = count == 5 ? a.data<float>(3, "float32", 1) : nullptr;
    if (bias) a.expect_dim(3, 0, weight.rows);
    float *y = a.data<float>(count - 1, "float32", 2);
    for (int i : {0, count - 1}) {
      a.expect_dim(i, 0, tokens);
      a.expect_dim(i, 1, weight.rows);
    }
    multiply(prepare(x, nullptr, tokens, weight), tokens, weight, false, [&](int64_t t, int64_t n, const float *dots, int64_t rows) {
      const int64_t at = t * weight.rows + n;
      for (int64_t i = 0; i < rows; ++i) y[at + i] = residual[at + i] + dots[i] + (bias ? bias[n + i] : 0.f);
    });
  });
}

extern "C" {

using Shape = std::vector<int64_t>;

Shape EmbeddingInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[2][0] > 0 ? shapes[2][0] - 1 : -1}; }
std::vector<Shape> HeadInferShape(int *, int64_t **shapes, AotExtra *) {
  return {{shapes[1][0], shapes[3][0]}, {shapes[1][0], (shapes[3][0] + kRun - 1) / kRun}};
}

TypeId EmbeddingInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }
std::vector<TypeId> HeadInferType(std::vector<TypeId>, AotExtra *) { return {kNumberTypeFloat32, kNumberTypeFloat32}; }

}  // extern "C"
