// SPDX-License-Identifier: Apache-2.0
// The reference: plain loops, no fused products, whatever the compiler's baseline is.
#include "convolve.h"
#include "multiply.h"

namespace codebook {

const Path kScalarPath = {"scalar", [] { return true; }, linear_unit<ScalarTile>, conv2d_unit<ScalarTile>};

}  // namespace codebook
