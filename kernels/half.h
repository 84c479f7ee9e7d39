// float16 numbers as bits: compilers have a type for them in C++ only of late (GCC 12 on x86, 13 on aarch64).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace native {

struct Half {
  uint16_t bits;
};

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits for bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float from_half(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  return bits_of<__fp16>(x);
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = (x.bits & 0x7fffu) << 13;
  const float size = rest < 0x0f800000u ? bits_of<float>(rest) * 0x1p112f : bits_of<float>(rest | 0x7f800000u);
  return bits_of<float>(bits_of<uint32_t>(size) | sign);
#endif
}

// To the nearest, ties to even; NaN stays NaN.
inline Half to_half(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(__aarch64__)
  return bits_of<Half>(static_cast<__fp16>(x));
#else
  const uint32_t bits = bits_of<uint32_t>(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half = 0x7c00u;  // from 65,520 on: infinity
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest < 0x38800000u) {  // no normal number: in steps of 2^-24, as numbers next to 1/2 are
    half = bits_of<uint32_t>(bits_of<float>(rest) + 0.5f) - 0x3f000000u;
  } else if (rest < 0x477ff000u) {
    half = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

}  // namespace native
