// Sums of products of bytes: codes of a weight, in as many rows as a vector has lanes, with those of a token.
//
// CPUs differ in how they multiply bytes. Four products at a time into 32 bits (AVX-512 VNNI, NEON's dot product) is what
// one wants. Without VNNI, x86 adds two products in 16 bits, which only codes of four bits are small enough for: those of 8
// bits are taken as two of four. A block's products with all tokens are then worked out side by side, so that a vector of
// codes is unpacked once and a word of a token fetched once for all.
#pragma once

#include "lanes.h"
#include "packed_weight.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define NATIVE_BYTE_DOTS 1
#define NATIVE_BYTE_PAIRS 0
#elif (defined(__AVX512F__) && defined(__AVX512BW__)) || (defined(__AVX2__) && !defined(__AVX512F__))
#define NATIVE_BYTE_DOTS 1
#define NATIVE_BYTE_PAIRS 1
#elif defined(__ARM_FEATURE_DOTPROD)
#define NATIVE_BYTE_DOTS 1
#define NATIVE_BYTE_PAIRS 0
#else
#define NATIVE_BYTE_DOTS 0
#define NATIVE_BYTE_PAIRS 0
#endif

namespace native {

constexpr int kSlices = kPanelRows / lanes::kLanes;  // of a panel, each as wide as a vector

#if NATIVE_BYTE_DOTS

constexpr int kBlockWords = kBlockColumns / 4;

// NEON takes both sides' bytes as signed.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr uint32_t kSigns = 0x80808080u;
#else
constexpr uint32_t kSigns = 0;
#endif

// The code that stands for 0, as products take codes.
constexpr int zero_of(Format format) { return format == Format::kQ8 && kSigns != 0 ? 0 : offset_of(format); }

constexpr uint32_t kNibbles = 0x0f0f0f0fu;

#if NATIVE_BYTE_PAIRS

// sums[s][m] = the sum over a block's columns of code times token m, in the rows of slice s; tokens are `stride` apart.
template <Format F, int M>
inline void multiply_block(const uint8_t *block, const int8_t *tokens, int64_t stride, lanes::Ints (&sums)[kSlices][M]) {
  using namespace lanes;
  constexpr int words = layout_of(F).words;
  Shorts pairs[kSlices][M] = {};  // 8 times two products of at most 15 * 127 fit
  const auto add_half = [&](int shift, const int8_t *of_half) {
#pragma GCC unroll 1  // GCC would add in another order, for which the registers do not suffice
    for (int w = 0; w < words; ++w) {
      Words codes[kSlices];
      for (int s = 0; s < kSlices; ++s) codes[s] = read<Words>(block + 4 * (kPanelRows * w + kLanes * s)) >> shift & kNibbles;
      for (int m = 0; m < M; ++m) {
        const Words token = all_words(of_half + m * stride + 4 * w);
        for (int s = 0; s < kSlices; ++s) pairs[s][m] += products_of_pairs(codes[s], token);
      }
    }
  };
  const auto each = [&](const auto &take) {
    for (int s = 0; s < kSlices; ++s)
      for (int m = 0; m < M; ++m) take(sums[s][m], pairs[s][m]);
  };
  if constexpr (F == Format::kQ8) {  // both halves of a code meet the same number
    add_half(4, tokens);
    each([](Ints &sum, Shorts &upper) {
      sum = sums_of_pairs(upper) << 4;
      upper = Shorts{};
    });
    add_half(0, tokens);
    each([](Ints &sum, Shorts lower) { sum += sums_of_pairs(lower); });
  } else {
    add_half(0, tokens);
    add_half(4, tokens + 4 * words);
    each([](Ints &sum, Shorts all) { sum = sums_of_pairs(all); });
  }
}

#else

// One block of kLanes rows: word w has columns 4w ... 4w + 3 of every row.
struct Codes {
  lanes::Words words[kBlockWords];
};

// The codes of kLanes rows of a block whose words of them begin at `from`; a panel's words are 16 rows apart.
template <Format F>
inline Codes read_codes(const uint8_t *from) {
  constexpr int words = layout_of(F).words;
  Codes codes;
  for (int w = 0; w < words; ++w) {
    const auto packed = lanes::read<lanes::Words>(from + 4 * kPanelRows * w);
    if constexpr (F == Format::kQ8) {
      codes.words[w] = packed ^ kSigns;
    } else {
      codes.words[w] = packed & kNibbles;
      codes.words[words + w] = packed >> 4 & kNibbles;
    }
  }
  return codes;
}

// start + the sum over a block's columns of code times token, in every row.
inline lanes::Ints dot(const Codes &codes, const int8_t *token, lanes::Ints start) {
  for (int w = 0; w < kBlockWords; ++w)
    start = lanes::add_products_of_fours(start, codes.words[w], lanes::all_words(token + 4 * w));
  return start;
}

#endif

#endif

}  // namespace native
