// AMX: a unit of newer x86 CPUs with eight registers that are tiles, up to 16 rows of 64 bytes, and that multiplies one by
// another (Intel's Software Developer's Manual, volume 1, chapter 18).
//
// Here tiles 0 ... 3 are sums, of 16 tokens and 16 rows of a weight; 4 and 5 have tokens, 6 and 7 the weight, whose
// columns lie as in a panel of packed_weight.h: in words, those of 16 rows beside each other.
//
// NATIVE_EMULATED_TILES builds the same operators for a CPU without the unit, in ordinary arithmetic that does what the
// manual says: slowly, for tests.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define NATIVE_TILES 1
#elif defined(NATIVE_EMULATED_TILES) && defined(__AVX2__)
#define NATIVE_TILES 1
#else
#define NATIVE_TILES 0
#endif

#include <cstdint>
#include <cstring>

#include "half.h"
#include "vector_math.h"

namespace native {
namespace tiles {

// Whether the operators use the unit, and why not.
enum class State : int {
  kAbsent = 0,   // the library was built for a CPU without it
  kRefused = 1,  // the system does not grant it to this process
  kWrong = 2,    // its products are not what the manual says
  kOff = 3,      // use(false)
  kUsed = 4,
};

State state();     // asks the system and tries the unit, the first time
void use(bool on);  // not while an operator runs
inline bool used() { return NATIVE_TILES && state() == State::kUsed; }

#if NATIVE_TILES

constexpr int kRows = 16, kRowBytes = 64;

// The sizes of all tiles, as the unit reads them.
struct alignas(64) Sizes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Sizes) == 64, "as the unit reads it");

// Tiles for products over `bytes` bytes of a token and of 16 rows of a weight: a multiple of 4, 64 at most.
inline Sizes sizes_of(int bytes) {
  Sizes sizes;
  for (int tile = 0; tile < 8; ++tile) {
    sizes.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? bytes : kRowBytes);
    sizes.rows[tile] = static_cast<uint8_t>(tile >= 6 ? bytes / 4 : kRows);
  }
  return sizes;
}

#if !defined(NATIVE_EMULATED_TILES)  // also where the CPU has the unit

// This thread's tiles, while it lasts: without any, the system has less to save when it takes the core away.
class Session {
 public:
  explicit Session(int bytes) {
    const Sizes sizes = sizes_of(bytes);
    asm volatile("ldtilecfg %0" ::"m"(sizes));
  }
  ~Session() { asm volatile("tilerelease"); }
  Session(const Session &) = delete;
  Session &operator=(const Session &) = delete;
};

// Rows of a tile from memory, `stride` bytes apart.
template <int kTile>
inline void load(const void *from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store(void *to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Sums of 32 bits += tokens' bytes with sign times a weight's without.
template <int kSums, int kTokens, int kWeight>
inline void add_byte_products() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kTokens), "i"(kWeight));
}

// Sums of float32 += products of bfloat16 numbers.
template <int kSums, int kTokens, int kWeight>
inline void add_bfloat_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kTokens), "i"(kWeight));
}

#else

struct Unit {
  Sizes sizes;
  uint8_t tiles[8][kRows][kRowBytes];
};

inline Unit &unit() {
  thread_local Unit unit;
  return unit;
}

class Session {
 public:
  explicit Session(int bytes) { unit() = {sizes_of(bytes), {}}; }
  ~Session() { unit() = {}; }
  Session(const Session &) = delete;
  Session &operator=(const Session &) = delete;
};

template <int kTile>
inline void zero() {
  std::memset(unit().tiles[kTile], 0, sizeof(unit().tiles[kTile]));
}

template <int kTile>
inline void load(const void *from, int64_t stride) {
  zero<kTile>();
  for (int row = 0; row < unit().sizes.rows[kTile]; ++row)
    std::memcpy(unit().tiles[kTile][row], static_cast<const uint8_t *>(from) + row * stride, unit().sizes.row_bytes[kTile]);
}

template <int kTile>
inline void store(void *to, int64_t stride) {
  for (int row = 0; row < unit().sizes.rows[kTile]; ++row)
    std::memcpy(static_cast<uint8_t *>(to) + row * stride, unit().tiles[kTile][row], unit().sizes.row_bytes[kTile]);
}

// Calls add(sum, word of a token, word of the weight) for each word that meets another, in the unit's order.
template <typename Sum, int kSums, int kTokens, int kWeight, typename Add>
inline void each_product(const Add &add) {
  Unit &u = unit();
  for (int m = 0; m < u.sizes.rows[kSums]; ++m) {
    Sum sums[kRowBytes / sizeof(Sum)];
    std::memcpy(sums, u.tiles[kSums][m], sizeof(sums));
    for (int n = 0; n < u.sizes.row_bytes[kSums] / 4; ++n)
      sums[n] += add(u.sizes.row_bytes[kTokens] / 4, u.tiles[kTokens][m], u.tiles[kWeight], 4 * n);
    std::memcpy(u.tiles[kSums][m], sums, sizeof(sums));
  }
}

template <int kSums, int kTokens, int kWeight>
inline void add_byte_products() {
  each_product<int32_t, kSums, kTokens, kWeight>([](int words, const uint8_t *token, const uint8_t(*weight)[kRowBytes], int at) {
    int32_t sum = 0;
    for (int k = 0; k < words; ++k)
      for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(token[4 * k + i]) * static_cast<int32_t>(weight[k][at + i]);
    return sum;
  });
}

template <int kSums, int kTokens, int kWeight>
inline void add_bfloat_products() {
  each_product<float, kSums, kTokens, kWeight>([](int words, const uint8_t *token, const uint8_t(*weight)[kRowBytes], int at) {
    const auto number = [](const uint8_t *bytes) { return from_bfloat(static_cast<uint16_t>(bytes[0] | bytes[1] << 8)); };
    float even = 0.f, odd = 0.f;
    for (int k = 0; k < words; ++k) {
      even += number(token + 4 * k) * number(weight[k] + at);
      odd += number(token + 4 * k + 2) * number(weight[k] + at + 2);
    }
    return even + odd;
  });
}

#endif  // NATIVE_EMULATED_TILES
#endif  // NATIVE_TILES

}  // namespace tiles
}  // namespace native
