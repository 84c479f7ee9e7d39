// The library's own functions, called through ctypes: threads, tiles and the text of the last error.
#include "operator.h"
#include "thread_pool.h"
#include "tile.h"

namespace native {

std::string &last_error_text() {
  static std::string text;
  return text;
}

}  // namespace native

extern "C" {

// Threads of every operator from now on; not while one runs.
void native_set_threads(int threads) { native::ThreadPool::shared().resize(threads); }

// Whether the operators multiply by tiles: a tiles::State.
int native_tiles() { return static_cast<int>(native::tiles::state()); }

// Whether they shall, where they can; not while one runs.
void native_use_tiles(int on) { native::tiles::use(on != 0); }

// Why the last operator failed; empty if it did not. Valid until the next call of one.
const char *native_last_error() { return native::last_error_text().c_str(); }

}  // extern "C"
