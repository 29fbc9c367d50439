// SPDX-License-Identifier: Apache-2.0
// Compiled with -mavx512f: 24 sums, two weights and an input in the 32 registers.
#include "convolve.h"
#include "multiply.h"

namespace codebook {

using Avx512Tile = VectorTile<16, 2, 12>;

const Path kAvx512Path = {"avx512", [] { return static_cast<bool>(__builtin_cpu_supports("avx512f")); },
                          linear_unit<Avx512Tile>, conv2d_unit<Avx512Tile>};

}  // namespace codebook
