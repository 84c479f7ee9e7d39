// The library's own functions, called through ctypes: threads and the text of the last error.
#include "operator.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace native {

std::string &last_error_text() {
  static std::string text;
  return text;
}

}  // namespace native

extern "C" {

// Threads of every operator from now on.
void native_set_threads(int threads) {
#ifdef _OPENMP
  omp_set_num_threads(threads);
#else
  (void)threads;
#endif
}

// Why the last failing operator failed.
const char *native_last_error() { return native::last_error_text().c_str(); }

}  // extern "C"
