// SPDX-License-Identifier: Apache-2.0
// What Linux says of this process.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace runner {

// Bytes in memory: `anonymous` must stay there on a phone, pages of `file`s can be dropped and read again; `peak` is
// the most there ever was of both.
struct Resident {
  int64_t anonymous, file, peak;
};

Resident resident();

// Bytes in memory of pages of a file that is mapped, by the end of its path.
int64_t pages_of(const std::string& path);

// Address ranges [start, end) of the code of libraries whose path contains `name`.
std::vector<std::pair<int64_t, int64_t>> code_of(const std::string& name);

}  // namespace runner
