// Sums of products of bytes: codes of a weight, in as many rows as a vector has lanes, with those of a token.
//
// CPUs differ in how they multiply bytes. Four products at a time into 32 bits (AVX-512 VNNI, NEON's dot product) is what
// one wants. Without VNNI, x86 adds two products in 16 bits, which only codes of four bits are small enough for: those of 8
// bits are taken as two of four.
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
#endif

#if NATIVE_BYTE_DOTS

namespace native {

constexpr int kBlockWords = kBlockColumns / 4;

// One block of kLanes rows: word w has columns 4w ... 4w + 3 of every row. Where products come in pairs, codes of 8 bits
// are their lower halves, then their upper ones.
template <Format F>
struct Codes {
  static constexpr bool kHalved = NATIVE_BYTE_PAIRS && F == Format::kQ8;
  lanes::Words words[(kHalved ? 2 : 1) * kBlockWords];
};

// NEON takes both sides' bytes as signed.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr uint32_t kSigns = 0x80808080u;
#else
constexpr uint32_t kSigns = 0;
#endif

// The code that stands for 0, as add_products() takes codes.
constexpr int zero_of(Format format) { return format == Format::kQ8 && kSigns != 0 ? 0 : offset_of(format); }

// The codes of kLanes rows of a block whose words of them begin at `from`; a panel's words are 16 rows apart.
template <Format F>
inline Codes<F> read_codes(const uint8_t *from) {
  constexpr uint32_t kNibbles = 0x0f0f0f0fu;
  constexpr int words = layout_of(F).words;
  Codes<F> codes;
  for (int w = 0; w < words; ++w) {
    const auto packed = lanes::read<lanes::Words>(from + 4 * kPanelRows * w);
    if constexpr (F == Format::kQ8 && !Codes<F>::kHalved) {
      codes.words[w] = packed ^ kSigns;
    } else {
      codes.words[w] = packed & kNibbles;
      codes.words[words + w] = packed >> 4 & kNibbles;
    }
  }
  return codes;
}

// start + the sum over a block's columns of code times token, in every row.
inline lanes::Ints add_products(const lanes::Words *codes, const int8_t *token, lanes::Ints start) {
  using namespace lanes;
#if NATIVE_BYTE_PAIRS
  Shorts pairs = {};  // 8 times two products of at most 15 * 127 fit
  for (int w = 0; w < kBlockWords; ++w) pairs += products_of_pairs(codes[w], all_words(token + 4 * w));
  return start + sums_of_pairs(pairs);
#else
  for (int w = 0; w < kBlockWords; ++w) start = add_products_of_fours(start, codes[w], all_words(token + 4 * w));
  return start;
#endif
}

template <Format F>
inline lanes::Ints dot(const Codes<F> &codes, const int8_t *token, lanes::Ints start) {
  if constexpr (Codes<F>::kHalved) start += add_products(codes.words + kBlockWords, token, lanes::Ints{}) << 4;
  return add_products(codes.words, token, start);
}

}  // namespace native

#endif
