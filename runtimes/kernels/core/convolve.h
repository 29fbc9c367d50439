// SPDX-License-Identifier: Apache-2.0
// Conv2d: decode rows of W, gather the pixels they meet, one panel at a time, and multiply.
#pragma once

#include <cstring>

#include "decode.h"
#include "half.h"
#include "path.h"
#include "tile.h"

namespace codebook {
namespace {

// Where a panel of neighbouring output pixels finds its inputs at one tap, the same in every channel.
template <std::int64_t kPixels>
struct Gather {
  std::int64_t place[kPixels];  // within the channel, or -1 for padding
  std::uint32_t mask[kPixels];  // all ones, or 0 for padding
  std::int64_t start;           // first place when places follow one another, padding included and within the channel
  bool whole;                   // a run without padding

  Gather(const Conv2d& layer, const Conv2dUnit& unit, std::int64_t tap, std::int64_t first) {
    const std::int64_t tap_y = tap / layer.kernel[1] * layer.dilation[0] - layer.padding[0];
    const std::int64_t tap_x = tap % layer.kernel[1] * layer.dilation[1] - layer.padding[1];
    bool run = layer.stride[0] == 1 && layer.stride[1] == 1;
    whole = true;
    start = -1;
    for (std::int64_t j = 0; j < kPixels; ++j) {
      const std::int64_t pixel = first + j;
      const std::int64_t y = pixel / unit.y_width * layer.stride[0] + tap_y;
      const std::int64_t x = pixel % unit.y_width * layer.stride[1] + tap_x;
      const bool inside = pixel < unit.pixels.end && y >= 0 && y < unit.height && x >= 0 && x < unit.width;
      place[j] = inside ? y * unit.width + x : -1;
      mask[j] = inside ? ~0u : 0u;
      whole = whole && inside;
      if (j == 0) start = y * unit.width + x;
      run = run && y * unit.width + x == start + j;
    }
    if (!run || start < 0 || start + kPixels > unit.height * unit.width) start = -1;
  }

  void copy(const float* channel, float* panel) const {
    if (start >= 0 && whole) {
      std::memcpy(panel, channel + start, sizeof(float) * kPixels);
    } else if (start >= 0) {
      std::uint32_t bits[kPixels];
      std::memcpy(bits, channel + start, sizeof bits);
      for (std::int64_t j = 0; j < kPixels; ++j) bits[j] &= mask[j];
      std::memcpy(panel, bits, sizeof bits);
    } else {
      for (std::int64_t j = 0; j < kPixels; ++j) panel[j] = place[j] < 0 ? 0.0f : channel[place[j]];
    }
  }
};

// panel [depth, kPixels]: the inputs of the pixels from `first` on, for W's `columns`.
template <std::int64_t kPixels>
void gather_panel(const Conv2d& layer, const Conv2dUnit& unit, Range columns, std::int64_t first, float* panel) {
  for (std::int64_t k = columns.begin; k < columns.end;) {
    const std::int64_t tap = k / unit.channels;
    const Gather<kPixels> gather(layer, unit, tap, first);
    const std::int64_t tap_end = (tap + 1) * unit.channels;
    const float* channel = unit.x + (k - tap * unit.channels) * unit.height * unit.width;
    for (; k < tap_end && k < columns.end; ++k, channel += unit.height * unit.width, panel += kPixels)
      gather.copy(channel, panel);
  }
}

// y [outputs, pixels] of the unit. Outputs are at most kBlockOutputs.
template <class Tile>
void conv2d_unit(const Decodable& decodable, const Conv2d& layer, const Conv2dUnit& unit, float* scratch) {
  const Weights& weights = decodable.weights;
  const Range outputs = unit.outputs, pixels = unit.pixels;
  float* panel = scratch + kBlockColumns * kBlockOutputs;
  for (std::int64_t n = outputs.begin; n < outputs.end; ++n)
    for (std::int64_t p = pixels.begin; p < pixels.end; ++p)
      unit.y[n * unit.y_pixels + p] = weights.bias ? weights.bias[n] : 0.0f;
  for (std::int64_t k = 0; k < weights.columns(); k += kBlockColumns) {
    const Range columns = {k, k + kBlockColumns < weights.columns() ? k + kBlockColumns : weights.columns()};
    const std::int64_t depth = columns.end - columns.begin;
    for (std::int64_t n = outputs.begin; n < outputs.end; ++n)
      decode_row(decodable, half_to_float(weights.scale[n]), n, columns, scratch + (n - outputs.begin) * depth);
    for (std::int64_t p = pixels.begin; p < pixels.end; p += Tile::columns) {
      const std::int64_t width = pixels.end - p < Tile::columns ? pixels.end - p : Tile::columns;
      gather_panel<Tile::columns>(layer, unit, columns, p, panel);
      for (std::int64_t n = outputs.begin; n < outputs.end; n += Tile::rows)
        add_tile<Tile>(outputs.end - n < Tile::rows ? outputs.end - n : Tile::rows, width,
                       scratch + (n - outputs.begin) * depth, depth, panel, depth, unit.y + n * unit.y_pixels + p,
                       unit.y_pixels);
    }
  }
}

}  // namespace
}  // namespace codebook
