// What every operator of this library shares: MindSpore's calling convention, checked arguments and errors with a text.
//
// MindSpore calls an operator as NAME(count, pointers, ranks, shapes, dtypes, stream, extra), inputs first, outputs last. An
// operator that finds a wrong argument returns non-zero and leaves its reason in native_last_error(); it never reads outside its
// buffers.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

struct AotExtra;  // MindSpore's own; passed along, never used here

// MindSpore's numbers for element types, as InferType functions return them.
enum TypeId : int { kNumberTypeFloat32 = 43 };

namespace native {

// Why the last operator failed; empty if it did not.
std::string last_error();
void set_last_error(std::string why);

// Throws unless something holds. `otherwise` says why: a text, or a function that makes one of numbers, which takes longer than
// all that is checked and so happens only then.
template <typename Text>
inline void require(bool holds, const Text &otherwise) {
  if (holds) return;
  if constexpr (std::is_invocable_v<Text>) {
    throw std::invalid_argument(otherwise());
  } else {
    throw std::invalid_argument(otherwise);
  }
}

// The arguments of one call, read with their dtype and rank checked.
class Arguments {
 public:
  Arguments(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes)
      : count_(count), pointers_(pointers), ranks_(ranks), shapes_(shapes), dtypes_(dtypes) {}

  void expect(int count) const {
    require(count_ == count, [&] { return std::to_string(count_) + " arguments instead of " + std::to_string(count); });
  }
  template <typename T>
  T *data(int i, const char *dtype, int rank) const {
    require(is(i, dtype), [&] { return name(i) + " is " + dtypes_[i] + " instead of " + dtype; });
    expect_rank(i, rank);
    return static_cast<T *>(pointers_[i]);
  }
  void *raw(int i) const { return pointers_[i]; }
  bool is(int i, const char *dtype) const { return std::strcmp(dtypes_[i], dtype) == 0; }
  const char *dtype(int i) const { return dtypes_[i]; }
  int rank(int i) const { return ranks_[i]; }
  int64_t dim(int i, int axis) const { return shapes_[i][axis]; }
  void expect_rank(int i, int rank) const {
    require(ranks_[i] == rank,
            [&] { return name(i) + " has rank " + std::to_string(ranks_[i]) + " instead of " + std::to_string(rank); });
  }
  void expect_dim(int i, int axis, int64_t size) const {
    require(dim(i, axis) == size, [&] {
      return name(i) + " has " + std::to_string(dim(i, axis)) + " instead of " + std::to_string(size) + " on axis " +
             std::to_string(axis);
    });
  }

 private:
  static std::string name(int i) { return "argument " + std::to_string(i); }
  int count_;
  void **pointers_;
  int *ranks_;
  int64_t **shapes_;
  const char **dtypes_;
};

// At least `size` items of memory that is kept from call to call; what is in it is left from the last use.
template <typename T>
T *room(std::vector<T> &memory, int64_t size) {
  if (memory.size() < static_cast<size_t>(size)) memory.resize(static_cast<size_t>(size));
  return memory.data();
}

// The library's memory is of one operator at a time: the runtime calls them all from one thread. An operator may call others.
class Turn {
 public:
  Turn() : outermost_(depth()++ == 0) {
    if (outermost_ && running().exchange(true)) {
      --depth();
      throw std::logic_error("another thread runs an operator");
    }
  }
  ~Turn() {
    --depth();
    if (outermost_) running() = false;
  }
  Turn(const Turn &) = delete;
  Turn &operator=(const Turn &) = delete;

 private:
  static std::atomic<bool> &running() {
    static std::atomic<bool> running{false};
    return running;
  }
  static int &depth() {
    thread_local int depth = 0;
    return depth;
  }
  bool outermost_;
};

// Runs an operator's body and turns what it throws into MindSpore's return code.
template <typename Body>
int guarded(const char *op, Body &&body) {
  try {
    const Turn turn;
    set_last_error({});
    body();
    return 0;
  } catch (const std::exception &error) {
    set_last_error(std::string(op) + ": " + error.what());
    return 1;
  }
}

}  // namespace native
