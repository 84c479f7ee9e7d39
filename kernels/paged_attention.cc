// Rotary embedding, cache write and attention of one layer over a paged KV cache, for rows of any length.
//
// Inputs: 0 qkv f32 [T, (H + 2K) * D]; 1 cos_sin f32 [T, D] (cosines, then sines, of D/2 pairs); 2 slot_mapping i32 [T]
// (negative: the token is padding, nothing is written); 3 block_tables i32 [R, M]; 4 query_lens i32 [R]; 5 context_lens i32
// [R]; 6 key_cache and 7 value_cache [layers * N, B, K, D], f32 or f16, written in place; 8 constants f32 [5 + 2 * D or 5]:
// layer, layers, H, K, eps, then weights of the query's and the key's norm if the network has them.
// Output: f32 [T, H * D].
//
// A row's tokens stand one after another; its last query_lens tokens of context_lens are new. Row by row and key/value head
// by head, tiles of queries go over the row's blocks once, with a running maximum (as in FlashAttention, arXiv:2205.14135),
// so memory does not grow with the context. Sums are f32.
#include <algorithm>
#include <cmath>
#include <limits>

#include "operator.h"
#include "thread_pool.h"

namespace native {
namespace {

constexpr int kKeyTile = 16;    // keys a step of the inner loop takes: one AVX-512 register, four NEON ones
constexpr int kQueryTile = 16;  // new tokens that share one pass over the keys
constexpr int kMaxHeadDim = 256;

// Everything about one call; pointers and sizes are checked before any of them is used.
struct Call {
  const float *qkv, *cos_sin, *norms;
  const int32_t *slots, *tables, *query_lens, *context_lens;
  float *out;
  int64_t tokens, rows, table_width, layer, blocks, block_size, heads, kv_heads, dim;
  float eps;

  int64_t groups() const { return heads / kv_heads; }
  int64_t qkv_width() const { return (heads + 2 * kv_heads) * dim; }
  int64_t cache_row() const { return kv_heads * dim; }
};

// One tile of queries of one row and key/value head.
struct Tile {
  int64_t row, first_token, first_position, queries, kv_head;
};

void rotate(const float *x, const float *cos_sin, int64_t dim, float *y) {
  const int64_t half = dim / 2;
  const float *cosines = cos_sin, *sines = cos_sin + half;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    y[i] = first * cosines[i] - second * sines[i];
    y[i + half] = second * cosines[i] + first * sines[i];
  }
}

void norm(const float *x, const float *weight, int64_t dim, float eps, float *y) {
  float squares = 0.f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < dim; ++i) squares += x[i] * x[i];
  const float scale = 1.f / std::sqrt(squares / static_cast<float>(dim) + eps);
  for (int64_t i = 0; i < dim; ++i) y[i] = x[i] * scale * weight[i];
}

// Writes one token's keys and values to its slot and its rotated queries to the output, where attention finds them.
template <typename Cache>
void place_token(const Call &c, int64_t token, Cache *keys, Cache *values) {
  const float *q = c.qkv + token * c.qkv_width(), *k = q + c.heads * c.dim, *v = k + c.cache_row();
  const float *cos_sin = c.cos_sin + token * c.dim;
  float normed[kMaxHeadDim], turned[kMaxHeadDim];
  auto prepared = [&](const float *x, const float *weight, float *y) {
    if (weight) norm(x, weight, c.dim, c.eps, normed);
    rotate(weight ? normed : x, cos_sin, c.dim, y);
  };
  for (int64_t h = 0; h < c.heads; ++h) prepared(q + h * c.dim, c.norms, c.out + (token * c.heads + h) * c.dim);
  if (c.slots[token] < 0) return;
  const int64_t base = (c.layer * c.blocks * c.block_size + c.slots[token]) * c.cache_row();
  for (int64_t h = 0; h < c.kv_heads; ++h) {
    prepared(k + h * c.dim, c.norms ? c.norms + c.dim : nullptr, turned);
    for (int64_t i = 0; i < c.dim; ++i) {
      keys[base + h * c.dim + i] = static_cast<Cache>(turned[i]);
      values[base + h * c.dim + i] = static_cast<Cache>(v[h * c.dim + i]);
    }
  }
}

