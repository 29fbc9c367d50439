// SPDX-License-Identifier: Apache-2.0
// Linear: decode a block of W into panels, then a blocked matrix product over all rows.
#pragma once

#include "decode.h"
#include "half.h"
#include "path.h"
#include "tile.h"
#include "transpose.h"

namespace codebook {
namespace {

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Panels decoded into scratch: [panel][depth][Tile::columns], outputs beyond the last are zero.
template <class Tile>
struct DecodedPanels {
  const Decodable& decodable;
  float* scratch;

  const float* panels(Range outputs, Range columns) const {
    const std::int64_t depth = columns.end - columns.begin;
    float* rows = scratch + kBlockColumns * kBlockOutputs;
    float* panel = scratch;
    for (std::int64_t n = outputs.begin; n < outputs.end; n += Tile::columns, panel += depth * Tile::columns)
      for (std::int64_t first = 0; first < Tile::columns; first += kTransposed) {
        for (std::int64_t r = 0; r < kTransposed; ++r) decode_or_clear(n + first + r, outputs.end, columns, rows, r);
        transpose_eight(rows, depth, Tile::columns, panel + first);
      }
    return scratch;
  }

 private:
  void decode_or_clear(std::int64_t output, std::int64_t end, Range columns, float* rows, std::int64_t r) const {
    float* row = rows + r * kBlockColumns;
    if (output < end)
      return decode_row(decodable, half_to_float(decodable.weights.scale[output]), output, columns, row);
    for (std::int64_t k = 0; k < columns.end - columns.begin; ++k) row[k] = 0.0f;
  }
};

// y [rows, outputs] of the unit; `source.panels` gives the weights of a block. Outputs are at most kBlockOutputs.
template <class Tile, class Source>
void multiply(const Source& source, const float* bias, std::int64_t all_columns, std::int64_t all_outputs,
              const LinearUnit& unit) {
  const Range rows = unit.rows, outputs = unit.outputs;
  for (std::int64_t m = rows.begin; m < rows.end; ++m)
    for (std::int64_t n = outputs.begin; n < outputs.end; ++n) unit.y[m * all_outputs + n] = bias ? bias[n] : 0.0f;
  for (std::int64_t k = 0; k < all_columns; k += kBlockColumns) {
    const std::int64_t depth = smaller(kBlockColumns, all_columns - k);
    const float* panels = source.panels(outputs, {k, k + depth});
    for (std::int64_t block = rows.begin; block < rows.end; block += kBlockRows) {
      const std::int64_t block_end = smaller(block + kBlockRows, rows.end);
      const float* panel = panels;
      for (std::int64_t n = outputs.begin; n < outputs.end; n += Tile::columns, panel += depth * Tile::columns)
        for (std::int64_t m = block; m < block_end; m += Tile::rows)
          add_tile<Tile>(smaller(Tile::rows, block_end - m), smaller(Tile::columns, outputs.end - n),
                         unit.x + m * all_columns + k, all_columns, panel, depth, unit.y + m * all_outputs + n,
                         all_outputs);
    }
  }
}

template <class Tile>
void linear_unit(const Decodable& decodable, const LinearUnit& unit, float* scratch) {
  const Weights& weights = decodable.weights;
  multiply<Tile>(DecodedPanels<Tile>{decodable, scratch}, weights.bias, weights.columns(), weights.outputs, unit);
}

}  // namespace
}  // namespace codebook
