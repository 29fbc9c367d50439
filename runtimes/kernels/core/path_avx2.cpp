// SPDX-License-Identifier: Apache-2.0
// Compiled with -mavx2 -mfma: twelve sums, two weights and an input in the sixteen registers.
#include "convolve.h"
#include "multiply.h"

namespace codebook {

using Avx2Tile = VectorTile<8, 2, 6>;

const Path kAvx2Path = {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
                        linear_unit<Avx2Tile>, conv2d_unit<Avx2Tile>};

}  // namespace codebook