// e^x for x <= 0 to 2e-7 relative, without a branch, so that the compiler does it for a whole tile: 2^n * 2^f with |f| <= 1/2,
// and 2^f by its Taylor polynomial.
inline float exp_of_negative(float x) {
  const float scaled = std::max(x, -87.f) * 1.44269504f;
  const float whole = std::floor(scaled + 0.5f), f = (scaled - whole) * 0.693147181f;
  const float power = 1.f + f * (1.f + f * (1.f / 2 + f * (1.f / 6 + f * (1.f / 24 + f * (1.f / 120 + f * (1.f / 720))))));
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float two_to_n;
  std::memcpy(&two_to_n, &bits, sizeof(bits));
  return power * two_to_n;
}

// Attention state of one query vector: what FlashAttention keeps between key tiles.
struct Softmax {
  float top = -std::numeric_limits<float>::infinity();
  float sum = 0.f;

  // Takes `count` scores, turns them into weights relative to the new maximum and rescales what was summed so far.
  void take(float *scores, int count, float *acc, int64_t dim) {
    float high = top;
    for (int j = 0; j < count; ++j) high = std::max(high, scores[j]);
    if (high > top) {
      const float rescale = std::exp(top - high);
      sum *= rescale;
      for (int64_t i = 0; i < dim; ++i) acc[i] *= rescale;
      top = high;
    }
    float total = 0.f;
#pragma omp simd reduction(+ : total)
    for (int j = 0; j < count; ++j) total += scores[j] = exp_of_negative(scores[j] - top);
    sum += total;
  }
};

// scores[m][j] = q[m] . k[j] over a tile of keys that is laid out [dim][kKeyTile], so that one register holds one number of
// every key.
void tile_scores(const float *const *queries, int count, const float *keys, int64_t dim, float scale,
                 float (*scores)[kKeyTile]) {
  int m = 0;
  for (; m + 4 <= count; m += 4) {
    float acc[4][kKeyTile] = {};
    for (int64_t d = 0; d < dim; ++d)
      for (int u = 0; u < 4; ++u) {
        const float q = queries[m + u][d];
#pragma omp simd
        for (int j = 0; j < kKeyTile; ++j) acc[u][j] += q * keys[d * kKeyTile + j];
      }
    for (int u = 0; u < 4; ++u)
      for (int j = 0; j < kKeyTile; ++j) scores[m + u][j] = acc[u][j] * scale;
  }
  for (; m < count; ++m) {
    float acc[kKeyTile] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const float q = queries[m][d];
#pragma omp simd
      for (int j = 0; j < kKeyTile; ++j) acc[j] += q * keys[d * kKeyTile + j];
    }
    for (int j = 0; j < kKeyTile; ++j) scores[m][j] = acc[j] * scale;
  }
}

// The same with keys as the cache holds them: cheaper where so few queries share a key that laying it out anew does not pay.
template <typename Cache>
void few_scores(const float *const *queries, int count, const Cache *keys, int64_t stride, int keys_here, int64_t dim,
                float scale, float (*scores)[kKeyTile]) {
  for (int j = 0; j < keys_here; ++j)
    for (int m = 0; m < count; ++m) {
      const float *q = queries[m];
      const Cache *k = keys + j * stride;
      float dot = 0.f;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < dim; ++d) dot += q[d] * static_cast<float>(k[d]);
      scores[m][j] = dot * scale;
    }
}

