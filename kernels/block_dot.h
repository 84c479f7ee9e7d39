// Dot products of a few tokens with one panel of 16 packed rows: the inner loops of every linear layer but float32's.
//
// Codes of 4 and 8 bits meet tokens that are quantised too where the CPU multiplies bytes: to 8 bits with a scale for each
// 32 numbers, or to 16 in two parts where that shows, at the best logits. bfloat16 meets tokens rounded to bfloat16 where the CPU
// multiplies those (AVX-512 BF16), and elsewhere tokens as they are. A CPU that does not multiply bytes unpacks a block of
// codes to float32 for every few tokens.
#pragma once

#include "byte_dot.h"
#include "lanes.h"
#include "packed_weight.h"

#if defined(__AVX512BF16__)
#define NATIVE_BFLOAT_DOTS 1
#else
#define NATIVE_BFLOAT_DOTS 0
#endif

namespace native {

// Tokens whose sums fill the registers beside a slice of a block (AVX-512), or that pay for unpacking it.
constexpr int tokens_at_once([[maybe_unused]] Format format) {
#if NATIVE_BYTE_PAIRS
  if (format != Format::kBf16) return lanes::kLanes / 2;  // each has a sum of pairs in every slice beside them
#endif
#if defined(__AVX512F__)
  return 16;
#else
  return NATIVE_BYTE_DOTS && format != Format::kBf16 ? 8 : 4;
#endif
}

constexpr float kRestSteps = 254.f;  // a code's, in steps of a rest: a rest is half a code at most, which makes 127

// The tokens of a step as one format's dot products want them.
struct Tokens {
  // What 32 numbers of a token have in common: numbers are scale * code.
  struct Block {
    float scale;
    float sum;           // of the numbers that the codes stand for
    float rest_sum;      // of what those leave
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

constexpr int kBlocksAhead = 12;  // prefetch distance: the best of 8 to 32 where it was measured

// Asks for a block some way ahead, while this one's arithmetic goes on: the CPU alone does not ask early enough.
inline void fetch_ahead(const uint8_t *block, int bytes) {
  const uint8_t *next = block + kBlocksAhead * bytes * kPanelRows;
  for (int i = 0; i < bytes * kPanelRows; i += 64) __builtin_prefetch(next + i, 0, 2);
}

#if NATIVE_BYTE_DOTS

// 32 numbers as codes and, if there is room for them, as what those leave. `zero` is what zero_of() says of the weight.
inline void quantise_block(const float *x, int zero, int8_t *codes, int8_t *rests, Tokens::Block &block) {
  using namespace lanes;
  constexpr int kParts = kBlockColumns / kLanes;
  Lanes numbers[kParts], most = {}, total = {};
  for (int i = 0; i < kParts; ++i) {
    numbers[i] = load(x + i * kLanes);
    most = larger(larger(numbers[i], -numbers[i]), most);
    total += numbers[i];
  }
  const float largest = lanes::largest(most);
  const Lanes inverse = all(largest > 1e-30f ? 127.f / largest : 0.f);  // finite: the rest is 0
  const auto code = [](Lanes steps) { return nearest(smaller(larger(steps, all(-127.f)), all(127.f))); };  // NaN: -127
  Ints sums = {}, rest_sums = {};
  for (int i = 0; i < kParts; ++i) {
    const Lanes steps = numbers[i] * inverse;
    const Ints whole = code(steps);
    store_bytes(codes + i * kLanes, whole);
    sums += whole;
    if (rests) {
      const Ints rest = code((steps - __builtin_convertvector(whole, Lanes)) * kRestSteps);
      store_bytes(rests + i * kLanes, rest);
      rest_sums += rest;
    }
  }
  const int32_t sum = lanes::sum(sums), rest_sum = lanes::sum(rest_sums);
  // NaN and infinity have no code: they reach the result through the scale
  block.scale = largest / 127.f + 0.f * lanes::sum(total);
  block.sum = block.scale * static_cast<float>(sum);
  block.rest_sum = block.scale * static_cast<float>(rest_sum) / kRestSteps;
  block.start = -zero * sum;
  block.rest_start = -zero * rest_sum;
}

// What a block's numbers are, of the rows of slice s of a panel: scale * code + minimum.
template <Format F>
struct Scales {
  lanes::Lanes scale, minimum;

  Scales(const uint8_t *block, int s) {
    constexpr BlockLayout layout = layout_of(F);
    const auto *halves = reinterpret_cast<const Half *>(block + 4 * kPanelRows * layout.words) + s * lanes::kLanes;
    scale = lanes::load(halves);
    minimum = layout.halves > 1 ? lanes::load(halves + kPanelRows) : lanes::Lanes{};
  }

