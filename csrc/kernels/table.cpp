// Collects the functions of one instruction set into the table it exports: the only symbol that other code
// sees.
#include "kernels/attention.h"
#include "kernels/logits.h"
#include "kernels/ops.h"

#define FASTLLM_JOIN_(a, b) a##b
#define FASTLLM_JOIN(a, b) FASTLLM_JOIN_(a, b)
#define FASTLLM_STRING_(a) #a
#define FASTLLM_STRING(a) FASTLLM_STRING_(a)

namespace fastllm {

extern const Kernels FASTLLM_JOIN(kernels_, FASTLLM_ISA) = {
    .name = FASTLLM_STRING(FASTLLM_ISA),
    .quantize_rows = FASTLLM_ISA::quantize_rows,
    .matmul_q = FASTLLM_ISA::matmul_q,
    .matmul_f = FASTLLM_ISA::matmul_f,
    .low_rank = FASTLLM_ISA::low_rank,
    .unpack_row = FASTLLM_ISA::unpack_row,
    .rms_norm = FASTLLM_ISA::rms_norm,
    .layer_norm = FASTLLM_ISA::layer_norm,
    .rope = FASTLLM_ISA::rope,
    .silu_mul = FASTLLM_ISA::silu_mul,
    .gelu_tanh_mul = FASTLLM_ISA::gelu_tanh_mul,
    .add = FASTLLM_ISA::add_vectors,
    .softcap = FASTLLM_ISA::softcap,
    .exp = FASTLLM_ISA::exp_values,
    .hadamard = FASTLLM_ISA::hadamard_rows,
    .kv_write = FASTLLM_ISA::kv_write,
    .attention = FASTLLM_ISA::attention,
    .attention_tiles = FASTLLM_ISA::attention_tiles,
    .attention_merge = FASTLLM_ISA::attention_merge,
    .max_value = FASTLLM_ISA::max_value,
    .exp_sum = FASTLLM_ISA::exp_sum,
    .argmax = FASTLLM_ISA::argmax,
};

}  // namespace fastllm
