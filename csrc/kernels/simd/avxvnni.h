// AVX2 with the VEX-coded VNNI dot product: everything but the dot product is AVX2's.
#pragma once

#include "kernels/simd/avx2.h"
