// SPDX-License-Identifier: Apache-2.0
// Compiled with -mavx2 -mfma: of sixteen registers, eight hold a hypothesis.
#include "nearest.h"
#include "rows.h"

namespace vqdm {

using Avx2Lanes = Lanes<8, 4, 3, 1>;

const Path kAvx2Path = {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
                        search_rows<Avx2Lanes>, nearest_entries<Avx2Lanes>};

}  // namespace vqdm
