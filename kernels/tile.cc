// Whether the tiles of tile.h can be used: the system has to grant them, and their products have to be right.
//
// This has not run on a CPU with the unit yet, only emulated. So a process multiplies a few numbers both ways before it relies on it.
#include "tile.h"

#if NATIVE_TILES && !defined(NATIVE_EMULATED_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace native {
namespace tiles {
namespace {

bool on = true;

#if NATIVE_TILES

// Linux saves the tiles' 8 KB only for processes that asked (Documentation/arch/x86/xstate.rst).
bool granted() {
#if defined(NATIVE_EMULATED_TILES)
  return true;
#else
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

// Numbers that are small and whole, so that sums of their products are exact in any order.
int token_number(int token, int column) { return (token * 7 + column * 3) % 23 - 11; }
int weight_number(int row, int column) { return (row * 5 + column * 11) % 19; }

// 16 tokens times 16 rows over 32 columns, in tiles of either kind.
template <typename Token, typename Number, typename Sum, typename Multiply>
bool right(const Multiply &multiply, Token (*token_of)(int), Number (*number_of)(int)) {
  constexpr int kColumns = 32, kPerWord = 4 / sizeof(Token);
  Token tokens[kRows][kColumns];
  Number weight[kColumns / kPerWord][kRows][kPerWord];
  Sum sums[kRows][kRows];
  for (int k = 0; k < kColumns; ++k)
    for (int i = 0; i < kRows; ++i) {
      tokens[i][k] = token_of(token_number(i, k));
      weight[k / kPerWord][i][k % kPerWord] = number_of(weight_number(i, k));
    }
  {
    const Session session(sizeof(tokens[0]));
    zero<1>();
    load<5>(tokens, sizeof(tokens[0]));
    load<6>(weight, kRowBytes);
    multiply();
    store<1>(sums, sizeof(sums[0]));
  }
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kRows; ++n) {
      int expected = 0;
      for (int k = 0; k < kColumns; ++k) expected += token_number(m, k) * weight_number(n, k);
      if (sums[m][n] != static_cast<Sum>(expected)) return false;
    }
  return true;
}

uint16_t bfloat_of(int number) { return to_bfloat(static_cast<float>(number)); }

State tried() {
  if (!granted()) return State::kRefused;
  const bool bytes = right<int8_t, uint8_t, int32_t>([] { add_byte_products<1, 5, 6>(); },
                                                     [](int number) { return static_cast<int8_t>(number); },
                                                     [](int number) { return static_cast<uint8_t>(number); });
  const bool bfloats = right<uint16_t, uint16_t, float>([] { add_bfloat_products<1, 5, 6>(); }, bfloat_of, bfloat_of);
  return bytes && bfloats ? State::kUsed : State::kWrong;
}

#else

State tried() { return State::kAbsent; }

#endif

}  // namespace

State state() {
  static const State found = tried();
  return found == State::kUsed && !on ? State::kOff : found;
}

void use(bool wanted) { on = wanted; }

}  // namespace tiles
}  // namespace native
