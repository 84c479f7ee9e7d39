// Arithmetic that compilers turn into vector code: no branch, no call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace native {

// e^x for |x| <= ln(2) / 2 to 2e-7 relative, of one number or a vector of them: its Taylor polynomial.
template <typename T>
inline T exp_near_zero(T x) {
  return 1.f + x * (1.f + x * (1.f / 2 + x * (1.f / 6 + x * (1.f / 24 + x * (1.f / 120 + x * (1.f / 720))))));
}

// e^x for x <= 0 to 2e-7 relative: 2^n * 2^f with |f| <= 1/2.
inline float exp_of_negative(float x) {
  const float scaled = std::max(-87.f, x) * 1.44269504f;  // in this order NaN gives a number that fits an int
  const float whole = std::floor(scaled + 0.5f), power = exp_near_zero((scaled - whole) * 0.693147181f);
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float two_to_n;
  std::memcpy(&two_to_n, &bits, sizeof(bits));
  return power * two_to_n;
}

// x / (1 + e^-x)
inline float silu(float x) {
  const float small = exp_of_negative(-std::fabs(x));  // never overflows
  return x * (x < 0.f ? small : 1.f) / (1.f + small);
}

// y = x / rms(x) * weight over `size` numbers.
inline void rms_norm(const float *x, const float *weight, int64_t size, float eps, float *y) {
  float squares = 0.f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];
  const float scale = 1.f / std::sqrt(squares / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i) y[i] = x[i] * scale * weight[i];
}

inline float from_bfloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? bits >> 16 | 0x40 : rounded);
}

}  // namespace native
