// Philox4x32-10, a counter-based random generator: J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011. A pure function of key and counter, so that a draw depends on
// nothing that ran before.
#pragma once

#include <array>
#include <cstdint>

namespace fastllm {

// c, k: counter and key, least significant word first.
constexpr std::array<std::uint32_t, 4> philox4x32_10(std::array<std::uint32_t, 4> c,
                                                     std::array<std::uint32_t, 2> k) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(a)};
    k = {k[0] + 0x9E3779B9u, k[1] + 0xBB67AE85u};
  }
  return c;
}

// The one uniform number of a sample, a multiple of 2^-53 in [0, 1). Key: the seed's low and high word;
// counter: (position, sample_index, 0, 0); the top 27 bits of the first word and the top 26 of the second
// make the number.
constexpr double sample_uniform(std::uint64_t seed, std::uint32_t sample_index, std::uint32_t position) {
  const auto words = philox4x32_10({position, sample_index, 0, 0}, {static_cast<std::uint32_t>(seed),
                                                                    static_cast<std::uint32_t>(seed >> 32)});
  return ((words[0] >> 5) * 0x1p26 + (words[1] >> 6)) * 0x1p-53;
}

}  // namespace fastllm
