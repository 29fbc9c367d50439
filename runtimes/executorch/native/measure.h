// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace runner {

// Runs a program on zeros and prints memory at the start, when loaded and after each run, and times, as JSON.
void measure(const std::string& program, const std::string& data, int runs);

}  // namespace runner
