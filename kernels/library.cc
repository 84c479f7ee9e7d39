// The library's own functions, called through ctypes: threads and the text of the last error.
#include "operator.h"
#include "thread_pool.h"

namespace native {

std::string &last_error_text() {
  static std::string text;
  return text;
}

}  // namespace native

extern "C" {

// Threads of every operator from now on; not while one runs.
void native_set_threads(int threads) { native::ThreadPool::shared().resize(threads); }

// Why the last operator failed; empty if it did not. Valid until the next call of one.
const char *native_last_error() { return native::last_error_text().c_str(); }

}  // extern "C"
