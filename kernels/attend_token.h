// Attention of one new token, all heads, over a piece of its row's keys. The cache is read once, in the order in which it lies in
// memory: what that takes is what a decode step costs.
#pragma once

#include "attention_task.h"
#include "cache_format.h"

namespace native {

constexpr int64_t kTokenPiece = 128;  // keys of a piece, at most

namespace token {

using lanes::kLanes;
using lanes::Lanes;
constexpr int kVectors = lanes::kBlock < 4 ? 3 : 4;  // query vectors that share a key's load

// out[m][j] = q[m] . k[j] for M query vectors and four keys; `stride` numbers from out[m] to out[m + 1].
template <typename Format, int M>
inline void dots(const float *q, const typename Format::Number *const *k, int64_t dim, float *out, int64_t stride) {
  Lanes acc[M][4] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Lanes key[4];
    for (int j = 0; j < 4; ++j) key[j] = Format::load(k[j] + d);
    for (int m = 0; m < M; ++m) {
      const Lanes query = lanes::load(q + m * dim + d);
      for (int j = 0; j < 4; ++j) acc[m][j] += query * key[j];
    }
  }
  for (int m = 0; m < M; ++m) {
    float total[4];
    const lanes::Four sums = lanes::sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
    std::memcpy(total, &sums, sizeof(sums));
    for (int j = 0; j < 4; ++j) {
      for (int64_t i = d; i < dim; ++i) total[j] += q[m * dim + i] * Format::one(k[j][i]);
      if (Format::kScaled) total[j] *= Format::scale(k[j], dim);
    }
    std::memcpy(out + m * stride, total, sizeof(total));
  }
}

template <typename Format>
inline void dots_of(int64_t vectors, const float *q, const typename Format::Number *const *k, int64_t dim, float *out,
                    int64_t stride) {
  switch (vectors) {
    case 1: return dots<Format, 1>(q, k, dim, out, stride);
    case 2: return dots<Format, 2>(q, k, dim, out, stride);
    case 3: return dots<Format, 3>(q, k, dim, out, stride);
    case 4: return dots<Format, 4>(q, k, dim, out, stride);
  }
}

// acc[m] += weights[m][j] * v[j] over `count` values, `step` numbers apart, for M query vectors.
template <typename Format, int M>
inline void weigh(const float *weights, int64_t stride, const typename Format::Number *v, int64_t step, int64_t count,
                  int64_t dim, float *acc) {
  int64_t d = 0;
  auto columns = [&](auto width) {
    constexpr int W = decltype(width)::value;
    for (; d + W * kLanes <= dim; d += W * kLanes) {
      Lanes sums[M][W];
      for (int m = 0; m < M; ++m)
        for (int w = 0; w < W; ++w) sums[m][w] = lanes::load(acc + m * dim + d + w * kLanes);
      for (int64_t j = 0; j < count; ++j) {
        Lanes value[W];
        for (int w = 0; w < W; ++w) value[w] = Format::load(v + j * step + d + w * kLanes);
        for (int m = 0; m < M; ++m)
          for (int w = 0; w < W; ++w) sums[m][w] += weights[m * stride + j] * value[w];
      }
      for (int m = 0; m < M; ++m)
        for (int w = 0; w < W; ++w) lanes::store(acc + m * dim + d + w * kLanes, sums[m][w]);
    }
  };
  columns(std::integral_constant<int, 4>());
  columns(std::integral_constant<int, 1>());
  for (; d < dim; ++d)
    for (int m = 0; m < M; ++m)
      for (int64_t j = 0; j < count; ++j) acc[m * dim + d] += weights[m * stride + j] * Format::one(v[j * step + d]);
}

template <typename Format>
inline void weigh_of(int64_t vectors, const float *weights, int64_t stride, const typename Format::Number *v, int64_t step,
                     int64_t count, int64_t dim, float *acc) {
  switch (vectors) {
    case 1: return weigh<Format, 1>(weights, stride, v, step, count, dim, acc);
    case 2: return weigh<Format, 2>(weights, stride, v, step, count, dim, acc);
    case 3: return weigh<Format, 3>(weights, stride, v, step, count, dim, acc);
    case 4: return weigh<Format, 4>(weights, stride, v, step, count, dim, acc);
  }
}

// Asks for memory that is read soon: a block ends where the processor's own foresight does.
inline void prefetch(const char *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Turns scores into weights 2^(score - top); their sum.
inline float soften(float *scores, int64_t count, float *top) {
  for (int64_t j = count; j % kLanes; ++j) scores[j] = kMasked;
  Lanes high = lanes::all(kMasked), sum{};
  for (int64_t j = 0; j < count; j += kLanes) high = lanes::larger(high, lanes::load(scores + j));
  *top = lanes::largest(high);
  for (int64_t j = 0; j < count; j += kLanes) {
    const Lanes weights = lanes::exp2_of_negative(lanes::load(scores + j) - *top);
    lanes::store(scores + j, weights);
    sum += weights;
  }
  return lanes::sum(sum);
}

}  // namespace token

// The answer goes to `partial`; c.out holds the token's queries, scaled so that scores are powers of 2.
template <typename Format>
void attend_token(const Call &c, const Unit &unit, const Task &task, const Partial &partial) {
  using Number = typename Format::Number;
  const int64_t groups = c.groups(), head = Format::head(c.dim), step = c.kv_heads * head;
  constexpr int64_t stride = kTokenPiece + lanes::kLanes;  // the last four of a part may reach beyond it
  const auto *keys = static_cast<const Number *>(c.keys), *values = static_cast<const Number *>(c.values);
  const float *q = unit.out(c, 0);
  Scratch scratch(c.heads * stride);
  float *scores = scratch.take(c.heads * stride);
  const int64_t width = step * static_cast<int64_t>(sizeof(Number));  // bytes of a token
  Part part = part_at(c, unit.row, task.first, task.last);
  for (int64_t key = task.first; key < task.last;) {
    const bool ends = key + part.count == task.last;
    const Part next = part_at(c, unit.row, ends ? task.first : key + part.count, task.last);
    const auto *ahead = reinterpret_cast<const char *>((ends ? values : keys) + next.slot * step);
    for (int64_t j = 0; j < part.count; j += 4) {
      if (j < next.count) token::prefetch(ahead + j * width, std::min<int64_t>(4, next.count - j) * width);
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        const Number *k[4];  // at the end of a part its last key fills the four
        for (int i = 0; i < 4; ++i) k[i] = keys + (part.slot + std::min(j + i, part.count - 1)) * step + h * head;
        for (int64_t m = h * groups; m < (h + 1) * groups; m += token::kVectors)
          token::dots_of<Format>(std::min<int64_t>(token::kVectors, (h + 1) * groups - m), q + m * c.dim, k, c.dim,
                                 scores + m * stride + key - task.first + j, stride);
      }
    }
    key += part.count;
    part = next;
  }
  for (int64_t m = 0; m < c.heads; ++m)
    partial.sum[m] = token::soften(scores + m * stride, task.last - task.first, &partial.top[m]);
  std::fill(partial.acc, partial.acc + c.heads * c.dim, 0.f);
  for (int64_t key = task.first; key < task.last;) {
    const bool ends = key + part.count == task.last;
    const Part next = ends ? Part{} : part_at(c, unit.row, key + part.count, task.last);
    const int64_t share = (next.count * width + c.kv_heads - 1) / c.kv_heads;
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      token::prefetch(reinterpret_cast<const char *>(values + next.slot * step) + h * share, share);
      const Number *v = values + part.slot * step + h * head;
      for (int64_t m = h * groups; m < (h + 1) * groups; m += token::kVectors) {
        const int64_t vectors = std::min<int64_t>(token::kVectors, (h + 1) * groups - m);
        float *weights = scores + m * stride + key - task.first;
        if (Format::kScaled)
          for (int64_t j = 0; j < part.count; ++j)
            for (int64_t i = 0; i < vectors; ++i) weights[i * stride + j] *= Format::scale(v + j * step, c.dim);
        token::weigh_of<Format>(vectors, weights, stride, v, step, part.count, c.dim, partial.acc + m * c.dim);
      }
    }
    key += part.count;
    part = next;
  }
}

}  // namespace native
