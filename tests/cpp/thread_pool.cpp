// The thread pool: every piece of work is done once, barriers order memory, callers take turns, the
// floating-point mode is set and given back, an idle pool sleeps, and a child process gets a pool of its own.
#include "core/thread_pool.h"

#include <immintrin.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"

#ifndef FASTLLM_TEST_FORK
#define FASTLLM_TEST_FORK 1
#endif

namespace {

using fastllm::Team;
using fastllm::ThreadPool;

std::uint64_t random_state = 1;
std::int64_t random_below(std::int64_t n) {  // xorshift64*: the same numbers on every machine
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<std::int64_t>((random_state * 0x2545f4914f6cdd1dULL >> 33) %
                                   static_cast<std::uint64_t>(n));
}

// Phases that read what the phase before wrote elsewhere: plain memory, ordered by the barriers alone.
void work_is_done_once_and_in_order(int threads) {
  ThreadPool pool(threads);
  CHECK(pool.size() == threads);
  for (int repeat = 0; repeat < 40; ++repeat) {
    const std::int64_t n = random_below(400), chunk = 1 + random_below(20), phases = 1 + random_below(12);
    const auto size = static_cast<std::size_t>(n);
    std::vector<std::int64_t> now(size, 0), next(size, 0);
    std::vector<int> calls(static_cast<std::size_t>(threads), 0);
    pool.run([&](Team& team, int thread) {
      ++calls[static_cast<std::size_t>(thread)];
      CHECK(team.size() == threads);
      for (std::int64_t phase = 0; phase < phases; ++phase) {
        std::vector<std::int64_t>& from = phase % 2 == 0 ? now : next;
        std::vector<std::int64_t>& to = phase % 2 == 0 ? next : now;
        const auto move = [&](std::int64_t i) {
          CHECK(0 <= i && i < n);
          to[static_cast<std::size_t>(i)] = from[static_cast<std::size_t>(n - 1 - i)] + 1;
        };
        if ((phase + chunk) % 3 == 0) {
          team.for_each_from_own(thread, n, move);
          continue;
        }
        team.for_each(n, chunk, [&](std::int64_t begin, std::int64_t end) {
          CHECK(begin < end && end <= n && end - begin <= chunk);
          for (std::int64_t i = begin; i < end; ++i) move(i);
        });
      }
      if (thread == 0 && n > 0) calls[0] += static_cast<int>((phases % 2 == 0 ? now : next)[0] - phases);
      team.barrier();
    });
    for (const int count : calls) CHECK(count == 1);
    const std::vector<std::int64_t>& last = phases % 2 == 0 ? now : next;
    for (const std::int64_t value : last) CHECK(value == phases);
  }
}

void callers_take_turns() {
  ThreadPool pool(3);
  std::int64_t total = 0;  // written by thread 0 of one run at a time
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 100; ++i) {
        pool.run([&](Team& team, int thread) {
          team.barrier();
          if (thread == 0) ++total;
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(total == 400);
}

void float_mode_is_set_and_restored() {
  constexpr unsigned kDefault = 0x1f80, kStatusFlags = 0x3f;
  const unsigned before =
      (kDefault & ~kStatusFlags) | 0x8040 | 0x6000;  // flush to zero, denormals are zero, truncate
  _mm_setcsr(before);
  ThreadPool pool(3);
  unsigned seen[3] = {};
  pool.run([&](Team&, int thread) { seen[thread] = _mm_getcsr() & ~kStatusFlags; });
  for (const unsigned mode : seen) CHECK(mode == kDefault);
  CHECK((_mm_getcsr() & ~kStatusFlags) == (before & ~kStatusFlags));
  _mm_setcsr(kDefault);
}

double process_seconds() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

void an_idle_pool_sleeps() {
  ThreadPool pool(4);
  pool.run([](Team& team, int) { team.barrier(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // spinning has ended
  const double before = process_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(process_seconds() - before < 0.02);
}

#if FASTLLM_TEST_FORK
std::int64_t sum_on(ThreadPool& pool) {
  std::atomic<std::int64_t> sum{0};
  pool.run([&](Team& team, int) {
    team.for_each(1000, 7, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) sum += i;
    });
  });
  return sum;
}

void a_child_has_a_pool() {
  ThreadPool used(3), unused(2);
  CHECK(sum_on(used) == 499500);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    const bool right = sum_on(used) == 499500 && sum_on(unused) == 499500 && sum_on(used) == 499500;
    _exit(right ? 0 : 1);
  }
  CHECK(sum_on(used) == 499500);
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(sum_on(unused) == 499500);
}
#endif

}  // namespace

int main() {
  for (int threads = 1; threads <= 6; ++threads) work_is_done_once_and_in_order(threads);
  callers_take_turns();
  float_mode_is_set_and_restored();
  an_idle_pool_sleeps();
#if FASTLLM_TEST_FORK
  a_child_has_a_pool();
#endif
  CHECK(fastllm::available_processors() >= 1);
  for (int i = 0; i < 50; ++i) ThreadPool(1 + i % 5);  // made and never run
  return 0;
}
