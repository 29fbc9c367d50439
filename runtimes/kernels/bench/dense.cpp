// SPDX-License-Identifier: Apache-2.0
// What the codebook kernels are measured against: the same loops and the same micro-kernel on dense weights that were
// packed before, so that the difference is the decoding alone. Used by benchmarks/codebook_kernel.py only.
#include <cstring>
#include <memory>

#include "../core/c_api.h"
#include "../core/multiply.h"

namespace codebook {
namespace {

#if defined(CODEBOOK_X86)
using Tile = VectorTile<8, 2, 6>;
#else
using Tile = VectorTile<4, 4, 6>;
#endif

// Blocks in the order in which `multiply` asks for them, each as its panels.
struct PackedPanels {
  float* packed;
  std::int64_t all_columns;

  float* panels(Range outputs, Range columns) const {
    const std::int64_t panels = (outputs.end - outputs.begin + Tile::columns - 1) / Tile::columns;
    return packed + outputs.begin * all_columns + columns.begin * panels * Tile::columns;
  }
};

std::int64_t block_end(std::int64_t begin, std::int64_t block, std::int64_t all) { return smaller(begin + block, all); }

}  // namespace
}  // namespace codebook

extern "C" {

// Fills `packed` (outputs rounded up to 128, times columns) from fp32 weights [outputs, columns].
CODEBOOK_API void dense_pack(const float* weights, std::int64_t outputs, std::int64_t columns, float* packed) {
  using namespace codebook;
  const PackedPanels source{packed, columns};
  for (std::int64_t n = 0; n < outputs; n += kBlockOutputs)
    for (std::int64_t k = 0; k < columns; k += kBlockColumns) {
      const Range rows{n, block_end(n, kBlockOutputs, outputs)}, depth{k, block_end(k, kBlockColumns, columns)};
      float* panel = source.panels(rows, depth);
      for (std::int64_t first = n; first < rows.end; first += Tile::columns)
        for (std::int64_t c = k; c < depth.end; ++c)
          for (std::int64_t j = 0; j < Tile::columns; ++j)
            *panel++ = first + j < rows.end ? weights[(first + j) * columns + c] : 0.0f;
    }
}

// y [rows, outputs] = x [rows, columns] Wᵀ, on the calling thread.
CODEBOOK_API void dense_linear(float* packed, std::int64_t outputs, std::int64_t columns, const float* x,
                               std::int64_t rows, float* y) {
  using namespace codebook;
  for (std::int64_t n = 0; n < outputs; n += kBlockOutputs)
    multiply<Tile>(PackedPanels{packed, columns}, nullptr, columns, outputs,
                   {x, y, {0, rows}, {n, block_end(n, kBlockOutputs, outputs)}});
}
}
