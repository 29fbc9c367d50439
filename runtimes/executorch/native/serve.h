// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace runner {

// Answers requests on stdin (see wire.h) until it ends.
void serve();

}  // namespace runner
