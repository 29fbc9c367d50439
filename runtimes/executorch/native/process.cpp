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

int64_t pages_of(const std::string& path) {
  int64_t bytes = 0;
  bool own = false;
  std::ifstream smaps("/proc/self/smaps");
  for (std::string line; std::getline(smaps, line);) {
    std::istringstream words(line);
    std::string name;
    int64_t kib = 0;
    words >> name;
    if (name.back() != ':') {  // "7f00-7f10 r--p 00000000 08:01 123  /path" begins a mapping
      own = line.size() >= path.size() && line.compare(line.size() - path.size(), path.size(), path) == 0;
    } else if (own && name == "Rss:" && words >> kib) {
      bytes += kib * 1024;
    }
  }
  return bytes;
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
