// SPDX-License-Identifier: Apache-2.0
#include "process.h"

#include <fstream>
#include <sstream>

namespace runner {

Resident resident() {
  Resident found{0, 0, 0};
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    std::istringstream words(line);
    std::string name;
    int64_t kib = 0;
    if (!(words >> name >> kib)) continue;
    if (name == "RssAnon:") found.anonymous = kib * 1024;
    if (name == "RssFile:") found.file = kib * 1024;
    if (name == "VmHWM:") found.peak = kib * 1024;
  }
  return found;
}

std::vector<std::pair<int64_t, int64_t>> code_of(const std::string& name) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find(name) == std::string::npos) continue;
    std::istringstream words(line);
    int64_t start, end;
    char dash;
    std::string permissions;
    if (words >> std::hex >> start >> dash >> end >> permissions && permissions.find('x') != std::string::npos) {
      ranges.emplace_back(start, end);
    }
  }
  return ranges;
}

}  // namespace runner
