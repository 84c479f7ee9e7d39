// Attention of several new tokens of a row, with the heads of one key/value head, over a piece of the row's keys: what a prompt
// costs. Keys pass in tiles, with a running maximum (as in FlashAttention, arXiv:2205.14135), so memory does not grow with them.
#pragma once

#include "attention_task.h"
#include "cache_format.h"

namespace native {

constexpr int64_t kTileVectors = 128;  // query vectors of a unit, at most
constexpr int64_t kTilePiece = 1024;   // keys of a piece, at most

namespace tile {

using lanes::kBlock;
using lanes::kLanes;
using lanes::Lanes;
constexpr int64_t kKeys = 64;  // keys of a tile

constexpr int64_t rounded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// out[u][m] = sum over k of a[u][k] * b[k][m] for U rows of a and W vectors of columns; with kAdd,
// factor[u] * out[u][m] is added.
template <bool kAdd, int U, int W>
inline void product(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step, int64_t steps, float *out,
                    int64_t out_row, const float *factor) {
  Lanes sums[U][W] = {};
  if (kAdd)
    for (int u = 0; u < U; ++u)
      for (int w = 0; w < W; ++w) sums[u][w] = lanes::load(out + u * out_row + w * kLanes) * factor[u];
  for (int64_t k = 0; k < steps; ++k) {
    Lanes columns[W];
    for (int w = 0; w < W; ++w) columns[w] = lanes::load(b + k * b_step + w * kLanes);
    for (int u = 0; u < U; ++u)
      for (int w = 0; w < W; ++w) sums[u][w] += a[u * a_row + k * a_step] * columns[w];
  }
  for (int u = 0; u < U; ++u)
    for (int w = 0; w < W; ++w) lanes::store(out + u * out_row + w * kLanes, sums[u][w]);
}

// The same for any number of rows and of columns, which is a multiple of the lanes.
template <bool kAdd>
inline void multiply(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step, int64_t steps, float *out,
                     int64_t out_row, int64_t rows, int64_t columns, const float *factor) {
  for (int64_t first = 0; first < columns;) {
    const bool wide = columns - first >= 4 * kLanes;
    for (int64_t u = 0; u < rows;) {
      const float *from = a + u * a_row, *f = kAdd ? factor + u : nullptr;
      float *to = out + u * out_row + first;
      const bool full = rows - u >= kBlock;
      if (full && wide) {
        product<kAdd, kBlock, 4>(from, a_row, a_step, b + first, b_step, steps, to, out_row, f);
      } else if (full) {
        product<kAdd, kBlock, 1>(from, a_row, a_step, b + first, b_step, steps, to, out_row, f);
      } else if (wide) {
        product<kAdd, 1, 4>(from, a_row, a_step, b + first, b_step, steps, to, out_row, f);
      } else {
        product<kAdd, 1, 1>(from, a_row, a_step, b + first, b_step, steps, to, out_row, f);
      }
      u += full ? kBlock : 1;
    }
    first += (wide ? 4 : 1) * kLanes;
  }
}

// One head's keys or values of a part of the cache as f32 rows of `width` numbers; those beyond dim are 0.
template <typename Format>
inline void widen(const typename Format::Number *from, int64_t step, int64_t count, int64_t dim, int64_t width, float *to) {
  for (int64_t j = 0; j < count; ++j, from += step, to += width) {
    const float scale = Format::scale(from, dim);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) lanes::store(to + d, Format::load(from + d) * scale);
    for (; d < dim; ++d) to[d] = Format::one(from[d]) * scale;
    for (; d < width; ++d) to[d] = 0.f;
  }
}

// Scores [keys][width] of vectors whose tokens may look at `visible` keys of this tile: those beyond become kMasked.
inline void mask(float *scores, int64_t keys, int64_t width, const int32_t *visible) {
  for (int64_t m = 0; m < width; m += kLanes) {
    const auto sees = lanes::read<lanes::Ints>(visible + m);
    for (int64_t j = 0; j < keys; ++j) {
      float *at = scores + j * width + m;
      lanes::store(at, sees > static_cast<int32_t>(j) ? lanes::load(at) : lanes::all(kMasked));
    }
  }
}

// Turns scores [keys][width] into weights relative to the new maximum; `factor` is what earlier sums are to be multiplied by.
inline void soften(float *scores, int64_t keys, int64_t width, float *top, float *sum, float *factor) {
  for (int64_t m = 0; m < width; m += kLanes) {
    const Lanes before = lanes::load(top + m);
    Lanes high = before, total{};
    for (int64_t j = 0; j < keys; ++j) high = lanes::larger(high, lanes::load(scores + j * width + m));
    for (int64_t j = 0; j < keys; ++j) {
      const Lanes weights = lanes::exp2_of_negative(lanes::load(scores + j * width + m) - high);
      lanes::store(scores + j * width + m, weights);
      total += weights;
    }
    const Lanes scale = lanes::exp2_of_negative(before - high);
    lanes::store(factor + m, scale);
    lanes::store(sum + m, lanes::load(sum + m) * scale + total);
    lanes::store(top + m, high);
  }
}

}  // namespace tile

