// Dot products of many tokens with a panel of packed rows, by tiles: 16 tokens meet 16 rows in one instruction.
//
// Bytes give the very numbers that block_dot.h gives: sums of their products are exact, and are scaled and added in the
// same order. Sums of bfloat16 numbers are added in the unit's own order.
#pragma once

#include "block_dot.h"
#include "tile.h"

namespace native {

constexpr int64_t kTileTokens = 16;

// Whether as many tokens meet a weight in tiles: at fewer the weight's way from memory takes longer than any arithmetic.
constexpr bool fit_tiles(Format format) {
  return NATIVE_TILES && (format == Format::kBf16 ? NATIVE_BFLOAT_DOTS : format != Format::kF32 && NATIVE_BYTE_DOTS);
}
inline bool meet_in_tiles(Format format, int64_t count) { return fit_tiles(format) && count >= kTileTokens && tiles::used(); }

#if NATIVE_TILES && NATIVE_BYTE_DOTS

static_assert(kPanelRows == tiles::kRows && kTileTokens == tiles::kRows, "a panel is as wide as a tile");

struct alignas(tiles::kRowBytes) TileRow {
  uint8_t bytes[tiles::kRowBytes];
};

// The codes of a panel, a byte each: for every word of a row, those of 16 rows.
template <Format F>
inline void unpack_codes(const uint8_t *panel, int64_t blocks, TileRow *to) {
  constexpr int words = layout_of(F).words;
  typedef uint32_t PanelWords __attribute__((vector_size(tiles::kRowBytes)));
  constexpr uint32_t kNibbles = 0x0f0f0f0fu;
  for (int64_t b = 0; b < blocks; ++b, panel += layout_of(F).bytes * kPanelRows, to += kBlockWords) {
    fetch_ahead(panel, layout_of(F).bytes);
    for (int w = 0; w < words; ++w) {
      PanelWords packed;
      std::memcpy(&packed, panel + tiles::kRowBytes * w, sizeof(packed));
      const PanelWords low = F == Format::kQ8 ? packed : packed & kNibbles, high = packed >> 4 & kNibbles;
      std::memcpy(to + w, &low, sizeof(low));
      if constexpr (F != Format::kQ8) std::memcpy(to + words + w, &high, sizeof(high));
    }
  }
}

// Blocks whose products are under way together: the unit gives one after 52 cycles, and another every 16.
constexpr int kBlocksUnderWay = 4;

// products[i] = codes of 16 tokens times those of block i of a panel, for `count` blocks.
template <int i = 0>
inline void block_products(int count, const int8_t *tokens, int64_t columns, const TileRow *codes,
                           int32_t (*products)[tiles::kRows][kPanelRows]) {
  if constexpr (i < kBlocksUnderWay) {
    if (i == count) return;
    tiles::zero<i>();
    tiles::load<4 + i % 2>(tokens + i * kBlockColumns, columns);
    tiles::load<6 + i % 2>(codes + i * kBlockWords, sizeof(TileRow));
    tiles::add_byte_products<i, 4 + i % 2, 6 + i % 2>();
    block_products<i + 1>(count, tokens, columns, codes, products);
    tiles::store<i>(products[i], sizeof(products[i][0]));
  }
}

// out[m][r] = token m . row r of the panel, for 16 tokens; `stride` floats from token to token.
template <Format F>
inline void byte_tiles(const uint8_t *panel, const TileRow *codes, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  using namespace lanes;
  constexpr BlockLayout layout = layout_of(F);
  const int64_t blocks = x.columns / kBlockColumns;
  const Tokens::Block *of_token = x.blocks + first_token * blocks;
  alignas(tiles::kRowBytes) int32_t products[kBlocksUnderWay][kTileTokens][kPanelRows];
  Lanes sums[kSlices][kTileTokens] = {};
  for (int64_t first = 0; first < blocks; first += kBlocksUnderWay) {
    const int here = static_cast<int>(std::min<int64_t>(kBlocksUnderWay, blocks - first));
    block_products(here, x.codes + first_token * x.columns + first * kBlockColumns, x.columns, codes + first * kBlockWords, products);
    for (int i = 0; i < here; ++i, panel += layout.bytes * kPanelRows) {
      for (int s = 0; s < kSlices; ++s) {
        const Scales<F> scales(panel, s);
        for (int m = 0; m < kTileTokens; ++m) {
          const Tokens::Block &token = of_token[m * blocks + first + i];
          const Ints dots = read<Ints>(products[i][m] + s * kLanes) + token.start;
          scales.add(__builtin_convertvector(dots, Lanes), token.scale, token.sum, sums[s][m]);
        }
      }
    }
  }
  for (int s = 0; s < kSlices; ++s)
    for (int m = 0; m < kTileTokens; ++m) store(out + m * stride + s * kLanes, sums[s][m]);
}

constexpr int kTokenTiles = 4;  // that meet a weight's tile while it is loaded

// The same of bfloat16 numbers, for 16 * N tokens.
template <int N>
inline void bfloat_tiles(const uint8_t *panel, const uint16_t *tokens, int64_t columns, float *out, int64_t stride) {
  constexpr int kBlockBytes = layout_of(Format::kBf16).bytes * kPanelRows;
  const auto each = [](const auto &use) {
    use(std::integral_constant<int, 0>());
    if constexpr (N > 1) use(std::integral_constant<int, 1>());
    if constexpr (N > 2) use(std::integral_constant<int, 2>());
    if constexpr (N > 3) use(std::integral_constant<int, 3>());
  };
  each([](auto i) { tiles::zero<i>(); });
  for (int64_t k = 0; k < columns; k += kBlockColumns, panel += kBlockBytes) {
    fetch_ahead(panel, layout_of(Format::kBf16).bytes);
    tiles::load<6>(panel, tiles::kRowBytes);
    each([&](auto i) {
      tiles::load<4 + i % 2>(tokens + i * kTileTokens * columns + k, columns * static_cast<int64_t>(sizeof(uint16_t)));
      tiles::add_bfloat_products<i, 4 + i % 2, 6>();
    });
  }
  each([&](auto i) { tiles::store<i>(out + i * kTileTokens * stride, stride * static_cast<int64_t>(sizeof(float))); });
}

// The same for `count` tokens rounded up to a multiple of 16, all of which x has room for.
template <Format F>
inline void tile_dots(int64_t count, const uint8_t *panel, const Tokens &x, int64_t first_token, float *out, int64_t stride) {
  if constexpr (F == Format::kBf16) {
    const tiles::Session session(layout_of(F).bytes);
    for (int64_t t = 0; t < count; t += kTokenTiles * kTileTokens) {
      const uint16_t *tokens = x.bfloats + (first_token + t) * x.columns;
      const auto multiply = [&](auto n) { bfloat_tiles<n>(panel, tokens, x.columns, out + t * stride, stride); };
      switch (std::min<int64_t>(kTokenTiles, (count - t + kTileTokens - 1) / kTileTokens)) {
        case 1: multiply(std::integral_constant<int, 1>()); break;
        case 2: multiply(std::integral_constant<int, 2>()); break;
        case 3: multiply(std::integral_constant<int, 3>()); break;
        default: multiply(std::integral_constant<int, 4>());
      }
    }
  } else {
    thread_local std::vector<TileRow> memory;
    const int64_t blocks = x.columns / kBlockColumns;
    TileRow *codes = room(memory, blocks * kBlockWords);
    unpack_codes<F>(panel, blocks, codes);
    const tiles::Session session(kBlockColumns);
    for (int64_t t = 0; t < count; t += kTileTokens) byte_tiles<F>(panel, codes, x, first_token + t, out + t * stride, stride);
  }
}

#endif

}  // namespace native
