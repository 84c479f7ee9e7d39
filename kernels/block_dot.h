// Dot products of a few tokens with one panel of 16 packed rows: the inner loops of every linear layer but float32's.
//
// Codes of 4 and 8 bits meet tokens that are quantised too where the CPU multiplies bytes (AVX-512 VNNI): to 8 bits with a
// scale for each 32 numbers, or to 16 in two parts where that shows, in the head. bfloat16 meets tokens rounded to bfloat16
// where the CPU multiplies those. Elsewhere (AVX2, NEON) a block is unpacked to float32 for every few tokens, in loops that
// compilers turn into vector code; there tokens stay float32.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define NATIVE_BYTE_DOTS 1
#else
#define NATIVE_BYTE_DOTS 0
#endif
#if defined(__AVX512BF16__)
#define NATIVE_BFLOAT_DOTS 1
#else
#define NATIVE_BFLOAT_DOTS 0
#endif

#include "packed_weight.h"

namespace native {

#if defined(__AVX512F__)
constexpr int kTokensAtOnce = 16;  // their sums and a block of weights fill the 32 registers
#else
constexpr int kTokensAtOnce = 4;
#endif

constexpr float kRestSteps = 254.f;  // of a rest in one code's: a rest is half a code at most, and 127

typedef float PanelSums __attribute__((vector_size(kPanelRows * sizeof(float))));

// The tokens of a step as one format's dot products want them.
struct Tokens {
  // What 32 numbers of a token have in common: numbers are scale * code.
  struct Block {
    float scale;
    float sum;           // of the numbers that the codes stand for
    int32_t start;       // minus the weight's offset times the sum of the codes: where integer sums begin
    int32_t rest_start;  // the same of the rests
  };
  int64_t columns = 0;
  const float *floats = nullptr;                   // [T, K]
  const uint16_t *bfloats = nullptr;               // [T, K]
  const int8_t *codes = nullptr;                   // [T, K]
  const int8_t *rests = nullptr;                   // [T, K] what the codes leave, in steps of scale / kRestSteps; or not kept
  const Block *blocks = nullptr;                   // [T, K / 32]
};

#if NATIVE_BYTE_DOTS

// 32 numbers as codes and, if there is room for them, as what those leave.
inline void quantise_block(const float *x, int offset, int8_t *codes, int8_t *rests, Tokens::Block &block) {
  const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
  const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? 127.f / largest : 0.f);  // finite: the rest is 0
  const __m512 least = _mm512_set1_ps(-127.f), most = _mm512_set1_ps(127.f);
  const auto code = [&](__m512 numbers) {  // in range also for what is no number
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(numbers, least), most));
  };
  const auto store = [](__m512i first, __m512i second, int8_t *to) {  // and their sum
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtsepi32_epi8(first));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 16), _mm512_cvtsepi32_epi8(second));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
  };
  const __m512 low_steps = _mm512_mul_ps(low, inverse), high_steps = _mm512_mul_ps(high, inverse);
  const __m512i first = code(low_steps), second = code(high_steps);
  const int32_t sum = store(first, second, codes);
  int32_t rest_sum = 0;
  if (rests) {
    const auto rest = [&](__m512 steps, __m512i codes_of_them) {
      return code(_mm512_mul_ps(_mm512_sub_ps(steps, _mm512_cvtepi32_ps(codes_of_them)), _mm512_set1_ps(kRestSteps)));
    };
    rest_sum = store(rest(low_steps, first), rest(high_steps, second), rests);
  }
  // NaN and infinity have no code: they reach the result through the scale
  block.scale = largest / 127.f + 0.f * _mm512_reduce_add_ps(_mm512_add_ps(low, high));
  block.sum = block.scale * (static_cast<float>(sum) + static_cast<float>(rest_sum) / kRestSteps);
  block.start = -offset * sum;
  block.rest_start = -offset * rest_sum;
}

constexpr int kBlocksAhead = 12;  // of a panel that memory is asked for: the best of 8 to 32 where it was measured

// Asks for a block some way ahead, while this one's arithmetic goes on: the CPU alone does not ask early enough.
inline void fetch_ahead(const uint8_t *block, int bytes) {
  const uint8_t *next = block + kBlocksAhead * bytes * kPanelRows;
  for (int i = 0; i < bytes * kPanelRows; i += 64) __builtin_prefetch(next + i, 0, 2);
}

template <Format F, int M, bool kRests>
inline void byte_dots(const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  constexpr BlockLayout layout = layout_of(F);
  const int64_t blocks = x.columns / kBlockColumns;
  const int8_t *codes = x.codes + first_token * x.columns, *rests = kRests ? x.rests + first_token * x.columns : nullptr;
  const Tokens::Block *of_token = x.blocks + first_token * blocks;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 sums[M];
  for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, panel += layout.bytes * kPanelRows) {
    fetch_ahead(panel, layout.bytes);
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
      const int64_t at = m * x.columns + b * kBlockColumns;
      const Tokens::Block &token = of_token[m * blocks + b];
      const auto dot = [&](const int8_t *code, int32_t start) {
        __m512i total = _mm512_set1_epi32(offset_of(F) > 0 ? start : 0);
        for (int w = 0; w < 8; ++w) {
          int32_t word;
          std::memcpy(&word, code + 4 * w, sizeof(word));
          total = _mm512_dpbusd_epi32(total, weight[w], _mm512_set1_epi32(word));
        }
        return _mm512_cvtepi32_ps(total);
      };
      __m512 steps = dot(codes + at, token.start);
      if constexpr (kRests) steps = _mm512_fmadd_ps(dot(rests + at, token.rest_start), _mm512_set1_ps(1.f / kRestSteps), steps);
      sums[m] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(token.scale)), steps, sums[m]);
      if constexpr (F == Format::kQ4_1) sums[m] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(token.sum), sums[m]);
    }
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + m * stride, sums[m]);
}

#endif

#if NATIVE_BFLOAT_DOTS

template <int M>
inline void bfloat_dots(const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  const uint16_t *tokens = x.bfloats + first_token * x.columns;
  __m512 sums[M];
  for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < x.columns; k += 2, panel += 64) {
    __builtin_prefetch(panel + kBlocksAhead * layout_of(Format::kBf16).bytes * kPanelRows, 0, 2);
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
#if NATIVE_BYTE_DOTS
  if constexpr (F != Format::kBf16)
    return x.rests ? byte_dots<F, M, true>(panel, x, first_token, out, stride) : byte_dots<F, M, false>(panel, x, first_token, out, stride);
#endif
#if NATIVE_BFLOAT_DOTS
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
