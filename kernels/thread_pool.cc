#include "thread_pool.h"

#include <utility>

namespace native {
namespace {

constexpr int kSpins = 4000;  // some 50 microseconds

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool &ThreadPool::shared() {
  static ThreadPool pool;
  return pool;
}

ThreadPool::~ThreadPool() { resize(1); }

void ThreadPool::resize(int threads) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto &worker : workers_) worker.join();
  workers_.clear();
  stop_ = false;
  workers_.reserve(threads - 1);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });  // those that there are stay if one fails
}

// Takes the next task of `job` and does it; false when none is left or the job is over.
bool ThreadPool::take_one(uint32_t job) {
  const uint32_t count = count_.load(std::memory_order_acquire);
  const Call call = call_.load(std::memory_order_acquire);
  const void *context = context_.load(std::memory_order_acquire);
  uint64_t next = next_.load(std::memory_order_acquire);
  do {
    if (static_cast<uint32_t>(next >> 32) != job || static_cast<uint32_t>(next) >= count) return false;
  } while (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel));
  try {
    call(context, static_cast<uint32_t>(next));
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
  }
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

void ThreadPool::dispatch(uint32_t count, Call call, const void *context) {
  if (workers_.empty() || count <= 1) {
    for (uint32_t i = 0; i < count; ++i) call(context, i);
    return;
  }
  const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
  next_.store(static_cast<uint64_t>(job) << 32 | UINT32_MAX, std::memory_order_seq_cst);  // nothing to take yet
  count_.store(count, std::memory_order_release);
  call_.store(call, std::memory_order_release);
  context_.store(context, std::memory_order_release);
  done_.store(0, std::memory_order_relaxed);
  next_.store(static_cast<uint64_t>(job) << 32, std::memory_order_release);
  job_.store(job, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }  // a thread between its last look and its sleep must not miss this
    wake_.notify_all();
  }
  while (take_one(job)) {
  }
  for (int spins = 0; done_.load(std::memory_order_acquire) < count;) {
    if (++spins < kSpins) {
      relax();
    } else {
      std::this_thread::yield();  // the one that is not done may wait for this core
    }
  }
  std::exception_ptr failure;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::swap(failure, failure_);
  }
  if (failure) std::rethrow_exception(failure);
}

void ThreadPool::work() {
  uint32_t seen = job_.load();
  while (!stop_.load(std::memory_order_relaxed)) {
    uint32_t job = job_.load(std::memory_order_acquire);
    for (int spins = 0; job == seen && spins < kSpins; ++spins) {
      relax();
      job = job_.load(std::memory_order_acquire);
    }
    if (job == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return stop_ || job_.load(std::memory_order_seq_cst) != seen; });
      sleeping_.fetch_sub(1, std::memory_order_relaxed);
      continue;
    }
    seen = job;
    while (take_one(job)) {
    }
  }
}

}  // namespace native