template <typename Cache>
void attend(const Call &c, const Tile &t, const Cache *keys, const Cache *values) {
  constexpr int kMaxVectors = 64;  // query vectors of a pass: heads of the group times tokens of the tile
  const int groups = static_cast<int>(c.groups()), vectors = groups * static_cast<int>(t.queries);
  const float scale = 1.f / std::sqrt(static_cast<float>(c.dim));
  const int64_t last = t.first_position + t.queries;  // tokens that the tile's last query may look at
  const int32_t *table = c.tables + t.row * c.table_width;
  std::vector<float> acc(static_cast<size_t>(vectors) * c.dim, 0.f), turned(static_cast<size_t>(c.dim) * kKeyTile);
  std::vector<Softmax> state(vectors);
  std::vector<const float *> queries(vectors);
  for (int m = 0; m < vectors; ++m)
    queries[m] = c.out + ((t.first_token + m / groups) * c.heads + t.kv_head * groups + m % groups) * c.dim;
  float scores[kMaxVectors][kKeyTile];

  for (int64_t first = 0; first < last;) {
    const int64_t offset = first % c.block_size;
    const int here = static_cast<int>(std::min<int64_t>({kKeyTile, c.block_size - offset, last - first}));
    const int64_t at = ((c.layer * c.blocks + table[first / c.block_size]) * c.block_size + offset) * c.cache_row() + t.kv_head * c.dim;
    const Cache *k = keys + at, *v = values + at;
    const bool few = vectors < 8;
    if (!few) {
      for (int64_t d = 0; d < c.dim; ++d)
        for (int j = 0; j < kKeyTile; ++j)
          turned[d * kKeyTile + j] = j < here ? static_cast<float>(k[j * c.cache_row() + d]) : 0.f;
    }
    for (int begin = 0; begin < vectors; begin += kMaxVectors) {
      const int count = std::min(kMaxVectors, vectors - begin);
      if (few) {
        few_scores(queries.data() + begin, count, k, c.cache_row(), here, c.dim, scale, scores);
      } else {
        tile_scores(queries.data() + begin, count, turned.data(), c.dim, scale, scores);
      }
      for (int m = 0; m < count; ++m) {
        const int vector = begin + m;
        const int64_t position = t.first_position + vector / groups;
        const int visible = static_cast<int>(std::min<int64_t>(here, position + 1 - first));
        if (visible <= 0) continue;
        float *sum = acc.data() + static_cast<int64_t>(vector) * c.dim;
        state[vector].take(scores[m], visible, sum, c.dim);
        for (int j = 0; j < visible; ++j) {
          const float weight = scores[m][j];
          const Cache *value = v + j * c.cache_row();
#pragma omp simd
          for (int64_t d = 0; d < c.dim; ++d) sum[d] += weight * static_cast<float>(value[d]);
        }
      }
    }
    first += here;
  }
  for (int m = 0; m < vectors; ++m) {
    float *to = c.out + ((t.first_token + m / groups) * c.heads + t.kv_head * groups + m % groups) * c.dim;
    const float inverse = 1.f / state[m].sum;
    for (int64_t d = 0; d < c.dim; ++d) to[d] = acc[static_cast<int64_t>(m) * c.dim + d] * inverse;
  }
}

// The step's work, cut so that threads can share it: longest passes first, as late ones decide when the step ends.
std::vector<Tile> tiles_of(const Call &c) {
  std::vector<Tile> tiles;
  for (int64_t row = 0, token = 0; row < c.rows; token += c.query_lens[row++])
    for (int64_t done = 0; done < c.query_lens[row]; done += kQueryTile)
      for (int64_t head = 0; head < c.kv_heads; ++head)
        tiles.push_back({row, token + done, c.context_lens[row] - c.query_lens[row] + done,
                         std::min<int64_t>(kQueryTile, c.query_lens[row] - done), head});
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile &a, const Tile &b) {
    return (a.first_position + a.queries) * a.queries > (b.first_position + b.queries) * b.queries;
  });
  return tiles;
}

