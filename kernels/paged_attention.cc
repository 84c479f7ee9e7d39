// Rotary embedding, cache write and attention of one layer over a paged KV cache, for rows of any length.
//
// Inputs: 0 qkv f32 [T, (H + 2K) * D]; 1 cos_sin f32 [T, D] (cosines, then sines, of D/2 pairs); 2 slot_mapping i32 [T]
// (negative: the token is padding, nothing is written); 3 block_tables i32 [R, M]; 4 query_lens i32 [R]; 5 context_lens i32
// [R]; 6 key_cache and 7 value_cache [layers * N, B, K, D], f32, f16 or bf16, or i8 [layers * N, B, K, D + 4] (D numbers, then
// the f32 that they are to be multiplied by), written in place; 8 constants f32 [5 + 2 * D or 5]: layer, layers, H, K, eps, then
// weights of the query's and the key's norm if the network has them.
// Output: f32 [T, H * D].
//
// A row's tokens stand one after another; its last query_lens tokens of context_lens are new. Sums are f32.
#include <cmath>

#include "attend_tile.h"
#include "attend_token.h"
#include "operator.h"
#include "thread_pool.h"

namespace native {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxGroups = 64;

void rotate(const float *x, const float *cos_sin, int64_t dim, float scale, float *__restrict y) {
  const int64_t half = dim / 2;
  const float *cosines = cos_sin, *sines = cos_sin + half;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i] * scale, second = x[i + half] * scale;
    y[i] = first * cosines[i] - second * sines[i];
    y[i + half] = second * cosines[i] + first * sines[i];
  }
}

// Writes one token's keys and values to its slot and its rotated queries to the output, where attention finds them, scaled so
// that a score is the power of 2 that its weight is.
template <typename Format>
void place_token(const Call &c, int64_t token) {
  using Number = typename Format::Number;
  const float *q = c.qkv + token * c.qkv_width(), *k = q + c.heads * c.dim, *v = k + c.kv_heads * c.dim;
  const float *cos_sin = c.cos_sin + token * c.dim;
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(c.dim));
  float normed[kMaxHeadDim], turned[kMaxHeadDim];
  auto prepare = [&](const float *x, const float *weight, float factor, float *y) {
    if (weight) rms_norm(x, weight, c.dim, c.eps, normed);
    rotate(weight ? normed : x, cos_sin, c.dim, factor, y);
  };
  for (int64_t h = 0; h < c.heads; ++h) prepare(q + h * c.dim, c.norms, scale, c.out + (token * c.heads + h) * c.dim);
  if (c.slots[token] < 0) return;
  const int64_t head = Format::head(c.dim);
  const int64_t at = (c.layer * c.blocks * c.block_size + c.slots[token]) * c.kv_heads * head;
  for (int64_t h = 0; h < c.kv_heads; ++h) {
    prepare(k + h * c.dim, c.norms ? c.norms + c.dim : nullptr, 1.f, turned);
    Format::write(turned, c.dim, static_cast<Number *>(c.keys) + at + h * head);
    Format::write(v + h * c.dim, c.dim, static_cast<Number *>(c.values) + at + h * head);
  }
}

// A step's work. Its memory is kept for the next one.
struct Plan {
  std::vector<Unit> units;
  std::vector<Task> tasks;
  std::vector<float> partials;

  void make(const Call &c) {
    units.clear();
    tasks.clear();
    int64_t memory = 0;
    for (int64_t row = 0, token = 0; row < c.rows; token += c.query_lens[row++]) {
      const int64_t queries = c.query_lens[row], cached = c.context_lens[row] - queries;
      if (queries == 1) add(c, {row, token, cached, 1, -1, 0, 0, 0, 0}, kTokenPiece, &memory);
      const int64_t tokens = kTileVectors / c.groups();
      for (int64_t done = 0; done < queries && queries > 1; done += tokens)
        for (int64_t h = 0; h < c.kv_heads; ++h)
          add(c, {row, token + done, cached + done, std::min(tokens, queries - done), h, 0, 0, 0, 0}, kTilePiece, &memory);
    }
    // Longest tasks first, as late ones decide when the step ends
    auto cost = [&](const Task &t) { return (t.last - t.first) * units[t.unit].queries; };
    std::sort(tasks.begin(), tasks.end(), [&](const Task &a, const Task &b) {
      return cost(a) != cost(b) ? cost(a) > cost(b) : std::pair(a.unit, a.piece) < std::pair(b.unit, b.piece);
    });
    room(partials, memory);
  }

 private:
  void add(const Call &c, Unit unit, int64_t most_keys, int64_t *memory) {
    const int64_t keys = unit.keys();
    unit.pieces = (keys + most_keys - 1) / most_keys;
    const int64_t share = (keys + unit.pieces - 1) / unit.pieces;
    unit.piece_keys = (share + 15) / 16 * 16;
    unit.pieces = (keys + unit.piece_keys - 1) / unit.piece_keys;
    unit.left = static_cast<int>(unit.pieces);
    unit.partial = *memory;
    *memory += unit.pieces * Partial::size(unit.vectors(c), c.dim);
    for (int64_t i = 0; i < unit.pieces; ++i)
      tasks.push_back({static_cast<int64_t>(units.size()), i, i * unit.piece_keys, std::min(keys, (i + 1) * unit.piece_keys)});
    units.push_back(unit);
  }
};

