// Weights of linear layers as the operators read them, and how the bytes of each format lie.
//
// float32: a tensor [N, K], one row an output. Every other format: a uint8 tensor [N, bytes of K numbers], in panels of 16
// rows (the last one of what is left), each a sequence of blocks of 32 columns. A block of r rows is
//
//   format   bytes a row   block                                                    value of a number
//   bf16     64            16 words of every row                                    two of them in a word
//   q8       34            8 words of every row, then r scales                      scale * (code - 128)
//   q4_0     18            4 words of every row, then r scales                      scale * (code - 8)
//   q4_1     20            4 words of every row, then r scales, then r minima       scale * code + minimum
//
// where a word is 4 bytes of one row, words of neighbouring rows are neighbours, and scales and minima are float16. The
// bytes of a q4 word hold columns 4w ... 4w + 3 in their lower and 16 + 4w ... in their upper halves: the very bytes of a
// GGUF file's block, as are its scales and minima. So 16 rows fill a register and each word meets one word of a token.
#pragma once

#include "half.h"
#include "operator.h"
#include "vector_math.h"

namespace native {

enum class Format { kF32, kBf16, kQ8, kQ4_0, kQ4_1 };

constexpr int kPanelRows = 16;
constexpr int kBlockColumns = 32;

struct BlockLayout {
  int bytes;   // of one row
  int words;   // of one row; scales and minima follow
  int halves;  // scales and minima of one row
};

constexpr BlockLayout layout_of(Format format) {
  switch (format) {
    case Format::kBf16: return {64, 16, 0};
    case Format::kQ8: return {34, 8, 1};
    case Format::kQ4_0: return {18, 4, 1};
    case Format::kQ4_1: return {20, 4, 2};
    case Format::kF32: break;
  }
  return {128, 32, 0};
}

// One weight of `rows` outputs and `columns` inputs; its size was checked against both.
struct Weight {
  Format format;
  const uint8_t *data;
  int64_t rows, columns;

  int64_t blocks() const { return columns / kBlockColumns; }
  int64_t row_bytes() const { return format == Format::kF32 ? columns * 4 : blocks() * layout_of(format).bytes; }
  const float *floats(int64_t row) const { return reinterpret_cast<const float *>(data) + row * columns; }

  // A full panel is read where it lies; the last rows of a weight are laid out in `padded` with zeros beside them.
  const uint8_t *panel(int64_t first_row, std::vector<uint8_t> &padded) const {
    const uint8_t *from = data + first_row * row_bytes();
    const int64_t r = rows - first_row;
    if (r >= kPanelRows) return from;
    const BlockLayout layout = layout_of(format);
    padded.assign(static_cast<size_t>(row_bytes() * kPanelRows), 0);
    uint8_t *to = padded.data();
    const auto copy = [&](int pieces, int size) {
      for (int i = 0; i < pieces; ++i, from += r * size, to += kPanelRows * size) std::memcpy(to, from, r * size);
    };
    for (int64_t b = 0; b < blocks(); ++b) {
      copy(layout.words, 4);
      copy(layout.halves, 2);
    }
    return padded.data();
  }
};

// Argument i as a weight for tokens of `columns` numbers: the dtype and the bytes of a row say its format.
inline Weight read_weight(const Arguments &a, int i, int64_t columns) {
  Weight weight{Format::kF32, nullptr, a.rank(i) == 2 ? a.dim(i, 0) : 0, columns};
  require(columns > 0, "tokens have no numbers");
  if (a.is(i, "float32")) {
    weight.data = reinterpret_cast<const uint8_t *>(a.data<float>(i, "float32", 2));
    a.expect_dim(i, 1, columns);
    return weight;
  }
  weight.data = a.data<uint8_t>(i, "uint8", 2);
  require(columns % kBlockColumns == 0, [&] { return "packed weights need inputs in blocks of 32, not " + std::to_string(columns); });
  for (Format format : {Format::kBf16, Format::kQ8, Format::kQ4_0, Format::kQ4_1}) {
    weight.format = format;
    if (a.dim(i, 1) == weight.row_bytes()) return weight;
  }
  throw std::invalid_argument("argument " + std::to_string(i) + " has rows of " + std::to_string(a.dim(i, 1)) +
                              " bytes, which is no format of " + std::to_string(columns) + " numbers");
}

// The code that stands for 0.
constexpr int offset_of(Format format) { return format == Format::kQ8 ? 128 : format == Format::kQ4_0 ? 8 : 0; }

// Where one row's block lies in a panel of `rows` rows, and what its numbers are: column by column, `stride` apart.
template <Format F>
inline void unpack_row(const uint8_t *block, int64_t rows, int64_t row, float *out, int64_t stride) {
  constexpr BlockLayout layout = layout_of(F);
  const auto half = [&](int64_t i) {
    Half value;
    std::memcpy(&value, block + layout.words * 4 * rows + 2 * (i * rows + row), sizeof(value));
    return from_half(value);
  };
  const float scale = layout.halves > 0 ? half(0) : 1.f, minimum = layout.halves > 1 ? half(1) : 0.f;
  for (int64_t w = 0; w < layout.words; ++w) {
    const uint8_t *word = block + 4 * (w * rows + row);
    if constexpr (F == Format::kBf16) {
      for (int j = 0; j < 2; ++j)
        out[(2 * w + j) * stride] = from_bfloat(static_cast<uint16_t>(word[2 * j] | word[2 * j + 1] << 8));
    } else {
      for (int j = 0; j < 4; ++j) {
        const int low = F == Format::kQ8 ? word[j] : word[j] & 15;
        out[(4 * w + j) * stride] = scale * static_cast<float>(low - offset_of(F)) + minimum;
        if constexpr (F != Format::kQ8)
          out[(16 + 4 * w + j) * stride] = scale * static_cast<float>((word[j] >> 4) - offset_of(F)) + minimum;
      }
    }
  }
}

// One whole row of a packed weight as numbers.
template <Format F>
inline void unpack_row(const Weight &weight, int64_t row, float *out) {
  const int64_t first = row / kPanelRows * kPanelRows, rows = std::min<int64_t>(kPanelRows, weight.rows - first);
  const uint8_t *panel = weight.data + first * weight.row_bytes();
  for (int64_t b = 0; b < weight.blocks(); ++b)
    unpack_row<F>(panel + b * rows * layout_of(F).bytes, rows, row - first, out + b * kBlockColumns, 1);
}

}  // namespace native
