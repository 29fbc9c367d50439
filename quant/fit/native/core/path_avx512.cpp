// SPDX-License-Identifier: Apache-2.0
// Compiled with -mavx512f: of thirty-two registers, sixteen hold two hypotheses.
#include "nearest.h"
#include "rows.h"

namespace vqdm {

using Avx512Lanes = Lanes<16, 4, 6, 2>;

const Path kAvx512Path = {"avx512", [] { return __builtin_cpu_supports("avx512f") != 0; }, search_rows<Avx512Lanes>,
                          nearest_entries<Avx512Lanes>};

}  // namespace vqdm
