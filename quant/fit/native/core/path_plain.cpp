// SPDX-License-Identifier: Apache-2.0
// Four lanes, which are SSE2 or NEON where a processor has those.
#include "nearest.h"
#include "rows.h"

namespace vqdm {

using PlainLanes = Lanes<4, 4, 3, 1>;

const Path kPlainPath = {"plain", [] { return true; }, search_rows<PlainLanes>, nearest_entries<PlainLanes>};

}  // namespace vqdm