template <typename Format>
void run(const Call &c) {
  static Plan plan;  // of the runtime's one operator thread
  plan.make(c);
  auto &pool = ThreadPool::shared();
  constexpr int64_t kTokens = 16;  // of one task: placing a token is short work
  pool.run((c.tokens + kTokens - 1) / kTokens, [&](int64_t task) {
    for (int64_t t = task * kTokens; t < std::min(c.tokens, (task + 1) * kTokens); ++t) place_token<Format>(c, t);
  });
  pool.run(static_cast<int64_t>(plan.tasks.size()), [&](int64_t i) {
    const Task &task = plan.tasks[i];
    Unit &unit = plan.units[task.unit];
    const int64_t vectors = unit.vectors(c), size = Partial::size(vectors, c.dim);
    float *partials = plan.partials.data() + unit.partial;
    const Partial partial(partials + task.piece * size, vectors, c.dim);
    unit.is_one_token() ? attend_token<Format>(c, unit, task, partial) : attend_tile<Format>(c, unit, task, partial);
    if (__atomic_sub_fetch(&unit.left, 1, __ATOMIC_ACQ_REL) == 0) merge(c, unit, partials);  // all others have read the queries
  });
}

Call checked(const Arguments &a) {
  a.expect(10);
  Call c{};
  c.qkv = a.data<float>(0, "float32", 2);
  c.cos_sin = a.data<float>(1, "float32", 2);
  c.slots = a.data<int32_t>(2, "int32", 1);
  c.tables = a.data<int32_t>(3, "int32", 2);
  c.query_lens = a.data<int32_t>(4, "int32", 1);
  c.context_lens = a.data<int32_t>(5, "int32", 1);
  const float *constants = a.data<float>(8, "float32", 1);
  c.out = a.data<float>(9, "float32", 2);
  c.keys = a.raw(6);
  c.values = a.raw(7);
  require(a.rank(6) == 4 && a.rank(7) == 4, "the caches must have rank 4");
  require(a.dim(8, 0) >= 5, "constants are missing");
  for (int i = 0; i < 4; ++i) require(constants[i] >= 0.f && constants[i] < 1e6f, "constants are not counts");
  const auto layers = static_cast<int64_t>(constants[1]);
  c.layer = static_cast<int64_t>(constants[0]);
  c.heads = static_cast<int64_t>(constants[2]);
  c.kv_heads = static_cast<int64_t>(constants[3]);
  c.eps = constants[4];
  c.tokens = a.dim(0, 0);
  c.rows = a.dim(3, 0);
  c.table_width = a.dim(3, 1);
  c.block_size = a.dim(6, 1);
  c.dim = a.dim(1, 1);
  require(c.block_size > 0, "blocks hold no token");
  require(c.kv_heads > 0 && c.heads > 0 && c.heads % c.kv_heads == 0, "query heads are not a multiple of key/value heads");
  require(c.groups() <= kMaxGroups, "more than 64 query heads share a key/value head");
  require(c.dim % 2 == 0 && c.dim > 0 && c.dim <= kMaxHeadDim, "head size must be even and at most 256");
  require(layers > 0 && c.layer >= 0 && c.layer < layers && a.dim(6, 0) % layers == 0, "layer or cache size is wrong");
  c.blocks = a.dim(6, 0) / layers;
  c.norms = a.dim(8, 0) > 5 ? constants + 5 : nullptr;
  if (c.norms) a.expect_dim(8, 0, 5 + 2 * c.dim);
  a.expect_dim(0, 1, c.qkv_width());
  a.expect_dim(1, 0, c.tokens);
  a.expect_dim(2, 0, c.tokens);
  a.expect_dim(4, 0, c.rows);
  a.expect_dim(5, 0, c.rows);
  a.expect_dim(6, 2, c.kv_heads);
  for (int axis = 0; axis < 4; ++axis) a.expect_dim(7, axis, a.dim(6, axis));
  a.expect_dim(9, 0, c.tokens);
  a.expect_dim(9, 1, c.heads * c.dim);
  return c;
}

// Values that index memory: each is in range before the first is used.
void check_indices(const Call &c) {
  int64_t total = 0;
  for (int64_t row = 0; row < c.rows; ++row) {
    const int64_t queries = c.query_lens[row], context = c.context_lens[row];
    const auto where = [&] { return "row " + std::to_string(row) + ": "; };
    require(queries >= 0 && queries <= context, [&] {
      return where() + "query length " + std::to_string(queries) + " of a context of " + std::to_string(context);
    });
    const int64_t used = (context + c.block_size - 1) / c.block_size;
    require(used <= c.table_width, [&] { return where() + "context does not fit its block table"; });
    for (int64_t i = 0; i < used && queries > 0; ++i) {
      const int32_t block = c.tables[row * c.table_width + i];
      require(block >= 0 && block < c.blocks,
              [&] { return where() + "block " + std::to_string(block) + " of " + std::to_string(c.blocks); });
    }
    total += queries;
  }
  require(total == c.tokens,
          [&] { return "query lengths add up to " + std::to_string(total) + ", not to " + std::to_string(c.tokens); });
  for (int64_t t = 0; t < c.tokens; ++t)
    require(c.slots[t] < c.blocks * c.block_size, [&] { return "slot " + std::to_string(c.slots[t]) + " is beyond the cache"; });
}

// Runs the call if its caches have this format.
template <typename Format>
bool run_if(const Arguments &a, const Call &c) {
  if (!a.is(6, Format::kName) || !a.is(7, Format::kName)) return false;
  a.expect_dim(6, 3, Format::head(c.dim));
  run<Format>(c);
  return true;
}

}  // namespace
}  // namespace native

extern "C" int PagedAttention(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  using namespace native;
  return guarded("PagedAttention", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    const Call c = checked(a);
    check_indices(c);
    const bool taken = run_if<Float32>(a, c) || run_if<Float16>(a, c) || run_if<BFloat16>(a, c) || run_if<Int8>(a, c);
    require(taken, "the caches must both be float32, float16, bfloat16 or int8");
  });
}
