// Vectors of this machine's width, in the compilers' own notation: AVX-512, AVX2 and NEON from one source.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 takes the header's undefined vectors for a mistake
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "half.h"
#include "vector_math.h"

namespace native {
namespace lanes {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kBlock = 6;  // kBlock times four sums fit the registers: 24 of 32
#elif defined(__AVX2__)
constexpr int kLanes = 8, kBlock = 3;  // 12 of 16
#else
constexpr int kLanes = 4, kBlock = 6;  // NEON: 24 of 32
#endif

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef int16_t Shorts __attribute__((vector_size(kLanes * sizeof(int32_t))));  // two for each lane
typedef float Four __attribute__((vector_size(4 * sizeof(float))));
typedef int32_t FourInts __attribute__((vector_size(4 * sizeof(int32_t))));

template <typename Vector>
inline Vector read(const void *from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline Lanes load(const float *from) { return read<Lanes>(from); }

// Widening conversions are spelt out where GCC does not find the one instruction.
inline Lanes load(const Half *from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_cvtph_ps(read<__m256i>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
  return reinterpret_cast<Lanes>(_mm256_cvtph_ps(read<__m128i>(from)));
#elif defined(__aarch64__)
  return reinterpret_cast<Lanes>(vcvt_f32_f16(read<float16x4_t>(from)));
#else
  Lanes v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = from_half(from[i]);
  return v;
#endif
}

inline Lanes load_bfloat16(const uint16_t *from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(from)), 16));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(from)), 16));
#else
  return reinterpret_cast<Lanes>(__builtin_convertvector(read<Halves>(from), Words) << 16);
#endif
}

inline Lanes load(const int8_t *from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(from))));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
  return reinterpret_cast<Lanes>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
  return __builtin_convertvector(__builtin_convertvector(read<Bytes>(from), Ints), Lanes);
#endif
}

inline void store(float *to, Lanes v) { std::memcpy(to, &v, sizeof(v)); }
inline Lanes all(float x) { return x - Lanes{}; }  // x + 0 would be an addition, as -0 + 0 is 0
inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
inline Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }

// To the nearest, ties to even, for |v| < 2^22.
inline Ints nearest(Lanes v) {
  constexpr float kNoFraction = 12582912.f;  // 1.5 * 2^23: numbers of its size are whole
  return __builtin_convertvector((v + kNoFraction) - kNoFraction, Ints);
}

// The lowest byte of each number.
inline void store_bytes(int8_t *to, Ints v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128(reinterpret_cast<__m256i>(v));
  const __m128i shorts = _mm_packs_epi32(low, _mm256_extracti128_si256(reinterpret_cast<__m256i>(v), 1));
  _mm_storel_epi64(reinterpret_cast<__m128i *>(to), _mm_packs_epi16(shorts, shorts));
#else
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(to, &bytes, sizeof(bytes));
#endif
}

// What `join` makes of the vector's quarters (or of what a narrower one has).
template <typename Quarter, typename Vector, typename Join>
inline Quarter fold(Vector v, const Join &join) {
  Quarter parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof(v));
  for (int i = 1; i < kLanes / 4; ++i) parts[0] = join(parts[0], parts[i]);
  return parts[0];
}

inline Four fold(Lanes v) {
  return fold<Four>(v, [](Four a, Four b) { return a + b; });
}

// Quarter i of the result has the sums of the four vectors' quarters i.
inline Lanes quarters(Lanes a, Lanes b, Lanes c, Lanes d) {
#if defined(__AVX512F__)
  const Lanes ab = reinterpret_cast<Lanes>(_mm512_unpacklo_ps(a, b)) + reinterpret_cast<Lanes>(_mm512_unpackhi_ps(a, b));
  const Lanes cd = reinterpret_cast<Lanes>(_mm512_unpacklo_ps(c, d)) + reinterpret_cast<Lanes>(_mm512_unpackhi_ps(c, d));
  const auto p = reinterpret_cast<__m512d>(ab), q = reinterpret_cast<__m512d>(cd);
  return reinterpret_cast<Lanes>(_mm512_unpacklo_pd(p, q)) + reinterpret_cast<Lanes>(_mm512_unpackhi_pd(p, q));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d)));
