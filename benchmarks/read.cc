// Reads memory as fast as a core can and does nothing else: what operators that read weights are compared with.
#include <cstdint>
#include <cstring>

extern "C" float read_all(const float *numbers, int64_t count) {
  typedef float Lanes __attribute__((vector_size(64)));
  constexpr int kSums = 8, kLanes = 16;  // enough sums that additions do not wait for one another
  Lanes sums[kSums] = {};
  for (int64_t i = 0; i + kSums * kLanes <= count; i += kSums * kLanes)
    for (int j = 0; j < kSums; ++j) {
      Lanes read;
      std::memcpy(&read, numbers + i + j * kLanes, sizeof(read));
      sums[j] += read;
    }
  float total = 0.f;
  for (const Lanes &sum : sums)
    for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}
