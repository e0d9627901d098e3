// What the machine can do at most, for bench/peaks.py: integer and float arithmetic, and reading memory.
//
//   limits THREADS SECONDS MEBIBYTES        -> one JSON object on stdout
//
// Arithmetic counts two operations per multiply-add, in chains of independent accumulators that never leave
// the registers. Reading walks an area of its own per thread, larger than any cache, a cache line at a time,
// with the line some way ahead prefetched; over a few distances, since the best one differs between machines.
// Every figure is measured in rounds of all threads at once, from a common start to the last one's end; all
// rounds are printed, and the reader takes the greatest: a limit is what the machine can do undisturbed.
#include <immintrin.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kChains = 12;      // enough to hide 4 to 5 cycles of latency on two ports; fits 16 registers
constexpr int kRounds = 5;       // of each figure
constexpr int kBatch = 100'000;  // iterations between two looks at the clock

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs work(thread) on all threads at once; the units of work done per second, all threads together.
double rate(int threads, const std::function<double(int)>& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<double> done(static_cast<std::size_t>(threads));
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      ++ready;
      while (!go) {
      }
      done[static_cast<std::size_t>(t)] = work(t);
    });
  while (ready != threads) std::this_thread::yield();
  const double start = now();
  go = true;
  double total = 0;
  for (std::thread& thread : pool) thread.join();
  const double seconds = now() - start;
  for (double units : done) total += units;
  return total / seconds;
}

// ---- arithmetic
// --------------------------------------------------------------------------------------------
//
// Each body does one multiply-add of every chain; the empty asm keeps the operands opaque, so that nothing
// is hoisted out of the loop.

#define ARITHMETIC(name, Vector, zero, macs_per_vector, step)                \
  double name(double seconds) {                                              \
    Vector acc[kChains], a = zero, b = zero;                                 \
    for (Vector& chain : acc) chain = zero;                                  \
    double count = 0;                                                        \
    for (const double end = now() + seconds; now() < end; count += kBatch)   \
      for (int i = 0; i < kBatch; ++i) {                                     \
        asm volatile("" : "+x"(a), "+x"(b));                                 \
        _Pragma("GCC unroll 16") for (int c = 0; c < kChains; ++c) { step; } \
      }                                                                      \
    for (Vector& chain : acc) asm volatile("" : : "x"(chain));               \
    return count * kChains * (macs_per_vector) * 2;                          \
  }

#ifdef __AVX512VNNI__
ARITHMETIC(int8_avx512vnni, __m512i, _mm512_setzero_si512(), 64, acc[c] = _mm512_dpbusd_epi32(acc[c], a, b))
#endif
#ifdef __AVXVNNI__
ARITHMETIC(int8_avxvnni, __m256i, _mm256_setzero_si256(), 32, acc[c] = _mm256_dpbusd_avx_epi32(acc[c], a, b))
#endif
#ifdef __AVX512BF16__
ARITHMETIC(bf16_avx512, __m512, _mm512_setzero_ps(), 32,
           acc[c] = _mm512_dpbf16_ps(acc[c], (__m512bh)a, (__m512bh)b))
#endif
#ifdef __AVX512F__
ARITHMETIC(fp32_avx512, __m512, _mm512_setzero_ps(), 16, acc[c] = _mm512_fmadd_ps(a, b, acc[c]))
#endif
#if defined(__AVX2__) && defined(__FMA__)
// Without a dot-product instruction: bytes to pairs, pairs to quadruples, and the addition. The ones come
// through the second operand, which is as good as any. The empty asm makes each product anew.
ARITHMETIC(int8_avx2, __m256i, _mm256_setzero_si256(), 32, asm volatile("" : "+x"(a));
           acc[c] = _mm256_add_epi32(acc[c], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), b)))
ARITHMETIC(fp32_avx2, __m256, _mm256_setzero_ps(), 8, acc[c] = _mm256_fmadd_ps(a, b, acc[c]))
#endif

// ---- memory
// ------------------------------------------------------------------------------------------------

struct Area {
  explicit Area(std::size_t size) : bytes(size) {
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
      std::perror("limits: mmap");
      std::exit(1);
    }
    madvise(at, size, MADV_HUGEPAGE);
    data = static_cast<char*>(at);
    for (std::size_t i = 0; i < size; i += 64) data[i] = static_cast<char>(i >> 6);
  }
  char* data;
  std::size_t bytes;
};

double read_area(const Area& area, std::size_t ahead) {
#ifdef __AVX512F__
  __m512i sum[4] = {};
  for (std::size_t i = 0; i + 256 <= area.bytes; i += 256) {
    for (int line = 0; line < 4; ++line) {
      const char* at = area.data + i + line * 64;
      if (ahead) _mm_prefetch(at + ahead, _MM_HINT_T0);  // past the end: no fault, no harm
      sum[line] = _mm512_xor_si512(sum[line], _mm512_load_si512(at));
    }
  }
  for (__m512i& part : sum) asm volatile("" : : "x"(part));
#else
  __m128i sum[4] = {};
  for (std::size_t i = 0; i + 256 <= area.bytes; i += 256) {
    for (int line = 0; line < 4; ++line) {
      const char* at = area.data + i + line * 64;
      if (ahead) _mm_prefetch(at + ahead, _MM_HINT_T0);
      for (int part = 0; part < 4; ++part)
        sum[part] = _mm_xor_si128(sum[part], _mm_load_si128(reinterpret_cast<const __m128i*>(at) + part));
    }
  }
  for (__m128i& part : sum) asm volatile("" : : "x"(part));
#endif
  return static_cast<double>(area.bytes);
}

bool first = true;

void print(const std::string& name, const std::function<double()>& measure) {
  std::printf("%s\"%s\": [", first ? "{" : ", ", name.c_str());
  first = false;
  for (int round = 0; round < kRounds; ++round) std::printf(round ? ", %.4g" : "%.4g", measure());
  std::printf("]");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: limits THREADS SECONDS MEBIBYTES\n");
    return 2;
  }
  const int threads = std::atoi(argv[1]);
  const double seconds = std::atof(argv[2]);
  const std::size_t bytes = static_cast<std::size_t>(std::atoll(argv[3])) << 20;
  [[maybe_unused]] const auto arithmetic = [&](const char* name, double (*work)(double)) {
    print(name, [&] { return rate(threads, [&](int) { return work(seconds); }); });
  };
#ifdef __AVX512VNNI__
  arithmetic("int8_avx512vnni", int8_avx512vnni);
#endif
#ifdef __AVXVNNI__
  arithmetic("int8_avxvnni", int8_avxvnni);
#endif
#ifdef __AVX512BF16__
  arithmetic("bf16_avx512", bf16_avx512);
#endif
#ifdef __AVX512F__
  arithmetic("fp32_avx512", fp32_avx512);
#endif
#if defined(__AVX2__) && defined(__FMA__)
  arithmetic("int8_avx2", int8_avx2);
  arithmetic("fp32_avx2", fp32_avx2);
#endif
  std::vector<Area> areas;
  for (int t = 0; t < threads; ++t) areas.emplace_back(bytes);
  for (const std::size_t ahead : {0, 512, 1024, 2048, 4096})
    print("read_ahead_" + std::to_string(ahead), [&] {
      return rate(threads, [&](int t) { return read_area(areas[static_cast<std::size_t>(t)], ahead); });
    });
  std::printf("}\n");
  return 0;
}