#elif defined(__aarch64__)
  return reinterpret_cast<Lanes>(vpaddq_f32(vpaddq_f32(reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)),
                                            vpaddq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(d))));
#else
  const auto sum = [](Lanes v) { return (v[0] + v[1]) + (v[2] + v[3]); };
  return Lanes{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// The sums of four vectors, as one.
inline Four sums(Lanes a, Lanes b, Lanes c, Lanes d) { return fold(quarters(a, b, c, d)); }

// Quarter i of the result is the sum of the quarters of v[i]: what quarters() began, for as many vectors as one has lanes.
inline Lanes folds(const Lanes *v) {
#if defined(__AVX512F__)
  const Lanes ab = reinterpret_cast<Lanes>(_mm512_shuffle_f32x4(v[0], v[1], 0x88)) +
                   reinterpret_cast<Lanes>(_mm512_shuffle_f32x4(v[0], v[1], 0xdd));
  const Lanes cd = reinterpret_cast<Lanes>(_mm512_shuffle_f32x4(v[2], v[3], 0x88)) +
                   reinterpret_cast<Lanes>(_mm512_shuffle_f32x4(v[2], v[3], 0xdd));
  return reinterpret_cast<Lanes>(_mm512_shuffle_f32x4(ab, cd, 0x88)) +
         reinterpret_cast<Lanes>(_mm512_shuffle_f32x4(ab, cd, 0xdd));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_permute2f128_ps(v[0], v[1], 0x20)) +
         reinterpret_cast<Lanes>(_mm256_permute2f128_ps(v[0], v[1], 0x31));
#else
  return v[0];
#endif
}

inline float sum(Lanes v) {
  const Four f = fold(v);
  return (f[0] + f[1]) + (f[2] + f[3]);
}

inline int32_t sum(Ints v) {
  const auto f = fold<FourInts>(v, [](FourInts a, FourInts b) { return a + b; });
  return (f[0] + f[1]) + (f[2] + f[3]);
}

inline float largest(Lanes v) {
  const auto f = fold<Four>(v, [](Four a, Four b) { return a > b ? a : b; });
  const float low = f[0] > f[1] ? f[0] : f[1], high = f[2] > f[3] ? f[2] : f[3];
  return low > high ? low : high;
}

// 2^x for x <= 0 to 2e-7 relative, and 0 below the smallest normal number: 2^n * 2^f with |f| <= 1/2.
inline Lanes exp2_of_negative(Lanes x) {
  const Lanes bounded = larger(all(-126.f), x);  // in this order NaN stays NaN
  const Ints n = __builtin_convertvector(bounded - 0.5f, Ints);  // towards zero: the nearest number, as x <= 0
  const Lanes power = exp_near_zero((bounded - __builtin_convertvector(n, Lanes)) * 0.693147181f);
  const Lanes scaled = power * reinterpret_cast<Lanes>((n + 127) << 23);
  return x < -126.f ? Lanes{} : scaled;
}

inline float exp2_of_negative(float x) { return exp2_of_negative(all(x))[0]; }

// Four bytes, in every lane.
inline Words all_words(const int8_t *bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word - Words{};
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// Bytes of `a`, without sign, times those of `b`: the sum of each two neighbours, which must fit 16 bits.
inline Shorts products_of_pairs(Words a, Words b) {
  return reinterpret_cast<Shorts>(_mm512_maddubs_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline Ints sums_of_pairs(Shorts v) {
  return reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(v), _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__)
inline Shorts products_of_pairs(Words a, Words b) {
  return reinterpret_cast<Shorts>(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
inline Ints sums_of_pairs(Shorts v) {
  return reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(v), _mm256_set1_epi16(1)));
}
#endif

// total + the four products of bytes of `a` and `b` in every lane.
#if defined(__AVX512VNNI__)
inline Ints add_products_of_fours(Ints total, Words a, Words b) {
  return reinterpret_cast<Ints>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
inline Ints add_products_of_fours(Ints total, Words a, Words b) {
  return reinterpret_cast<Ints>(
      vdotq_s32(reinterpret_cast<int32x4_t>(total), reinterpret_cast<int8x16_t>(a), reinterpret_cast<int8x16_t>(b)));
}
#endif

}  // namespace lanes
}  // namespace native
