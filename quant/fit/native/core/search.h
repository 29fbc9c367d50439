// SPDX-License-Identifier: Apache-2.0
// Rows of values as sums of codebook vectors, by the tree search of quant/fit/beam.py, which is its reference.
//
// O outputs, K columns, J vectors of D columns per row (K = J * D), M codebooks of P entries, B hypotheses per row.
// With H = L Lᵀ the loss of an error e is ||e L||², and vector j of e L hears of e's vectors from j on only: the last
// vector is chosen first, and the best B of each row are kept and extended. Every choice adds an entry of each codebook
// in turn, with the best B kept after every one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace vqdm {

constexpr std::int64_t kMaxBooks = 16;
constexpr std::int64_t kMaxEntries = 256;
constexpr std::int64_t kMaxBeam = 4096;
constexpr std::int64_t kMaxColumns = 1 << 16;
constexpr std::int64_t kMaxOutputs = 1 << 24;

// Columns whose errors wait until they are heard of by those before them in one product; a multiple of every D.
constexpr std::int64_t kBlock = 64;
// Rows searched side by side; a multiple of every path's rows of a product.
constexpr std::int64_t kTileRows = 24;
// Entries are padded to this many, which never win.
constexpr std::int64_t kEntryStep = 64;

struct Problem {
  std::int64_t outputs, columns, count, entries, length, beam;
  const float* target;     // [O, K]
  const float* codebooks;  // [M, P, D]
  const float* lower;      // [K, K], L
  std::uint8_t* codes;     // [M, O, J]

  std::int64_t vectors() const { return columns / length; }
  std::int64_t padded_entries() const { return (entries + kEntryStep - 1) / kEntryStep * kEntryStep; }
};

// What all rows share.
struct Shared {
  explicit Shared(const Problem& problem);

  const Problem problem;
  std::vector<float> transposed;  // [M, D, P padded], the codebooks
  std::vector<float> energy;      // [J, M, P padded], ||c L_jj||², infinite where padded
  std::vector<float> diagonal;    // [J, 2, D, D], L_jj and its transpose
  // Blocks of columns from the last on: their part of L's rows from their first column on, [rows, kBlock], with zeros.
  std::vector<float> panels;
  std::vector<std::size_t> panel_starts;
};

struct Path {
  const char* name;
  bool (*here)();  // whether this processor has the instructions
  void (*rows)(const Shared& shared, std::int64_t begin, std::int64_t end);
  // Index of the nearest entry of each point, see nearest.h.
  void (*nearest)(const float* pulls, std::int64_t count, std::int64_t width, const float* features,
                  std::int64_t entries, std::uint8_t* codes);
};

extern const Path kPlainPath;
#if defined(VQDM_X86)
extern const Path kAvx2Path;
extern const Path kAvx512Path;
#endif

// The path of that name, the fastest of this processor for null; null where there is none.
const Path* find_path(const char* name);
const char* path_name(std::size_t index);

// Fills `codes`; the threads are started for the call and joined before it returns.
void search(const Problem& problem, const Path& path, std::int64_t threads);

// Null, or what is wrong with the sizes.
const char* fault(const Problem& problem);

}  // namespace vqdm
