// How a number of the cache is written and read. All arithmetic on it is f32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "lanes.h"
#include "vector_math.h"

namespace native {

// A format's name is MindSpore's; its head(dim) numbers are what one token has of one key/value head: dim numbers and, if
// kScaled, what they are to be multiplied by.
struct Float32 {
  static constexpr const char *kName = "float32";
  using Number = float;
  static constexpr bool kScaled = false;
  static int64_t head(int64_t dim) { return dim; }
  static lanes::Lanes load(const Number *from) { return lanes::load(from); }
  static float one(Number x) { return x; }
  static float scale(const Number *, int64_t) { return 1.f; }
  static void write(const float *x, int64_t dim, Number *to) { std::copy(x, x + dim, to); }
};

struct Float16 {
  static constexpr const char *kName = "float16";
  using Number = Half;
  static constexpr bool kScaled = false;
  static int64_t head(int64_t dim) { return dim; }
  static lanes::Lanes load(const Number *from) { return lanes::load(from); }
  static float one(Number x) { return from_half(x); }
  static float scale(const Number *, int64_t) { return 1.f; }
  static void write(const float *x, int64_t dim, Number *to) {
    for (int64_t i = 0; i < dim; ++i) to[i] = to_half(x[i]);
  }
};

struct BFloat16 {
  static constexpr const char *kName = "bfloat16";
  using Number = uint16_t;
  static constexpr bool kScaled = false;
  static int64_t head(int64_t dim) { return dim; }
  static lanes::Lanes load(const Number *from) { return lanes::load_bfloat16(from); }
  static float one(Number x) { return from_bfloat(x); }
  static float scale(const Number *, int64_t) { return 1.f; }
  static void write(const float *x, int64_t dim, Number *to) {
    for (int64_t i = 0; i < dim; ++i) to[i] = to_bfloat(x[i]);
  }
};

// Whole numbers up to 127, then the f32 that they are to be multiplied by.
struct Int8 {
  static constexpr const char *kName = "int8";
  using Number = int8_t;
  static constexpr bool kScaled = true;
  static int64_t head(int64_t dim) { return dim + static_cast<int64_t>(sizeof(float)); }
  static lanes::Lanes load(const Number *from) { return lanes::load(from); }
  static float one(Number x) { return x; }
  static float scale(const Number *head, int64_t dim) {
    float value;
    std::memcpy(&value, head + dim, sizeof(value));
    return value;
  }
  static void write(const float *x, int64_t dim, Number *to) {
    float largest = 0.f, poison = 0.f;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t i = 0; i < dim; ++i) {
      largest = std::max(largest, std::fabs(x[i]));
      poison += 0.f * x[i];
    }
    // NaN and infinity have no code: they reach the reader through the scale
    const float scale = largest / 127.f + poison, inverse = scale > 0.f ? 1.f / scale : 0.f;
    for (int64_t i = 0; i < dim; ++i) {
      const float bounded = std::max(-127.f, std::min(127.f, x[i] * inverse));  // in range also for what is no number
      to[i] = static_cast<Number>(static_cast<int32_t>(bounded + (bounded < 0.f ? -0.5f : 0.5f)));
    }
    std::memcpy(to + dim, &scale, sizeof(scale));
  }
};

}  // namespace native