// The answer goes to `partial`; c.out holds the tokens' queries, scaled so that scores are powers of 2.
template <typename Format>
void attend_tile(const Call &c, const Unit &unit, const Task &task, const Partial &partial) {
  using Number = typename Format::Number;
  using tile::kKeys;
  const int64_t head = Format::head(c.dim), step = c.kv_heads * head, vectors = unit.vectors(c);
  const int64_t width = tile::rounded(vectors), columns = tile::rounded(c.dim);
  const auto *keys = static_cast<const Number *>(c.keys) + unit.kv_head * head;
  const auto *values = static_cast<const Number *>(c.values) + unit.kv_head * head;
  Scratch scratch(c.dim * width + 2 * kKeys * columns + kKeys * width + vectors * columns + 3 * width);
  float *queries = scratch.take(c.dim * width), *k = scratch.take(kKeys * columns), *v = scratch.take(kKeys * columns);
  float *scores = scratch.take(kKeys * width), *acc = scratch.take(vectors * columns);
  float *top = scratch.take(width), *sum = scratch.take(width), *factor = scratch.take(width);
  int32_t visible[tile::rounded(kTileVectors)];
  for (int64_t d = 0; d < c.dim; ++d) std::fill(queries + d * width + vectors, queries + (d + 1) * width, 0.f);
  for (int64_t m = 0; m < vectors; ++m) {
    const float *q = unit.out(c, m);
    for (int64_t d = 0; d < c.dim; ++d) queries[d * width + m] = q[d];
  }
  std::fill(top, top + width, kMasked);
  std::fill(sum, sum + width, 0.f);
  std::fill(acc, acc + vectors * columns, 0.f);
  for (int64_t first = task.first; first < task.last; first += kKeys) {
    const int64_t count = std::min(kKeys, task.last - first);
    for (int64_t key = first; key < first + count;) {
      const Part part = part_at(c, unit.row, key, first + count);
      tile::widen<Format>(keys + part.slot * step, step, part.count, c.dim, columns, k + (key - first) * columns);
      tile::widen<Format>(values + part.slot * step, step, part.count, c.dim, columns, v + (key - first) * columns);
      key += part.count;
    }
    tile::multiply<false>(k, columns, 1, queries, width, c.dim, scores, width, count, width, nullptr);
    if (first + count > unit.first_position + 1) {
      for (int64_t m = 0; m < width; ++m)
        visible[m] = static_cast<int32_t>(unit.first_position + std::min(m, vectors - 1) / c.groups() + 1 - first);
      tile::mask(scores, count, width, visible);
    }
    tile::soften(scores, count, width, top, sum, factor);
    tile::multiply<true>(scores, 1, width, v, columns, count, acc, columns, vectors, columns, factor);
  }
  for (int64_t m = 0; m < vectors; ++m) std::copy(acc + m * columns, acc + m * columns + c.dim, partial.acc + m * c.dim);
  std::copy(top, top + vectors, partial.top);
  std::copy(sum, sum + vectors, partial.sum);
}

}  // namespace native
