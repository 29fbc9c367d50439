// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <thread>

#include "search.h"

namespace vqdm {

namespace {

void fill_books(const Problem& p, std::vector<float>& transposed) {
  const std::int64_t padded = p.padded_entries();
  transposed.assign(static_cast<std::size_t>(p.count * p.length * padded), 0.0f);
  for (std::int64_t m = 0; m < p.count; ++m)
    for (std::int64_t e = 0; e < p.entries; ++e)
      for (std::int64_t d = 0; d < p.length; ++d)
        transposed[static_cast<std::size_t>((m * p.length + d) * padded + e)] =
            p.codebooks[(m * p.entries + e) * p.length + d];
}

void fill_diagonal(const Problem& p, std::vector<float>& diagonal) {
  const std::int64_t size = p.length * p.length;
  diagonal.resize(static_cast<std::size_t>(p.vectors() * 2 * size));
  for (std::int64_t j = 0; j < p.vectors(); ++j) {
    float* const block = diagonal.data() + j * 2 * size;
    for (std::int64_t a = 0; a < p.length; ++a)
      for (std::int64_t b = 0; b < p.length; ++b) {
        const float value = p.lower[(j * p.length + a) * p.columns + j * p.length + b];
        block[a * p.length + b] = block[size + b * p.length + a] = value;
      }
  }
}

void fill_energy(const Problem& p, const std::vector<float>& diagonal, std::vector<float>& energy) {
  const std::int64_t padded = p.padded_entries(), length = p.length;
  energy.assign(static_cast<std::size_t>(p.vectors() * p.count * padded), std::numeric_limits<float>::infinity());
  for (std::int64_t j = 0; j < p.vectors(); ++j) {
    const float* const block = diagonal.data() + j * 2 * length * length;
    for (std::int64_t m = 0; m < p.count; ++m)
      for (std::int64_t e = 0; e < p.entries; ++e) {
        const float* const entry = p.codebooks + (m * p.entries + e) * length;
        float sum = 0;
        for (std::int64_t b = 0; b < length; ++b) {
          float seen = 0;
          for (std::int64_t a = 0; a < length; ++a) seen += entry[a] * block[a * length + b];
          sum += seen * seen;
        }
        energy[static_cast<std::size_t>((j * p.count + m) * padded + e)] = sum;
      }
  }
}

}  // namespace

Shared::Shared(const Problem& given) : problem(given) {
  fill_books(problem, transposed);
  fill_diagonal(problem, diagonal);
  fill_energy(problem, diagonal, energy);
  std::size_t size = 0;
  for (std::int64_t stop = problem.columns; stop > 0; stop -= kBlock) {
    panel_starts.push_back(size);
    size += static_cast<std::size_t>((problem.columns - std::max<std::int64_t>(0, stop - kBlock)) * kBlock);
  }
  panels.assign(size, 0.0f);
  std::size_t block = 0;
  for (std::int64_t stop = problem.columns; stop > 0; stop -= kBlock, ++block) {
    const std::int64_t start = std::max<std::int64_t>(0, stop - kBlock);
    float* const panel = panels.data() + panel_starts[block];
    for (std::int64_t row = start; row < problem.columns; ++row)
      std::memcpy(panel + (row - start) * kBlock, problem.lower + row * problem.columns + start,
                  static_cast<std::size_t>(stop - start) * sizeof(float));
  }
}

void search(const Problem& problem, const Path& path, std::int64_t threads) {
  const Shared shared(problem);
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t begin; (begin = next.fetch_add(kTileRows)) < problem.outputs;)
      path.rows(shared, begin, std::min(begin + kTileRows, problem.outputs));
  };
  std::vector<std::thread> others;
  for (std::int64_t i = 1; i < std::min(threads, (problem.outputs + kTileRows - 1) / kTileRows); ++i)
    others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

const char* fault(const Problem& p) {
  if (p.length != 2 && p.length != 4 && p.length != 8) return "vectors have 2, 4 or 8 columns";
  if (p.columns < p.length || p.columns > kMaxColumns || p.columns % p.length) return "columns are whole vectors, up to 65536";
  if (p.outputs < 1 || p.outputs > kMaxOutputs) return "there are 1 to 16777216 outputs";
  if (p.count < 1 || p.count > kMaxBooks) return "there are 1 to 16 codebooks";
  if (p.entries < 1 || p.entries > kMaxEntries) return "a codebook has 1 to 256 entries";
  if (p.beam < 1 || p.beam > kMaxBeam) return "a beam keeps 1 to 4096 hypotheses";
  return nullptr;
}

namespace {

const Path* const kPaths[] = {
    &kPlainPath,
#if defined(VQDM_X86)
    &kAvx2Path,
    &kAvx512Path,
#endif
};

}  // namespace

const Path* find_path(const char* name) {
  const Path* found = nullptr;
  for (const Path* path : kPaths)
    if (path->here() && (name == nullptr || std::strcmp(name, path->name) == 0)) found = path;
  return found;
}

const char* path_name(std::size_t index) {
  for (const Path* path : kPaths)
    if (path->here() && index-- == 0) return path->name;
  return nullptr;
}

}  // namespace vqdm
