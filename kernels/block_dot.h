// Dot products of a few tokens with one panel of 16 packed rows: the inner loops of every linear layer but float32's.
//
// Codes of 4 and 8 bits meet tokens that are quantised too, to 8 bits with a scale for each 32 numbers, where the CPU
// multiplies bytes (AVX-512 VNNI). bfloat16 meets tokens rounded to bfloat16 where the CPU multiplies those. Elsewhere
// (AVX2, NEON) a block is unpacked to float32 once for all tokens of the call, in loops that compilers turn into vector
// code; there tokens stay float32.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <vector>

#include "packed_weight.h"

namespace native {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr bool kByteDots = true;
#else
constexpr bool kByteDots = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool kBfloatDots = true;
#else
constexpr bool kBfloatDots = false;
#endif
#if defined(__AVX512F__)
constexpr int kTokensAtOnce = 16;  // their sums and a block of weights fill the 32 registers
#else
constexpr int kTokensAtOnce = 4;
#endif

typedef float PanelSums __attribute__((vector_size(kPanelRows * sizeof(float))));

// The tokens of a step as one format's dot products want them.
struct Tokens {
  // What 32 numbers of a token have in common: numbers are scale * code.
  struct Block {
    float scale;
    float sum;      // of the numbers that the codes stand for
    int32_t start;  // minus the weight's offset times the sum of the codes: where integer sums begin
  };
  int64_t columns = 0;
  const float *floats = nullptr;                   // [T, K]
  const uint16_t *bfloats = nullptr;               // [T, K]
  const int8_t *codes = nullptr;                   // [T, K]
  const Block *blocks = nullptr;                   // [T, K / 32]
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

inline void quantise_block(const float *x, int offset, int8_t *codes, Tokens::Block &block) {
  const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
  const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? 127.f / largest : 0.f);  // finite: the rest is 0
  const __m512 least = _mm512_set1_ps(-127.f), most = _mm512_set1_ps(127.f);
  const auto code = [&](__m512 numbers) {  // in range also for what is no number
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(numbers, inverse), least), most));
  };
  const __m512i first = code(low), second = code(high);
  _mm_storeu_si128(reinterpret_cast<__m128i *>(codes), _mm512_cvtsepi32_epi8(first));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + 16), _mm512_cvtsepi32_epi8(second));
  const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
  // NaN and infinity have no code: they reach the result through the scale
  block.scale = largest / 127.f + 0.f * _mm512_reduce_add_ps(_mm512_add_ps(low, high));
  block.sum = block.scale * static_cast<float>(sum);
  block.start = -offset * sum;
}

// Asks for the bytes of the next panel that lie as this block does, while this panel's arithmetic goes on.
inline void fetch_next(const uint8_t *block, int bytes, int64_t columns) {
  const uint8_t *next = block + columns / kBlockColumns * bytes * kPanelRows;
  for (int i = 0; i < bytes * kPanelRows; i += 64) __builtin_prefetch(next + i, 0, 2);
}

template <Format F, int M>
inline void byte_dots(const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  constexpr BlockLayout layout = layout_of(F);
  const int64_t blocks = x.columns / kBlockColumns;
  const int8_t *codes = x.codes + first_token * x.columns;
  const Tokens::Block *of_token = x.blocks + first_token * blocks;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 sums[M];
  for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, panel += layout.bytes * kPanelRows) {
    if constexpr (M >= 4) fetch_next(panel, layout.bytes, x.columns);
    __m512i weight[8];  // word w of every row: columns 4w ... 4w + 3
    for (int w = 0; w < layout.words; ++w) {
      const __m512i words = _mm512_loadu_si512(panel + 64 * w);
      if constexpr (F == Format::kQ8) {
        weight[w] = words;
      } else {
        weight[w] = _mm512_and_si512(words, nibble);
        weight[4 + w] = _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble);
      }
    }
    const uint8_t *halves = panel + 64 * layout.words;
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(halves)));
    __m512 minimum = _mm512_setzero_ps();
    if constexpr (F == Format::kQ4_1)
      minimum = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(halves + 32)));
    for (int m = 0; m < M; ++m) {
      const int8_t *code = codes + m * x.columns + b * kBlockColumns;
      const Tokens::Block &token = of_token[m * blocks + b];
      __m512i dot = _mm512_set1_epi32(offset_of(F) > 0 ? token.start : 0);
      for (int w = 0; w < 8; ++w) {
        int32_t word;
        std::memcpy(&word, code + 4 * w, sizeof(word));
        dot = _mm512_dpbusd_epi32(dot, weight[w], _mm512_set1_epi32(word));
      }
      sums[m] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(token.scale)), _mm512_cvtepi32_ps(dot), sums[m]);
      if constexpr (F == Format::kQ4_1) sums[m] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(token.sum), sums[m]);
    }
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + m * stride, sums[m]);
}

#endif

#if defined(__AVX512BF16__)

template <int M>
inline void bfloat_dots(const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  const uint16_t *tokens = x.bfloats + first_token * x.columns;
  __m512 sums[M];
  for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < x.columns; k += 2, panel += 64) {
    if (M >= 4) __builtin_prefetch(panel + x.columns * 2 * kPanelRows, 0, 2);  // of the next panel
    const __m512i weight = _mm512_loadu_si512(panel);
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, tokens + m * x.columns + k, sizeof(pair));
      sums[m] = _mm512_dpbf16_ps(sums[m], (__m512bh)weight, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + m * stride, sums[m]);
}

#endif

template <Format F, int M>
inline void float_dots(const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  alignas(64) float weight[kBlockColumns][kPanelRows];
  PanelSums sums[M] = {};
  for (int64_t b = 0; b < x.columns / kBlockColumns; ++b, panel += layout_of(F).bytes * kPanelRows) {
    for (int64_t r = 0; r < kPanelRows; ++r) unpack_row<F>(panel, kPanelRows, r, weight[0] + r, kPanelRows);
    const float *token = x.floats + first_token * x.columns + b * kBlockColumns;
    for (int k = 0; k < kBlockColumns; ++k) {
      PanelSums column;
      std::memcpy(&column, weight[k], sizeof(column));
      for (int m = 0; m < M; ++m) sums[m] += column * token[m * x.columns + k];
    }
  }
  for (int m = 0; m < M; ++m) std::memcpy(out + m * stride, &sums[m], sizeof(sums[m]));
}

// out[m][r] = token m . row r of the panel, for M tokens and 16 rows; `stride` floats from token to token.
template <Format F, int M>
inline void panel_dots(const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  if constexpr (F != Format::kBf16) return byte_dots<F, M>(panel, x, first_token, out, stride);
#endif
#if defined(__AVX512BF16__)
  if constexpr (F == Format::kBf16) return bfloat_dots<M>(panel, x, first_token, out, stride);
#endif
  return float_dots<F, M>(panel, x, first_token, out, stride);
}

// The same for `count` tokens, 1 ... kTokensAtOnce.
template <Format F, int M = kTokensAtOnce>
inline void panel_dots_of(int count, const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  if constexpr (M > 1) {
    if (count < M) return panel_dots_of<F, M - 1>(count, panel, x, first_token, out, stride);
  }
  panel_dots<F, M>(panel, x, first_token, out, stride);
}

}  // namespace native