  // Adds the block's products with a token to `sum`: `dots` of their codes, and what `token_sum` its numbers add up to.
  void add(lanes::Lanes dots, float token_scale, float token_sum, lanes::Lanes &sum) const {
    sum += scale * token_scale * dots;
    if constexpr (F == Format::kQ4_1) sum += minimum * token_sum;
  }
};

// Adds a block's products with M tokens, whose numbers in that block begin at `codes` and `rests`, to their sums.
template <Format F, int M, bool kRests>
inline void add_block(const uint8_t *block, const int8_t *codes, const int8_t *rests, int64_t columns, const Tokens::Block *of_token,
                      lanes::Lanes (&sums)[kSlices][M]) {
  using namespace lanes;
  const int64_t blocks = columns / kBlockColumns;
#if NATIVE_BYTE_PAIRS
  Ints dots[kSlices][M], rest_dots[kSlices][M];
  multiply_block<F, M>(block, codes, columns, dots);
  if constexpr (kRests) multiply_block<F, M>(block, rests, columns, rest_dots);
#endif
  for (int s = 0; s < kSlices; ++s) {
    const Scales<F> scales(block, s);
#if NATIVE_BYTE_PAIRS
    const auto whole = [&](int m, int32_t start) { return dots[s][m] + start; };
    const auto rest = [&](int m, int32_t start) { return rest_dots[s][m] + start; };
#else
    const Codes slice = read_codes<F>(block + 4 * kLanes * s);
    const auto whole = [&](int m, int32_t start) { return dot(slice, codes + m * columns, start - Ints{}); };
    const auto rest = [&](int m, int32_t start) { return dot(slice, rests + m * columns, start - Ints{}); };
#endif
    for (int m = 0; m < M; ++m) {
      const Tokens::Block &token = of_token[m * blocks];
      Lanes steps = __builtin_convertvector(whole(m, token.start), Lanes);
      if constexpr (kRests) steps += __builtin_convertvector(rest(m, token.rest_start), Lanes) * (1.f / kRestSteps);
      scales.add(steps, token.scale, kRests ? token.sum + token.rest_sum : token.sum, sums[s][m]);
    }
  }
}

template <Format F, int M, bool kRests>
inline void byte_dots(const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  using namespace lanes;
  constexpr BlockLayout layout = layout_of(F);
  const int64_t blocks = x.columns / kBlockColumns;
  const int8_t *codes = x.codes + first_token * x.columns, *rests = kRests ? x.rests + first_token * x.columns : nullptr;
  const Tokens::Block *of_token = x.blocks + first_token * blocks;
  Lanes sums[kSlices][M] = {};
  for (int64_t b = 0; b < blocks; ++b, panel += layout.bytes * kPanelRows) {
    fetch_ahead(panel, layout.bytes);
    const int64_t at = b * kBlockColumns;
    add_block<F, M, kRests>(panel, codes + at, kRests ? rests + at : nullptr, x.columns, of_token + b, sums);
  }
  for (int s = 0; s < kSlices; ++s)
    for (int m = 0; m < M; ++m) store(out + m * stride + s * kLanes, sums[s][m]);
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

#else

// The upper halves of float32 numbers, times tokens of float32.
template <int M>
inline void bfloat_dots(const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  using namespace lanes;
  const float *tokens = x.floats + first_token * x.columns;
  Lanes sums[kSlices][M] = {};
  for (int64_t k = 0; k < x.columns; k += 2, panel += 4 * kPanelRows) {
    __builtin_prefetch(panel + kBlocksAhead * layout_of(Format::kBf16).bytes * kPanelRows, 0, 2);
    Lanes even[kSlices], odd[kSlices];
    for (int s = 0; s < kSlices; ++s) {
      const auto pairs = read<Words>(panel + 4 * kLanes * s);
      even[s] = reinterpret_cast<Lanes>(pairs << 16);
      odd[s] = reinterpret_cast<Lanes>(pairs & 0xffff0000u);
    }
    for (int m = 0; m < M; ++m) {
      const Lanes first = all(tokens[m * x.columns + k]), second = all(tokens[m * x.columns + k + 1]);
      for (int s = 0; s < kSlices; ++s) sums[s][m] += even[s] * first;
      for (int s = 0; s < kSlices; ++s) sums[s][m] += odd[s] * second;
    }
  }
  for (int s = 0; s < kSlices; ++s)
    for (int m = 0; m < M; ++m) store(out + m * stride + s * kLanes, sums[s][m]);
}

#endif

#if !NATIVE_BYTE_DOTS

typedef float PanelSums __attribute__((vector_size(kPanelRows * sizeof(float))));

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

#endif

// out[m][r] = token m . row r of the panel, for M tokens and 16 rows; `stride` floats from token to token.
template <Format F, int M>
inline void panel_dots(const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  if constexpr (F == Format::kBf16) {
    bfloat_dots<M>(panel, x, first_token, out, stride);
  } else {
#if NATIVE_BYTE_DOTS
    x.rests ? byte_dots<F, M, true>(panel, x, first_token, out, stride) : byte_dots<F, M, false>(panel, x, first_token, out, stride);
#else
    float_dots<F, M>(panel, x, first_token, out, stride);
#endif
  }
}

// The same for `count` tokens, 1 ... tokens_at_once(F).
template <Format F, int M = tokens_at_once(F)>
inline void panel_dots_of(int count, const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  if constexpr (M > 1) {
    if (count < M) return panel_dots_of<F, M - 1>(count, panel, x, first_token, out, stride);
  }
  panel_dots<F, M>(panel, x, first_token, out, stride);
}

}  // namespace native
