#include "core/thread_pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <string>

namespace fastllm {
namespace {

constexpr unsigned kDefaultMxcsr = 0x1f80;  // all exceptions masked, round to nearest, no flush to zero

std::atomic<std::uint64_t> fork_generation{0};

void count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { fork_generation.fetch_add(1); });
  static_cast<void>(registered);
}

class FloatMode {
 public:
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(kDefaultMxcsr); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

// Waits until value != old: spins for about `spin_us` microseconds, then sleeps. From the second round of
// spins on the processor is offered to others: when there are more threads than processors, the one waited
// for may need it.
void wait_change(std::atomic<std::uint32_t>& value, std::uint32_t old, int spin_us) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::microseconds(spin_us);
  do {
    for (int i = 0; i < 64; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      _mm_pause();
    }
    sched_yield();
  } while (Clock::now() < deadline);
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

constexpr int kSpinBetweenRuns = 500;  // longer than a step's scheduling and outputs: waking takes 50 us
constexpr int kSpinAtBarrier = 200;

// The number in the first line of a file such as cpu.cfs_quota_us, or `otherwise`.
double read_number(const std::string& path, double otherwise) {
  std::ifstream file(path);
  double value;
  return file >> value ? value : otherwise;
}

// Processors granted by the control group (version 2, then 1), or a large number.
double quota_processors() {
  constexpr double kUnlimited = 1e9;
  double best = kUnlimited;
  std::ifstream groups("/proc/self/cgroup");
  std::string line;
  while (std::getline(groups, line)) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      // A limit binds the group and everything below it: look at every ancestor.
      for (;;) {
        std::ifstream file("/sys/fs/cgroup" + path + "/cpu.max");
        std::string quota;
        double period;
        if (file >> quota >> period && quota != "max" && period > 0)
          best = std::min(best, std::atof(quota.c_str()) / period);
        if (path.size() <= 1) break;
        path.resize(path.rfind('/') == 0 ? 1 : path.rfind('/'));
      }
    } else if (controllers.find("cpu") != std::string::npos &&
               controllers.find("cpuset") == std::string::npos) {
      for (const std::string& base : {"/sys/fs/cgroup/cpu" + path, std::string("/sys/fs/cgroup/cpu")}) {
        const double quota = read_number(base + "/cpu.cfs_quota_us", -1);
        const double period = read_number(base + "/cpu.cfs_period_us", 0);
        if (quota > 0 && period > 0) best = std::min(best, quota / period);
      }
    }
  }
  return best;
}

}  // namespace

int available_processors() {
  int processors = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t* set = CPU_ALLOC(8192);
  const std::size_t bytes = CPU_ALLOC_SIZE(8192);
  CPU_ZERO_S(bytes, set);
  if (sched_getaffinity(0, bytes, set) == 0) processors = CPU_COUNT_S(bytes, set);
  CPU_FREE(set);
  const double quota = quota_processors();
  if (quota < processors) processors = static_cast<int>(quota);
  return std::max(1, processors);
}

void Team::barrier() {
  const std::uint32_t now = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    // Last: nobody uses the counter of the phase after next, so clear it for its next turn.
    counters_[(now + 2) % kCounters].value.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(now + 1, std::memory_order_release);
    if (threads_ > 1) generation_.notify_all();
  } else {
    wait_change(generation_, now, kSpinAtBarrier);
  }
}

struct ThreadPool::Shared {
  explicit Shared(int threads) : team(threads) {}
  Team team;
  const std::function<void(Team&, int)>* work = nullptr;
  alignas(64) std::atomic<std::uint32_t> epoch{0};
  alignas(64) std::atomic<bool> stopping{false};
};

ThreadPool::ThreadPool(int threads) : threads_(std::max(1, threads)) {
  count_forks();
  start();
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::start() {
  fork_generation_ = fork_generation.load();
  shared_ = std::make_unique<Shared>(threads_);
  Shared* shared = shared_.get();
  for (int thread = 1; thread < threads_; ++thread) {
    workers_.emplace_back([shared, thread] {
      const FloatMode mode;
      std::uint32_t seen = 0;
      for (;;) {
        wait_change(shared->epoch, seen, kSpinBetweenRuns);
        ++seen;
        if (shared->stopping.load(std::memory_order_acquire)) return;
        (*shared->work)(shared->team, thread);
        shared->team.barrier();
      }
    });
  }
}

void ThreadPool::stop() {
  if (fork_generation_ != fork_generation.load()) {
    // The threads live in the parent only: forget them, and leave what they would have shared to leak.
    for (auto& worker : workers_) worker.detach();
    workers_.clear();
    static_cast<void>(shared_.release());
    return;
  }
  shared_->stopping.store(true, std::memory_order_release);
  shared_->epoch.fetch_add(1, std::memory_order_release);
  shared_->epoch.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::run(const std::function<void(Team&, int)>& work) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (fork_generation_ != fork_generation.load()) {
    stop();
    start();
  }
  const FloatMode mode;
  shared_->work = &work;
  if (threads_ > 1) {
    shared_->epoch.fetch_add(1, std::memory_order_release);
    shared_->epoch.notify_all();
  }
  work(shared_->team, 0);
  shared_->team.barrier();
}

}  // namespace fastllm
