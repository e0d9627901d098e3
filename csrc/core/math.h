// Double-precision exp, log, pow, sin and cos of our own: plain +, -, *, / in a fixed order, so that every
// machine and every C library gives the same bits. For tables and single values; the kernels have their own
// exp and tanh.
#pragma once

#include <cstdint>

namespace fastllm {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Each is less than one unit in the last place off, also where the result is subnormal.
double exp_double(double x);                             // 0 below -745.2, infinite above 709.8
double log_double(double x);                             // x > 0; -infinity for 0, NaN below
double pow_double(double x, double y);                   // x > 0
void sincos_double(double x, double* sin, double* cos);  // |x| <= kSincosLimit, NaN beyond

constexpr double kSincosLimit = 2097152.0;  // 2^21 radians

// base^(-2 i / rotary) / (linear_factor * factors[i]) for i < rotary / 2; factors may be null.
void rope_inverse_frequencies(double base, std::int64_t rotary, double linear_factor, const double* factors,
                              double* inverse_frequency);

// cos and sin of (first_position + i) * inverse_frequency[j], i < count, j < frequencies, rounded to fp32;
// cos, sin: (count, frequencies).
void rope_tables(const double* inverse_frequency, std::int64_t frequencies, std::int64_t first_position,
                 std::int64_t count, float* cos, float* sin);

}  // namespace fastllm
