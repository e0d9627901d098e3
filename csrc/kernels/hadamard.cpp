// The rotation of hadamard.h over rows, for whoever reads an int8 cache back.
#include "kernels/hadamard.h"

#include "kernels/ops.h"

namespace fastllm::FASTLLM_ISA {

void hadamard_rows(const float* x, int64_t rows, int64_t n, float* y) {
  for (int64_t m = 0; m < rows; ++m) hadamard(x + m * n, n, y + m * n);
}

}  // namespace fastllm::FASTLLM_ISA
