// How a number of the cache is written and read. All arithmetic on it is f32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace native {

// A format's head(dim) numbers are what one token has of one key/value head: dim numbers and, if kScaled, what they are to be
// multiplied by.
struct Float32 {
  using Number = float;
  static constexpr bool kScaled = false;
  static int64_t head(int64_t dim) { return dim; }
  static lanes::Lanes load(const Number *from) { return lanes::load(from); }
  static float one(Number x) { return x; }
  static float scale(const Number *, int64_t) { return 1.f; }
  static void write(const float *x, int64_t dim, Number *to) { std::copy(x, x + dim, to); }
};

struct Float16 {
  using Number = _Float16;
  static constexpr bool kScaled = false;
  static int64_t head(int64_t dim) { return dim; }
  static lanes::Lanes load(const Number *from) { return lanes::load(from); }
  static float one(Number x) { return static_cast<float>(x); }
  static float scale(const Number *, int64_t) { return 1.f; }
  static void write(const float *x, int64_t dim, Number *to) {
    for (int64_t i = 0; i < dim; ++i) to[i] = static_cast<Number>(x[i]);
  }
};

}  // namespace native
