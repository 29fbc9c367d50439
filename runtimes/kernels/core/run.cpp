// SPDX-License-Identifier: Apache-2.0
// Cuts a layer into units, hands them to the host's threads, and picks the path.
#include <atomic>
#include <cstdio>
#include <initializer_list>
#include <new>

#include "decode.h"
#include "half.h"
#include "path.h"

namespace codebook {
namespace {

constexpr std::align_val_t kAlignment{64};

// Memory that is given back at the end of the scope; null when there is none left.
class Floats {
 public:
  explicit Floats(std::size_t count)
      : data_(static_cast<float*>(::operator new(count * sizeof(float), kAlignment, std::nothrow))) {}
  ~Floats() { ::operator delete(data_, kAlignment); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

Status out_of_memory(std::size_t bytes) {
  Status status;
  status.code = Code::kOutOfMemory;
  std::snprintf(status.message, sizeof status.message, "no memory for %zu bytes of scratch", bytes);
  return status;
}

void fill_table(const Weights& weights, float* table) {
  const std::int64_t used = weights.entries * weights.length, all = kTableEntries * weights.length;
  for (std::int64_t m = 0; m < weights.books; ++m)
    for (std::int64_t i = 0; i < all; ++i)
      table[m * all + i] = i < used ? half_to_float(weights.codebooks[m * used + i]) : 0.0f;
}

// `all` cut into equal pieces (the last may be shorter), each a multiple of `grain` and at most `most`.
struct Cut {
  std::int64_t all, piece;

  Cut(std::int64_t all_, std::int64_t pieces, std::int64_t grain, std::int64_t most) : all(all_) {
    const std::int64_t wanted = (all + pieces - 1) / pieces;
    piece = (wanted + grain - 1) / grain * grain;
    piece = piece < 1 ? grain : piece > most ? most : piece;
  }
  std::int64_t count() const { return (all + piece - 1) / piece; }
  Range operator[](std::int64_t i) const {
    const std::int64_t end = (i + 1) * piece;
    return {i * piece, end < all ? end : all};
  }
};

// Calls unit(i, scratch) for every i < count from the host's threads: a thread takes the next one when it is done, so
// slow cores do not hold up fast ones.
template <class Unit>
Status share(const Threads& threads, std::int64_t count, const Unit& unit) {
  struct Work {
    const Unit& unit;
    std::int64_t count;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
  } work{unit, count};
  const auto task = [](void* argument, std::size_t) {
    Work& shared = *static_cast<Work*>(argument);
    std::int64_t i = shared.next.fetch_add(1);
    if (i >= shared.count) return;
    const Floats scratch(kScratchFloats);
    if (scratch.get() == nullptr) shared.failed = true;
    for (; i < shared.count && !shared.failed; i = shared.next.fetch_add(1)) shared.unit(i, scratch.get());
  };
  const std::size_t tasks =
      threads.count < static_cast<std::size_t>(count) ? threads.count : static_cast<std::size_t>(count);
  if (threads.run == nullptr || tasks < 2) {
    task(&work, 0);
  } else {
    threads.run(threads.pool, tasks, task, &work);
  }
  return work.failed ? out_of_memory(scratch_bytes_per_thread()) : Status{};
}

// Two units a thread, or as many as the rows or pixels give when there are few outputs.
struct Cuts {
  Cut outputs, others;

  Cuts(std::int64_t all_outputs, std::int64_t all_others, std::int64_t grain, const Threads& threads)
      : outputs(all_outputs, threads.run ? 2 * clipped(threads.count) : 1, kMaxPanel, kBlockOutputs),
        others(all_others, threads.run ? (clipped(threads.count) + outputs.count() - 1) / outputs.count() : 1, grain,
               all_others > grain ? (all_others + grain - 1) / grain * grain : grain) {}
  std::int64_t count() const { return outputs.count() * others.count(); }

  static std::int64_t clipped(std::size_t threads) { return threads < 1 ? 1 : threads > 64 ? 64 : threads; }
};

}  // namespace

const Path* const* paths() {
  static const Path* found[5] = {};
  static const bool filled = [] {
    int count = 0;
    for (const Path* path : {
             &kScalarPath,
#if defined(CODEBOOK_X86)
             &kAvx2Path,
             &kAvx512Path,
#elif defined(CODEBOOK_NEON)
             &kNeonPath,
#endif
         })
      if (path->here()) found[count++] = path;
    return true;
  }();
  static_cast<void>(filled);
  return found;
}

const char* path_name(const Path* path) { return path->name; }

static const Path& fastest() {
  const Path* const* path = paths();
  while (path[1] != nullptr) ++path;
  return **path;
}

std::size_t scratch_bytes_per_thread() { return kScratchFloats * sizeof(float); }

std::size_t table_bytes(const Weights& weights) {
  return static_cast<std::size_t>(weights.books * kTableEntries * weights.length) * sizeof(float);
}

Status linear(const Weights& weights, const float* x, std::int64_t rows, std::int64_t columns, float* y,
              const Threads& threads, const Path* path) {
  const Status status = check_linear(weights, rows, columns);
  if (!status.ok() || rows == 0) return status;
  const Floats table(table_bytes(weights) / sizeof(float));
  if (table.get() == nullptr) return out_of_memory(table_bytes(weights));
  fill_table(weights, table.get());
  const Path& chosen = path ? *path : fastest();
  const Decodable decodable{weights, table.get()};
  const Cuts cuts(weights.outputs, rows, kBlockRows, threads);
  return share(threads, cuts.count(), [&](std::int64_t i, float* scratch) {
    const std::int64_t blocks = cuts.outputs.count();
    chosen.linear(decodable, {x, y, cuts.others[i / blocks], cuts.outputs[i % blocks]}, scratch);
  });
}

Status conv2d(const Weights& weights, const Conv2d& layer, const float* x, const std::int64_t x_shape[4], float* y,
              const Threads& threads, const Path* path) {
  std::int64_t y_shape[4];
  const Status status = check_conv2d(weights, layer, x_shape, y_shape);
  if (!status.ok() || x_shape[0] == 0) return status;
  const Floats table(table_bytes(weights) / sizeof(float));
  if (table.get() == nullptr) return out_of_memory(table_bytes(weights));
  fill_table(weights, table.get());
  const Path& chosen = path ? *path : fastest();
  const Decodable decodable{weights, table.get()};
  const std::int64_t pixels = y_shape[2] * y_shape[3];
  const Cuts cuts(weights.outputs, pixels, kMaxPanel, threads);
  return share(threads, x_shape[0] * cuts.count(), [&](std::int64_t i, float* scratch) {
    const std::int64_t image = i / cuts.count(), part = i % cuts.count(), blocks = cuts.outputs.count();
    chosen.conv2d(decodable, layer,
                  {x + image * x_shape[1] * x_shape[2] * x_shape[3], y + image * weights.outputs * pixels, x_shape[1],
                   x_shape[2], x_shape[3], y_shape[3], pixels, cuts.outputs[part % blocks], cuts.others[part / blocks]},
                  scratch);
  });
}

Status decode(const Weights& weights, float* dense) {
  const Floats table(table_bytes(weights) / sizeof(float));
  if (table.get() == nullptr) return out_of_memory(table_bytes(weights));
  fill_table(weights, table.get());
  const Decodable decodable{weights, table.get()};
  for (std::int64_t n = 0; n < weights.outputs; ++n)
    decode_row(decodable, half_to_float(weights.scale[n]), n, {0, weights.columns()}, dense + n * weights.columns());
  return {};
}

}  // namespace codebook
