// A team of threads that runs one function together, with barriers inside it.
//
//            run()                 all returned
//   ASLEEP ─────────► RUNNING ─────────────────► SPINNING ──(about 500 us without work)─► ASLEEP
//                        ▲                          │
//                        └────────── run() ─────────┘
//
// A forward pass is one run(): every thread walks through all phases and meets the others at barriers, so a
// phase costs one barrier (well under a microsecond when all threads have a core) and no wake-up. Work inside
// a phase is handed out in chunks from a shared counter: which thread computes what never changes a bit of
// the result, and a thread that its neighbours slow down takes less.
//
// Threads that wait spin briefly, then sleep in the kernel: an idle pool uses no processor time. The pool
// survives fork(): the child starts new threads at its first run(). Each thread sets the rounding and
// denormal mode that the kernels rely on, and the caller's is restored afterwards.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastllm {

class Team;

class ThreadPool {
 public:
  // threads >= 1; the caller of run() is one of them.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return threads_; }

  // Calls work(team, thread) on every thread, 0 <= thread < size(), and returns when all have returned.
  // `work` must not throw. Calls from several threads take turns.
  void run(const std::function<void(Team&, int)>& work);

 private:
  struct Shared;
  void start();
  void stop();

  int threads_;
  std::unique_ptr<Shared> shared_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::uint64_t fork_generation_ = 0;
};

// What the threads inside one run() share.
class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}
  int size() const { return threads_; }

  // Returns when all threads have called it.
  void barrier();

  // Calls f(i) for every i of [0, n) once, on some thread; thread t begins with t.
  template <typename F>
  void for_each_from_own(int thread, std::int64_t n, F&& f) {
    std::atomic<std::int64_t>& next = counters_[phase_of_this_thread()].value;
    if (thread < n) f(thread);
    for (;;) {
      const std::int64_t i = threads_ + next.fetch_add(1, std::memory_order_relaxed);
      if (i >= n) break;
      f(i);
    }
    barrier();
  }

  // Calls f(begin, end) for chunks that cover [0, n), each on some thread; every thread of the team calls
  // this with the same arguments. Returns when all chunks are done on all threads.
  template <typename F>
  void for_each(std::int64_t n, std::int64_t chunk, F&& f) {
    // Counters rotate: the one two phases ahead is reset here, when nobody can be using it.
    std::atomic<std::int64_t>& next = counters_[phase_of_this_thread()].value;
    for (;;) {
      const std::int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= n) break;
      f(begin, begin + chunk < n ? begin + chunk : n);
    }
    barrier();
  }

 private:
  friend class ThreadPool;
  static constexpr int kCounters = 4;
  struct alignas(64) Counter {
    std::atomic<std::int64_t> value{0};
  };

  int phase_of_this_thread() const {
    return static_cast<int>(generation_.load(std::memory_order_relaxed) % kCounters);
  }

  int threads_;
  Counter counters_[kCounters];
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};
};

// Processors this process may use: its affinity mask, bounded by the control group's CPU quota; at least 1.
int available_processors();

}  // namespace fastllm
