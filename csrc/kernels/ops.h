// The functions behind the table: each op's file defines them in the namespace of its instruction set,
// table.cpp collects them. Their contracts stand in kernels.h.
#pragma once

#include "kernels/kernels.h"

namespace fastllm::FASTLLM_ISA {

void quantize_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, const QuantizedRows* out);
void matmul_q(const PackedView* w, const QuantizedRows* x, int64_t rows, int64_t panel_begin,
              int64_t panel_end, float* y, int64_t ldy, int accumulate, void* scratch, ReadAhead* ahead);
void matmul_f(const PackedView* w, const float* x, int64_t ldx, int64_t rows, int64_t panel_begin,
              int64_t panel_end, float* y, int64_t ldy, int accumulate);
void low_rank(const float* a, int64_t rank, const float* x, int64_t ldx, int64_t rows, int64_t k, float scale,
              float* y, int64_t ldy);
void unpack_row(const PackedView* w, int64_t row, float* out);
void rms_norm(const float* x, int64_t ldx, const float* weight, float eps, int64_t rows, int64_t dim,
              float* y, int64_t ldy);
void layer_norm(const float* x, int64_t ldx, const float* weight, const float* bias, float eps, int64_t rows,
                int64_t dim, float* y, int64_t ldy);
void rope(float* x, int64_t ldx, int64_t rows, int64_t heads, int64_t head_dim, int64_t rotary,
          const float* cos, const float* sin);
void silu_mul(const float* gate, const float* up, float* y, int64_t n);
void gelu_tanh_mul(const float* gate, const float* up, float* y, int64_t n);
void add_vectors(const float* x, const float* y, float* out, int64_t n);
void softcap(float* x, float cap, int64_t n);
void hadamard_rows(const float* x, int64_t rows, int64_t n, float* y);
void exp_values(const float* x, float* y, int64_t n);

}  // namespace fastllm::FASTLLM_ISA
