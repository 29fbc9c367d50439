// SPDX-License-Identifier: Apache-2.0
// Every 64-bit ARM has these: 24 sums, four weights and inputs in the 32 registers.
#include "convolve.h"
#include "multiply.h"

namespace codebook {

using NeonTile = VectorTile<4, 4, 6>;

const Path kNeonPath = {"neon", [] { return true; }, linear_unit<NeonTile>, conv2d_unit<NeonTile>};

}  // namespace codebook
