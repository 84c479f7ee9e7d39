// Several tensors in one input of an operator.
//
// MindSpore's runtime looks after every input of a graph at every call, which at small batches takes longer than one might
// think: a layer's seven to nine weights are one input. A bundle is uint8 [bytes] and begins with a table of int64: how many
// tensors there are, then of each its dtype (0 float32, 1 uint8), rank, rows, columns (1 of a vector), and the byte where its
// elements begin, a multiple of 64. models/bundle.py writes it.
#pragma once

#include "operator.h"

namespace native {

// One argument of an operator.
struct Value {
  static constexpr int kMostAxes = 4;
  void *data;
  const char *dtype;
  int rank;
  int64_t shape[kMostAxes];
};

class Bundle {
 public:
  // Argument i of the operator that is running.
  Bundle(const Arguments &a, int i) : data_(a.data<uint8_t>(i, "uint8", 1)), bytes_(a.dim(i, 0)), index_(i) {
    count_ = bytes_ < kWord ? -1 : word(0);
    require(count_ >= 0 && count_ <= (bytes_ / kWord - 1) / kEntryWords, [&] { return name() + " is no bundle of tensors"; });
  }

  int64_t count() const { return count_; }

  // Tensor i; all of its elements are within the bundle.
  Value operator[](int64_t i) const {
    require(i < count_, [&] { return name() + " has only " + std::to_string(count_) + " tensors"; });
    const int64_t entry = 1 + i * kEntryWords, dtype = word(entry), rank = word(entry + 1), rows = word(entry + 2),
                  columns = word(entry + 3), begin = word(entry + 4);
    const bool known = (dtype == 0 || dtype == 1) && (rank == 2 || (rank == 1 && columns == 1));
    const bool placed = begin >= 0 && begin <= bytes_ && begin % kAlignment == 0 && rows >= 0 && columns >= 0;
    const int64_t size = dtype == 0 ? sizeof(float) : 1;
    const bool inside = placed && (rows == 0 || columns <= (bytes_ - begin) / size / rows);
    require(known && inside, [&] { return name() + ": tensor " + std::to_string(i) + " is broken"; });
    return {data_ + begin, dtype == 0 ? "float32" : "uint8", static_cast<int>(rank), {rows, columns}};
  }

 private:
  static constexpr int64_t kWord = sizeof(int64_t), kEntryWords = 5, kAlignment = 64;

  int64_t word(int64_t i) const {
    int64_t value;
    std::memcpy(&value, data_ + i * kWord, sizeof(value));
    return value;
  }
  std::string name() const { return "argument " + std::to_string(index_); }

  uint8_t *data_;
  int64_t bytes_, count_;
  int index_;
};

}  // namespace native
