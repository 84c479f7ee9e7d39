// Attention of one new token, all heads, over a piece of its row's keys. The cache is read once, sixteen tokens at a time and of
// these one head after the other: what that takes is what a decode step costs.
#pragma once

#include "attention_task.h"
#include "cache_format.h"

namespace native {

constexpr int64_t kTokenPiece = 128;  // keys of a piece, at most

namespace token {

using lanes::kLanes;
using lanes::Lanes;
constexpr int kVectors = lanes::kBlock < 4 ? 3 : 4;  // query vectors that share a key's load
constexpr int64_t kKeys = 16;                        // keys that one head after the other looks at
constexpr int64_t kAhead = 24;                       // prefetch distance, in keys
static_assert(kKeys % kLanes == 0, "whole vectors of scores");

// out[m][j] = q[m] . k[j] for M query vectors and kLanes keys, which stand `offset` numbers after rows[j].
template <typename Format, int M>
inline void dots(const float *q, const typename Format::Number *const *rows, int64_t offset, int64_t dim, float *out,
                 int64_t stride) {
  Lanes fours[kLanes / 4][M];
  int64_t d = 0;
  for (int f = 0; f < kLanes / 4; ++f) {
    const typename Format::Number *k[4];
    for (int j = 0; j < 4; ++j) k[j] = rows[4 * f + j] + offset;
    Lanes acc[M][4] = {};
    for (d = 0; d + kLanes <= dim; d += kLanes) {
      Lanes query[M];
      for (int m = 0; m < M; ++m) query[m] = lanes::load(q + m * dim + d);
      for (int j = 0; j < 4; ++j) {
        const Lanes key = Format::load(k[j] + d);
        for (int m = 0; m < M; ++m) acc[m][j] += query[m] * key;
      }
    }
    for (int m = 0; m < M; ++m) fours[f][m] = lanes::quarters(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
  }
  for (int m = 0; m < M; ++m) {
    Lanes parts[kLanes / 4];
    for (int f = 0; f < kLanes / 4; ++f) parts[f] = fours[f][m];
    lanes::store(out + m * stride, lanes::folds(parts));
  }
  if (d == dim && !Format::kScaled) return;
  for (int j = 0; j < kLanes; ++j) {
    const auto *key = rows[j] + offset;
    for (int m = 0; m < M; ++m) {
      float *total = out + m * stride + j;
      for (int64_t i = d; i < dim; ++i) *total += q[m * dim + i] * Format::one(key[i]);
      if (Format::kScaled) *total *= Format::scale(key, dim);
    }
  }
}

// acc[m] += weights[m][j] * v[j] for M query vectors and `count` values, which stand `offset` numbers after rows[j].
template <typename Format, int M>
inline void weigh(const float *weights, int64_t stride, const typename Format::Number *const *rows, int64_t count,
                  int64_t offset, int64_t dim, float *acc) {
  int64_t d = 0;
  auto columns = [&](auto width) {
    constexpr int W = decltype(width)::value;
    for (; d + W * kLanes <= dim; d += W * kLanes) {
      Lanes sums[M][W];
      for (int m = 0; m < M; ++m)
        for (int w = 0; w < W; ++w) sums[m][w] = lanes::load(acc + m * dim + d + w * kLanes);
      for (int64_t j = 0; j < count; ++j) {
        const auto *v = rows[j] + offset + d;
        Lanes weight[M];
        for (int m = 0; m < M; ++m) weight[m] = lanes::all(weights[m * stride + j]);
        for (int w = 0; w < W; ++w) {
          const Lanes value = Format::load(v + w * kLanes);
          for (int m = 0; m < M; ++m) sums[m][w] += weight[m] * value;
        }
      }
      for (int m = 0; m < M; ++m)
        for (int w = 0; w < W; ++w) lanes::store(acc + m * dim + d + w * kLanes, sums[m][w]);
    }
  };
  columns(std::integral_constant<int, 4>());
  columns(std::integral_constant<int, 1>());
  for (; d < dim; ++d)
    for (int m = 0; m < M; ++m)
      for (int64_t j = 0; j < count; ++j) acc[m * dim + d] += weights[m * stride + j] * Format::one(rows[j][offset + d]);
}

// Calls use(first, M) for the vectors of a group, M at a time.
template <typename Use>
inline void in_parts(int64_t vectors, const Use &use) {
  for (int64_t m = 0; m < vectors; m += kVectors) {
    switch (std::min<int64_t>(kVectors, vectors - m)) {
      case 1: use(m, std::integral_constant<int, 1>()); break;
      case 2: use(m, std::integral_constant<int, 2>()); break;
      case 3: use(m, std::integral_constant<int, 3>()); break;
      case 4: use(m, std::integral_constant<int, 4>()); break;
    }
  }
}

// Asks for memory that is read soon: a block ends where the processor's own foresight does.
template <typename Number>
inline void prefetch(const Number *from, int64_t numbers) {
  const auto *bytes = reinterpret_cast<const char *>(from);
  for (int64_t i = 0; i < numbers * static_cast<int64_t>(sizeof(Number)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
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
  using token::kKeys;
  const int64_t groups = c.groups(), head = Format::head(c.dim), step = c.kv_heads * head, count = task.last - task.first;
  constexpr int64_t stride = kTokenPiece + token::kKeys;  // the last keys may reach beyond a piece
  const float *q = unit.out(c, 0);
  Scratch scratch(c.heads * stride);
  float *scores = scratch.take(c.heads * stride);
  // Where the tokens' keys are, then where their values are, in the order in which they are read
  const Number *rows[2 * kTokenPiece + kKeys + token::kAhead];
  for (int64_t j = 0; j < count;) {
    const Part part = part_at(c, unit.row, task.first + j, task.last);
    for (int64_t i = 0; i < part.count; ++i, ++j) {
      rows[j] = static_cast<const Number *>(c.keys) + (part.slot + i) * step;
      rows[count + j] = static_cast<const Number *>(c.values) + (part.slot + i) * step;
    }
  }
  std::fill(rows + 2 * count, rows + 2 * count + kKeys + token::kAhead, rows[2 * count - 1]);
  for (int64_t j = 0; j < token::kAhead; ++j) token::prefetch(rows[j], step);
  for (int64_t j = 0; j < count; j += kKeys) {  // the last ones are values, whose scores nobody reads
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      for (int64_t i = 0; i < kKeys; ++i) token::prefetch(rows[j + token::kAhead + i] + h * head, head);
      token::in_parts(groups, [&](int64_t first, auto vectors) {
        const int64_t m = h * groups + first;
        for (int64_t i = 0; i < kKeys; i += token::kLanes)
          token::dots<Format, decltype(vectors)::value>(q + m * c.dim, rows + j + i, h * head, c.dim,
                                                        scores + m * stride + j + i, stride);
      });
    }
  }
  for (int64_t m = 0; m < c.heads; ++m) partial.sum[m] = token::soften(scores + m * stride, count, &partial.top[m]);
  std::fill(partial.acc, partial.acc + c.heads * c.dim, 0.f);
  for (int64_t j = 0; j < count; j += kKeys) {
    const int64_t keys = std::min(kKeys, count - j);
    const Number *const *values = rows + count + j;
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      if (j + token::kAhead < count)
        for (int64_t i = 0; i < kKeys; ++i) token::prefetch(values[token::kAhead + i] + h * head, head);
      token::in_parts(groups, [&](int64_t first, auto vectors) {
        const int64_t m = h * groups + first;
        float *weights = scores + m * stride + j;
        if (Format::kScaled)
          for (int64_t i = 0; i < keys; ++i)
            for (int n = 0; n < vectors; ++n) weights[n * stride + i] *= Format::scale(values[i] + h * head, c.dim);
        token::weigh<Format, decltype(vectors)::value>(weights, stride, values, keys, h * head, c.dim,
                                                       partial.acc + m * c.dim);
      });
    }
  }
}

}  // namespace native
