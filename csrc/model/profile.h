// Where the time of a step goes: seconds per phase, as the thread that called step() sees them, the wait for
// the other threads of its part at a phase's end included; the wait for other parts is a phase of its own,
// the last. Off unless asked for; on it costs two clock reads a phase (about 50 ns).
#pragma once

#include <array>
#include <chrono>
#include <cstddef>

namespace fastllm {

enum class Phase {
  prepare,
  embed,
  norm,
  qkv,
  rope_kv,
  attention,
  output,
  gate_up,
  activation,
  down,
  head,
  sample,
  wait
};

constexpr std::array<const char*, 13> kPhaseNames = {
    "prepare", "embed",      "norm", "qkv",  "rope_kv", "attention", "output",
    "gate_up", "activation", "down", "head", "sample",  "wait"};

class Profile {
 public:
  void enable(bool on) {
    on_ = on;
    seconds_.fill(0.0);
  }
  double seconds(std::size_t phase) const { return seconds_[phase]; }

  void start() {
    if (on_) last_ = Clock::now();
  }
  // What has passed since the mark before belongs to `phase`.
  void mark(Phase phase) {
    if (!on_) return;
    const auto now = Clock::now();
    seconds_[static_cast<std::size_t>(phase)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  bool on_ = false;
  Clock::time_point last_;
  std::array<double, kPhaseNames.size()> seconds_{};
};

}  // namespace fastllm
