// Where more than 53 bits are needed, a value is an unevaluated sum hi + lo (Dekker 1971, Knuth's two-sum).
// Built without contraction and without std::fma, which may or may not be one instruction.
#include "core/math.h"

#include <cstring>
#include <limits>

namespace fastllm {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::uint64_t bits_of(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
double from_bits(std::uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
// -1022 <= n <= 1023
double power_of_two(int n) { return from_bits(static_cast<std::uint64_t>(n + 1023) << 52); }

// Nearest integer, ties to even, for |x| < 2^51.
double round_even(double x) { return x + 0x1.8p52 - 0x1.8p52; }

struct Pair {
  double hi, lo;
};

Pair quick_two_sum(double a, double b) {  // |a| >= |b| or a = 0
  const double s = a + b;
  return {s, b - (s - a)};
}
Pair two_sum(double a, double b) {
  const double s = a + b;
  const double t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}
Pair two_product(double a, double b) {
  const double split = 134217729.0;  // 2^27 + 1
  const double p = a * b;
  const double ta = split * a, tb = split * b;
  const double ah = ta - (ta - a), bh = tb - (tb - b);
  const double al = a - ah, bl = b - bh;
  return {p, ((ah * bh - p) + ah * bl + al * bh) + al * bl};
}
Pair add(Pair a, Pair b) {
  const Pair s = two_sum(a.hi, b.hi);
  const Pair t = two_sum(a.lo, b.lo);
  const Pair u = quick_two_sum(s.hi, s.lo + t.hi);
  return quick_two_sum(u.hi, u.lo + t.lo);
}
Pair multiply(Pair a, Pair b) {
  const Pair p = two_product(a.hi, b.hi);
  return quick_two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}
Pair divide(Pair a, Pair b) {
  const double q = a.hi / b.hi;
  const Pair p = multiply({q, 0.0}, b);
  const Pair rest = add(a, {-p.hi, -p.lo});
  return quick_two_sum(q, rest.hi / b.hi);
}

// ln 2 = kLn2High + kLn2Low to 2^-107; kLn2High has 42 bits, so n * kLn2High is exact for |n| < 2^11.
constexpr double kLn2High = 0x1.62e42fefa38p-1;
constexpr double kLn2Low = 0x1.ef35793c7673p-45;

// exp(x.hi + x.lo), |x.lo| at most a few units of x.hi. With r = x - n ln 2, |r| <= 0.347: e^r - 1 - r by its
// Taylor series to r^13 (the next term is below 2^-62); the last addition, 1 + (r + ...), makes nearly all of
// the error.
double exp_pair(Pair x) {
  if (x.hi != x.hi) return x.hi;
  if (x.hi > 709.8) return kInfinity;
  if (x.hi < -745.2) return 0.0;
  const double n = round_even(x.hi * 1.4426950408889634);
  const Pair r = two_sum(x.hi - n * kLn2High, x.lo - n * kLn2Low);
  static constexpr double kInverseFactorial[] = {
      1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
      1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,      1.0 / 24.0,      1.0 / 6.0,      0.5};
  double p = 0.0;
  for (double c : kInverseFactorial) p = p * r.hi + c;
  // e^(hi + lo) = e^hi + lo e^hi; e^hi is 1 + hi to the accuracy that the second term needs.
  const Pair sum = quick_two_sum(1.0, r.hi);
  const double y = sum.hi + (sum.lo + (r.hi * r.hi * p + r.lo * (1.0 + r.hi)));
  const int k = static_cast<int>(n), half = k / 2;
  return y * power_of_two(half) * power_of_two(k - half);
}

// ln x for normal or subnormal x > 0, to about 2^-64. x = 2^k m with m in [sqrt(1/2), sqrt(2)), s = (m - 1) /
// (m + 1), ln m = 2 artanh s = 2 (s + s^3/3 + s^5/5 + ...), s^2 <= 0.0295; the first two terms as pairs, 12
// more in double.
Pair log_pair(double x) {
  int k = 0;
  if (x < 0x1p-1022) {
    x *= 0x1p54;
    k = -54;
  }
  std::uint64_t bits = bits_of(x);
  k += static_cast<int>(bits >> 52) - 1023;
  double m = from_bits((bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    k += 1;
  }
  const Pair s = divide({m - 1.0, 0.0}, two_sum(m, 1.0));
  const Pair z = multiply(s, s);
  double tail = 0.0;
  for (int i = 27; i >= 5; i -= 2) tail = tail * z.hi + 1.0 / i;
  const Pair third = {1.0 / 3.0, 0x1.5555555555555p-56};
  const Pair series = multiply(z, add(third, {z.hi * tail, 0.0}));
  const Pair ln_m = add(s, multiply(s, series));
  const Pair ln2_k = quick_two_sum(k * kLn2High, k * kLn2Low);
  return add(ln2_k, {2.0 * ln_m.hi, 2.0 * ln_m.lo});
}

// pi/2 in three parts of 32 bits, whose products with |n| < 2^21 are exact, and the rest.
constexpr double kHalfPi[] = {0x1.921fb544p+0, 0x1.0b4611a6p-34, 0x1.3198a2ep-69, 0x1.b839a252049c1p-104};

// sin and cos of r.hi + r.lo, |r| <= 0.79, by their Taylor series to r^19 and r^18 (the next terms are below
// 2^-61 and 2^-67).
double sin_reduced(Pair r) {
  static constexpr double kRatio[] = {1.0 / (19 * 18), 1.0 / (17 * 16), 1.0 / (15 * 14), 1.0 / (13 * 12),
                                      1.0 / (11 * 10), 1.0 / (9 * 8),   1.0 / (7 * 6),   1.0 / (5 * 4)};
  const double z = r.hi * r.hi;
  double p = 0.0;
  for (double ratio : kRatio) p = (1.0 - p) * (z * ratio);
  // sin r = r - r^3/6 (1 - p) and the low part's share, lo cos r.
  return r.hi + (r.lo * (1.0 - 0.5 * z) - r.hi * (z * (1.0 / 6.0) * (1.0 - p)));
}
double cos_reduced(Pair r) {
  static constexpr double kRatio[] = {1.0 / (18 * 17), 1.0 / (16 * 15), 1.0 / (14 * 13), 1.0 / (12 * 11),
                                      1.0 / (10 * 9),  1.0 / (8 * 7),   1.0 / (6 * 5),   1.0 / (4 * 3)};
  const double z = r.hi * r.hi;
  double p = 0.0;
  for (double ratio : kRatio) p = (1.0 - p) * (z * ratio);
  // cos r = 1 - z/2 (1 - p), the rounding of 1 - z/2 made good, less lo sin r.
  const double half = 0.5 * z;
  const double w = 1.0 - half;
  return w + (((1.0 - w) - half) + (half * p - r.lo * r.hi * (1.0 - z * (1.0 / 6.0))));
}

}  // namespace

double exp_double(double x) { return exp_pair({x, 0.0}); }

double log_double(double x) {
  if (!(x > 0.0)) return x == 0.0 ? -kInfinity : kNan;
  if (x > std::numeric_limits<double>::max()) return x;
  return log_pair(x).hi;
}

double pow_double(double x, double y) {
  if (!(x > 0.0) || x > std::numeric_limits<double>::max() || !(y - y == 0.0)) return kNan;
  const Pair l = log_pair(x);
  if (y > 1e300 || y < -1e300) return l.hi == 0.0 ? 1.0 : (l.hi > 0.0) == (y > 0.0) ? kInfinity : 0.0;
  const double rough = l.hi * y;
  if (rough > 710.0) return kInfinity;
  if (rough < -746.0) return 0.0;
  return exp_pair(multiply(l, {y, 0.0}));
}

void sincos_double(double x, double* sin, double* cos) {
  if (!(x >= -kSincosLimit && x <= kSincosLimit)) {
    *sin = *cos = kNan;
    return;
  }
  const double n = round_even(x * 0.63661977236758134);
  Pair r = {x, 0.0};
  for (double part : kHalfPi) r = add(r, {-n * part, 0.0});
  const double s = sin_reduced(r), c = cos_reduced(r);
  switch (static_cast<std::int64_t>(n) & 3) {
    case 0:
      *sin = s, *cos = c;
      break;
    case 1:
      *sin = c, *cos = -s;
      break;
    case 2:
      *sin = -s, *cos = -c;
      break;
    default:
      *sin = -c, *cos = s;
      break;
  }
}

void rope_inverse_frequencies(double base, std::int64_t rotary, double linear_factor, const double* factors,
                              double* inverse_frequency) {
  for (std::int64_t i = 0; i < rotary / 2; ++i) {
    const double exponent = static_cast<double>(-2 * i) / static_cast<double>(rotary);
    const double factor = factors ? linear_factor * factors[i] : linear_factor;
    inverse_frequency[i] = pow_double(base, exponent) / factor;
  }
}

void rope_tables(const double* inverse_frequency, std::int64_t frequencies, std::int64_t first_position,
                 std::int64_t count, float* cos, float* sin) {
  for (std::int64_t i = 0; i < count; ++i) {
    const double position = static_cast<double>(first_position + i);
    for (std::int64_t j = 0; j < frequencies; ++j) {
      double s, c;
      sincos_double(position * inverse_frequency[j], &s, &c);
      cos[i * frequencies + j] = static_cast<float>(c);
      sin[i * frequencies + j] = static_cast<float>(s);
    }
  }
}

}  // namespace fastllm