template <typename Cache>
void run(const Call &c, void *key_cache, void *value_cache) {
  auto *keys = static_cast<Cache *>(key_cache), *values = static_cast<Cache *>(value_cache);
  const auto tiles = tiles_of(c);
  auto &pool = ThreadPool::shared();
  constexpr int64_t kTokens = 16;  // of one task: placing a token is short work
  pool.run((c.tokens + kTokens - 1) / kTokens, [&](int64_t task) {
    for (int64_t t = task * kTokens; t < std::min(c.tokens, (task + 1) * kTokens); ++t) place_token(c, t, keys, values);
  });
  pool.run(static_cast<int64_t>(tiles.size()), [&](int64_t i) { attend(c, tiles[i], keys, values); });
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
  require(a.rank(6) == 4 && a.rank(7) == 4, "the caches must have rank 4");
  require(a.dim(8, 0) >= 5, "constants are missing");
  const auto layers = static_cast<int64_t>(constants[1]);
  c.layer = static_cast<int64_t>(constants[0]);
  c.heads = static_cast<int64_t>(constants[2]);
  c.kv_heads = static_cast<int64_t>(constants[3]);
  c.eps = constants[4];
  c.tokens = a.dim(0, 0);
  c.rows = a.dim(3, 0);
  c.table_width = a.dim(3, 1);
  c.block_size = a.dim(6, 1);
  c.dim = a.dim(6, 3);
  require(c.block_size > 0, "blocks hold no token");
  require(c.kv_heads > 0 && c.heads % c.kv_heads == 0, "query heads are not a multiple of key/value heads");
  require(c.heads / c.kv_heads <= 64, "more than 64 query heads share a key/value head");
  require(c.dim % 2 == 0 && c.dim > 0 && c.dim <= kMaxHeadDim, "head size must be even and at most 256");
  require(layers > 0 && c.layer >= 0 && c.layer < layers && a.dim(6, 0) % layers == 0, "layer or cache size is wrong");
  c.blocks = a.dim(6, 0) / layers;
  c.norms = a.dim(8, 0) > 5 ? constants + 5 : nullptr;
  if (c.norms) a.expect_dim(8, 0, 5 + 2 * c.dim);
  a.expect_dim(0, 1, c.qkv_width());
  a.expect_dim(1, 0, c.tokens);
  a.expect_dim(1, 1, c.dim);
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
    const std::string where = "row " + std::to_string(row) + ": ";
    require(queries >= 0 && queries <= context, where + "query length " + std::to_string(queries) + " of a context of " + std::to_string(context));
    const int64_t used = (context + c.block_size - 1) / c.block_size;
    require(used <= c.table_width, where + "context does not fit its block table");
    for (int64_t i = 0; i < used && queries > 0; ++i) {
      const int32_t block = c.tables[row * c.table_width + i];
      require(block >= 0 && block < c.blocks, where + "block " + std::to_string(block) + " of " + std::to_string(c.blocks));
    }
    total += queries;
  }
  require(total == c.tokens, "query lengths add up to " + std::to_string(total) + ", not to " + std::to_string(c.tokens));
  for (int64_t t = 0; t < c.tokens; ++t)
    require(c.slots[t] < c.blocks * c.block_size, "slot " + std::to_string(c.slots[t]) + " is beyond the cache");
}

}  // namespace
}  // namespace native

extern "C" int PagedAttention(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  using namespace native;
  return guarded("PagedAttention", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    const Call c = checked(a);
    check_indices(c);
    if (a.is(6, "float32") && a.is(7, "float32")) {
      run<float>(c, a.raw(6), a.raw(7));
    } else {
      require(a.is(6, "float16") && a.is(7, "float16"), "the caches must both be float32 or float16");
      run<_Float16>(c, a.raw(6), a.raw(7));
    }
  });
}

extern "C" std::vector<int64_t> PagedAttentionInferShape(int *, int64_t **shapes, AotExtra *) {
  // rows of qkv: H query heads and 2K others of size D; constants hold no shape at compile time, the caches do
  const int64_t qkv = shapes[0][1], kv = shapes[6][2] * shapes[6][3];
  return {shapes[0][0], qkv < 0 ? -1 : qkv - 2 * kv};
}

extern "C" TypeId PagedAttentionInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }
