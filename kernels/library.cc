// The library's own functions, called through ctypes: threads, tiles and the text of the last error.
#include <mutex>

#include "operator.h"
#include "thread_pool.h"
#include "tile.h"

namespace native {
namespace {

std::mutex mutex;
std::string text;  // under mutex

}  // namespace

std::string last_error() {
  std::lock_guard<std::mutex> lock(mutex);
  return text;
}

void set_last_error(std::string why) {
  std::lock_guard<std::mutex> lock(mutex);
  text = std::move(why);
}

}  // namespace native

extern "C" {

// Threads of every operator from now on; non-zero if there cannot be as many. Not while one runs.
int native_set_threads(int threads) {
  return native::guarded("threads", [&] { native::ThreadPool::shared().resize(threads); });
}

// Whether the operators multiply by tiles: a tiles::State.
int native_tiles() { return static_cast<int>(native::tiles::state()); }

// Whether they shall, where they can; not while one runs.
void native_use_tiles(int on) { native::tiles::use(on != 0); }

// The instructions that linear layers were compiled for, by their makers' names.
const char *native_instructions() {
#if defined(__AVX512F__)
  return "AVX-512"
#if defined(__AVX512VNNI__)
         " VNNI"
#endif
#if defined(__AVX512BF16__)
         " BF16"
#endif
      ;
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__ARM_FEATURE_DOTPROD)
  return "NEON dot products";
#elif defined(__ARM_NEON)
  return "NEON";
#else
  return "no vector instructions of its own";
#endif
}

// Why the last operator failed; empty if it did not. Valid until this thread asks again.
const char *native_last_error() {
  thread_local std::string text;
  text = native::last_error();
  return text.c_str();
}

}  // extern "C"
