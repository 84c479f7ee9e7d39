// One layer's attention, cut into tasks that threads share, and what a task hands on where a row's keys are cut.
//
// How a row is cut depends on that row alone, and pieces are put together in their order, so a row's answer has the same bits
// whatever else is in the step and whichever thread did what.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "operator.h"

namespace native {

constexpr float kMasked = -1e30f;  // a score that must not count; finite, so that no difference of two is NaN

// Everything about one call; pointers and sizes are checked before any of them is used.
struct Call {
  const float *qkv, *cos_sin, *norms;
  const int32_t *slots, *tables, *query_lens, *context_lens;
  float *out;
  void *keys, *values;
  int64_t tokens, rows, table_width, layer, blocks, block_size, heads, kv_heads, dim;
  float eps;

  int64_t groups() const { return heads / kv_heads; }
  int64_t qkv_width() const { return (heads + 2 * kv_heads) * dim; }
};

// Queries that go over the keys together: one token with all its heads, or several with those of one key/value head.
struct Unit {
  int64_t row, first_token, first_position, queries;
  int64_t kv_head;             // -1: a row's one token, with all heads
  int64_t pieces, piece_keys;  // how its keys are cut
  int64_t partial;             // where the pieces' partial answers begin
  int left;                    // pieces that are not done

  bool is_one_token() const { return kv_head < 0; }
  int64_t keys() const { return first_position + queries; }  // that its last query may look at
  int64_t vectors(const Call &c) const { return is_one_token() ? c.heads : queries * c.groups(); }
  float *out(const Call &c, int64_t vector) const {
    if (is_one_token()) return c.out + (first_token * c.heads + vector) * c.dim;
    const int64_t token = first_token + vector / c.groups(), head = kv_head * c.groups() + vector % c.groups();
    return c.out + (token * c.heads + head) * c.dim;
  }
};

// One piece of a unit's keys.
struct Task {
  int64_t unit, piece, first, last;
};

// What a piece knows of one query vector: sum of weights 2^(score - top), and of values times weights.
struct Partial {
  float *acc, *top, *sum;  // [vectors, dim], [vectors], [vectors]

  static int64_t size(int64_t vectors, int64_t dim) { return vectors * (dim + 2); }
  Partial(float *at, int64_t vectors, int64_t dim) : acc(at), top(at + vectors * dim), sum(top + vectors) {}
};

// Keys of a row that stand together in the cache: the first one's slot, how many there are.
struct Part {
  int64_t slot, count;
};

// The part that begins with key `first` and ends at `last` at the latest.
inline Part part_at(const Call &c, int64_t row, int64_t first, int64_t last) {
  const int64_t offset = first % c.block_size, block = c.tables[row * c.table_width + first / c.block_size];
  return {(c.layer * c.blocks + block) * c.block_size + offset, std::min(c.block_size - offset, last - first)};
}

// Writes to `to` what acc/sum is; acc holds dim numbers.
inline void divide(const float *acc, float sum, int64_t dim, float *to) {
  const float inverse = 1.f / sum;
  for (int64_t i = 0; i < dim; ++i) to[i] = acc[i] * inverse;
}

// The pieces of a unit, put together.
inline void merge(const Call &c, const Unit &unit, float *partials) {
  const int64_t vectors = unit.vectors(c), size = Partial::size(vectors, c.dim);
  for (int64_t m = 0; m < vectors; ++m) {
    float *to = unit.out(c, m), top = kMasked, sum = 0.f;
    for (int64_t i = 0; i < unit.pieces; ++i) top = std::max(top, Partial(partials + i * size, vectors, c.dim).top[m]);
    std::fill(to, to + c.dim, 0.f);
    for (int64_t i = 0; i < unit.pieces; ++i) {
      const Partial piece(partials + i * size, vectors, c.dim);
      const float factor = lanes::exp2_of_negative(piece.top[m] - top), *acc = piece.acc + m * c.dim;
      sum += piece.sum[m] * factor;
      for (int64_t d = 0; d < c.dim; ++d) to[d] += acc[d] * factor;
    }
    divide(to, sum, c.dim, to);
  }
}

// Memory of one thread, handed out piece by piece.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : next_(room(of_this_thread(), floats)) {}
  float *take(int64_t floats) {
    float *taken = next_;
    next_ += floats;
    return taken;
  }

 private:
  static std::vector<float> &of_this_thread() {
    thread_local std::vector<float> memory;
    return memory;
  }
  float *next_;
};

}  // namespace native
