// SPDX-License-Identifier: Apache-2.0
// What ctypes calls. Functions return null, or one sentence on what is wrong; nothing is thrown out of them.
#include <limits>
#include <new>
#include <system_error>

#include "search.h"

#define VQDM_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr const char* kNoPath = "this processor has no such path";
constexpr const char* kNoMemory = "there is no memory or no thread left for the search";

template <class Work>
const char* guarded(Work work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::system_error&) {
    return kNoMemory;
  }
}

}  // namespace

// Names of the paths that this processor can run, the plain one first; null after the last.
VQDM_API const char* vqdm_path(std::size_t index) { return vqdm::path_name(index); }

// sizes: outputs, columns, codebooks, entries, length of a vector, beam, threads. See search.h for the arrays.
VQDM_API const char* vqdm_search(const float* target, const float* codebooks, const float* lower,
                                 const std::int64_t* sizes, const char* path_name, std::uint8_t* codes) {
  const vqdm::Path* const path = vqdm::find_path(path_name);
  if (path == nullptr) return kNoPath;
  const vqdm::Problem problem{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                              target,   codebooks, lower,   codes};
  if (const char* const fault = vqdm::fault(problem)) return fault;
  return guarded([&]() -> const char* {
    vqdm::search(problem, *path, sizes[6]);
    return nullptr;
  });
}

// Index of the entry of least Σ pulls[i] * features[i][entry] for each of `count` points: pulls [count, width],
// features [width, entries].
VQDM_API const char* vqdm_nearest(const float* pulls, const float* features, std::int64_t count, std::int64_t width,
                                  std::int64_t entries, const char* path_name, std::uint8_t* codes) {
  const vqdm::Path* const path = vqdm::find_path(path_name);
  if (path == nullptr) return kNoPath;
  if (count < 0 || width < 1 || width > 64) return "points have 1 to 64 numbers";
  if (entries < 1 || entries > vqdm::kMaxEntries) return "a codebook has 1 to 256 entries";
  return guarded([&]() -> const char* {
    const std::int64_t padded = (entries + vqdm::kEntryStep - 1) / vqdm::kEntryStep * vqdm::kEntryStep;
    std::vector<float> lines(static_cast<std::size_t>((width + 1) * padded), 0.0f);
    for (std::int64_t i = 0; i < width; ++i)
      for (std::int64_t entry = 0; entry < entries; ++entry)
        lines[static_cast<std::size_t>(i * padded + entry)] = features[i * entries + entry];
    for (std::int64_t entry = entries; entry < padded; ++entry)
      lines[static_cast<std::size_t>(width * padded + entry)] = std::numeric_limits<float>::infinity();
    path->nearest(pulls, count, width, lines.data(), padded, codes);
    return nullptr;
  });
}
