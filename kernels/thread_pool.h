// Threads that share the work of one operator at a time.
//
// A step runs a hundred operators with microseconds between them, so a waiting thread spins for a moment before it sleeps: a
// sleeping one takes as long to wake as a small operator runs. It does not spin longer, because the cores are shared with
// the runtime's own threads and the server.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace native {

class ThreadPool {
 public:
  static ThreadPool &shared();  // of the process; starts with one thread, the caller's

  ~ThreadPool();
  void resize(int threads);  // not during run()
  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(i) for every i in [0, count), on all threads and the caller's; returns when all are done, and throws what
  // the first failing one threw.
  template <typename Task>
  void run(int64_t count, const Task &task) {
    dispatch(static_cast<uint32_t>(count), [](const void *context, int64_t i) { (*static_cast<const Task *>(context))(i); },
             &task);
  }

 private:
  using Call = void (*)(const void *, int64_t);

  void dispatch(uint32_t count, Call call, const void *context);
  void work();
  bool take_one(uint32_t job);

  // The job's number in the upper half and the next task's in the lower one: a thread that comes late, with the number of
  // a job that is over, cannot take a task of the next one: it sees a new job's fields only after `next_` has left its own.
  std::atomic<uint64_t> next_{0};
  std::atomic<uint32_t> job_{0}, count_{0}, done_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<const void *> context_{nullptr};
  std::atomic<bool> stop_{false};
  std::atomic<int> sleeping_{0};
  std::exception_ptr failure_;  // of the running job; under mutex_
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace native
