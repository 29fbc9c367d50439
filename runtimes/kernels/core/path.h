// SPDX-License-Identifier: Apache-2.0
// What a path computes, and how its work is cut into units.
#pragma once

#include "codebook.h"

namespace codebook {

// One book's share of the table always has room for every byte, so no code can lead outside it.
constexpr std::int64_t kTableEntries = 256;
constexpr std::int64_t kMaxBooks = 8;
constexpr std::int64_t kMaxLength = 8;

// Columns of W decoded at once, a multiple of every vector length; with kBlockOutputs rows they fill half of a small
// L2 cache, and a panel of them fits L1.
constexpr std::int64_t kBlockColumns = 256;
constexpr std::int64_t kBlockOutputs = 128;
constexpr std::int64_t kBlockRows = 96;
constexpr std::int64_t kMaxPanel = 32;
constexpr std::int64_t kTransposed = 8;  // rows of W that are turned into panel columns together
constexpr std::size_t kScratchFloats =
    static_cast<std::size_t>(kBlockColumns * (kBlockOutputs + kMaxPanel + kTransposed));

// Weights ready to be decoded: `table` fp32 [books, 256, length], unused entries zero.
struct Decodable {
  Weights weights;
  const float* table;
};

// A half-open range.
struct Range {
  std::int64_t begin, end;
};

// A unit of a Linear: `outputs` (begin a multiple of the panel) of `rows`.
struct LinearUnit {
  const float* x;
  float* y;
  Range rows, outputs;
};

// A unit of a Conv2d: `outputs` of one image's `pixels`; x [I, height, width], y [outputs, pixels in all].
struct Conv2dUnit {
  const float* x;
  float* y;
  std::int64_t channels, height, width, y_width, y_pixels;
  Range outputs, pixels;
};

struct Path {
  const char* name;
  bool (*here)();  // whether this processor has the instructions
  void (*linear)(const Decodable& weights, const LinearUnit& unit, float* scratch);
  void (*conv2d)(const Decodable& weights, const Conv2d& layer, const Conv2dUnit& unit, float* scratch);
};

extern const Path kScalarPath;
#if defined(CODEBOOK_X86)
extern const Path kAvx2Path;
extern const Path kAvx512Path;
#elif defined(CODEBOOK_NEON)
extern const Path kNeonPath;
#endif

}  // namespace codebook
