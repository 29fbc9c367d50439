// SPDX-License-Identifier: Apache-2.0
// The search for a tile of rows; compiled once per path.
#pragma once

#include <limits>

#include "lanes.h"
#include "search.h"

namespace vqdm {
namespace {

// A loss above its place, so that one comparison orders candidates, equal ones by place.
std::uint64_t keyed(float loss, std::uint32_t place) {
  std::uint32_t bits;
  std::memcpy(&bits, &loss, sizeof(bits));
  // Positive floats are ordered like their bits, negative ones the other way round.
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  return std::uint64_t{bits} << 32 | place;
}

// Ascending list of the least candidates seen, `beam` of them.
class Least {
 public:
  explicit Least(std::int64_t beam) : beam_(beam), keys_(beam) {}

  void clear() { size_ = 0; }
  std::int64_t size() const { return size_; }
  bool full() const { return size_ == beam_; }
  std::uint32_t place(std::int64_t i) const { return static_cast<std::uint32_t>(keys_[i]); }
  float loss(std::int64_t i) const {
    std::uint32_t bits = static_cast<std::uint32_t>(keys_[i] >> 32);
    bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
    float loss;
    std::memcpy(&loss, &bits, sizeof(loss));
    return loss;
  }

  void add(std::uint64_t key) {
    std::int64_t at = size_;
    if (full()) {
      if (key >= keys_[beam_ - 1]) return;
      at = beam_ - 1;
    } else {
      ++size_;
    }
    for (; at > 0 && keys_[at - 1] > key; --at) keys_[at] = keys_[at - 1];
    keys_[at] = key;
  }

 private:
  const std::int64_t beam_;
  std::int64_t size_ = 0;
  Buffer<std::uint64_t> keys_;
};

// Hypotheses of one row while a vector is chosen, a line each.
template <int D>
struct Lines {
  explicit Lines(const Problem& p)
      : left(p.beam * D), heard(p.beam * D), before(p.beam), origin(p.beam), entries(p.beam * p.count) {}

  void swap(Lines& other) {
    left.swap(other.left);
    heard.swap(other.heard);
    before.swap(other.before);
    origin.swap(other.origin);
    entries.swap(other.entries);
  }

  Buffer<float> left;    // [B, D], the vector less its entries so far
  Buffer<float> heard;   // [B, D], what later vectors' errors add, in terms of e L
  Buffer<float> before;  // [B], loss of the vectors passed
  Buffer<std::int32_t> origin;
  Buffer<std::uint8_t> entries;  // [B, M]
};

template <class L, int D>
class Tile {
  using Vector = typename L::Vector;
  static constexpr std::int64_t kWidth = L::kWidth, kFold = 4 * kWidth;

 public:
  explicit Tile(const Shared& shared)
      : s_(shared), p_(shared.problem), vectors_(p_.vectors()), padded_(p_.padded_entries()), least_(p_.beam), now_(p_),
        next_(p_), pulls_(p_.beam * D), base_(p_.beam), candidates_(p_.beam * padded_),
        feedback_(p_.beam * kBlock), moved_(p_.beam * kBlock), errors_(kTileRows * p_.columns),
        sums_(kTileRows * kBlock), committed_(kTileRows), alive_(kTileRows * (vectors_ + 1)),
        parents_(kTileRows * vectors_ * p_.beam), chosen_(kTileRows * vectors_ * p_.beam * p_.count),
        path_errors_(kTileRows * vectors_ * p_.beam * D), loss_(kTileRows * p_.beam),
        levels_((vectors_ + 1) * p_.beam), widths_(vectors_ + 1), place_(p_.beam) {}

  void run(std::int64_t begin, std::int64_t end) {
    first_row_ = begin;
    errors_.fill(0.0f);
    loss_.fill(0.0f);
    for (std::int64_t row = 0; row < kTileRows; ++row) {
      committed_[row] = vectors_;
      alive(row, vectors_) = 1;
    }
    std::int64_t block = 0;
    for (std::int64_t stop = p_.columns; stop > 0; stop -= kBlock, ++block) {
      const std::int64_t start = stop > kBlock ? stop - kBlock : 0;
      panel_ = s_.panels.data() + s_.panel_starts.data()[block];
      start_ = start;
      for (std::int64_t row = 0; row < end - begin; ++row) commit(row, stop / D);
      hear_committed(end - begin);
      for (std::int64_t row = 0; row < end - begin; ++row) {
        hear_open(row, stop / D);
        for (std::int64_t vector = stop / D - 1; vector >= start / D; --vector) extend(row, vector);
      }
    }
    for (std::int64_t row = 0; row < end - begin; ++row) write(row);
  }

 private:
  std::int32_t& alive(std::int64_t row, std::int64_t vector) { return alive_[row * (vectors_ + 1) + vector]; }
  std::int64_t node(std::int64_t row, std::int64_t vector, std::int64_t line) const {
    return (row * vectors_ + vector) * p_.beam + line;
  }

  std::int32_t* level(std::int64_t vector) { return levels_.data() + vector * p_.beam; }

  // Where all hypotheses of a row come from one, all before it is settled: its errors go to the product of the tile.
  void commit(std::int64_t row, std::int64_t vector) {
    std::int64_t& committed = committed_[row];
    walk(row, vector);
    const std::int64_t settled = top_;
    if (settled == committed) return;
    std::int64_t line = level(settled)[0];
    for (std::int64_t v = settled; v < committed; ++v) {
      const std::int64_t at = node(row, v, line);
      copy(&path_errors_[at * D], D, &errors_[row * p_.columns + v * D]);
      line = parents_[at];
    }
    committed = settled;
  }

  // The lines of each vector that hypotheses of `vector` come from, up to the settled ones or the first where there is
  // one: levels_[v] for v in [vector, top_], where top_ is that vector.
  void walk(std::int64_t row, std::int64_t vector) {
    top_ = vector;
    if (vector == vectors_) return;
    widths_[vector] = alive(row, vector);
    for (std::int32_t line = 0; line < widths_[vector]; ++line) level(vector)[line] = line;
    for (; top_ < committed_[row] && widths_[top_] > 1; ++top_) {
      std::int32_t& width = widths_[top_ + 1] = 0;
      place_.fill(-1);
      for (std::int32_t i = 0; i < widths_[top_]; ++i) {
        const std::int32_t parent = parents_[node(row, top_, level(top_)[i])];
        if (place_[parent] >= 0) continue;
        place_[parent] = width;
        level(top_ + 1)[width++] = parent;
      }
    }
  }

  // sums_ [rows, kBlock]: what the settled errors add to the block's columns.
  void hear_committed(std::int64_t rows) {
    std::int64_t first = vectors_;
    for (std::int64_t row = 0; row < rows; ++row) first = committed_[row] < first ? committed_[row] : first;
    const float* const panel = panel_ + (first * D - start_) * kBlock;
    const std::int64_t depth = p_.columns - first * D;
    const float* const errors = errors_.data() + p_.columns - depth;
    for (std::int64_t row = 0; row < rows; row += L::kRows)
      for (std::int64_t column = 0; column < kBlock; column += L::kColumns * kWidth) {
        Vector sum[L::kRows][L::kColumns] = {};
        for (std::int64_t k = 0; k < depth; ++k) {
          Vector line[L::kColumns];
          for (int c = 0; c < L::kColumns; ++c) line[c] = L::load(panel + k * kBlock + column + c * kWidth);
          for (int r = 0; r < L::kRows; ++r) {
            const Vector error = L::splat(errors[(row + r) * p_.columns + k]);
            for (int c = 0; c < L::kColumns; ++c) sum[r][c] += error * line[c];
          }
        }
        for (int r = 0; r < L::kRows; ++r)
          for (int c = 0; c < L::kColumns; ++c)
            L::store(sums_.data() + (row + r) * kBlock + column + c * kWidth, sum[r][c]);
      }
  }

  // feedback_ [B, kBlock]: the settled errors' part and each hypothesis's own, shared as far as their paths are. After
  // `commit` the walk ends at the settled vectors.
  void hear_open(std::int64_t row, std::int64_t vector) {
    walk(row, vector);
    copy(sums_.data() + row * kBlock, kBlock, feedback_.data());
    for (std::int64_t v = top_ - 1; v >= vector; --v) {
      for (std::int32_t i = 0; v + 1 < vectors_ && i < widths_[v + 1]; ++i) place_[level(v + 1)[i]] = i;
      for (std::int32_t i = 0; i < widths_[v]; ++i) {
        const std::int32_t line = level(v)[i];
        const std::int64_t parent = v + 1 < vectors_ ? place_[parents_[node(row, v, line)]] : 0;
        copy(feedback_.data() + parent * kBlock, kBlock, moved_.data() + i * kBlock);
        hear_error(row, v, line, moved_.data() + i * kBlock);
      }
      feedback_.swap(moved_);
    }
  }

  void hear_error(std::int64_t row, std::int64_t vector, std::int64_t line, float* to) {
    add_product(&path_errors_[node(row, vector, line) * D], panel_ + (vector * D - start_) * kBlock, kBlock, to);
  }

  // to[columns] += error [D] times the rows of L.
  static void add_product(const float* error, const float* rows, std::int64_t columns, float* to) {
    for (std::int64_t c = 0; c < columns; c += kWidth) {
      Vector sum = L::load(to + c);
      for (int d = 0; d < D; ++d) sum += L::load(rows + d * kBlock + c) * error[d];
      L::store(to + c, sum);
    }
  }

  void extend(std::int64_t row, std::int64_t vector) {
    const std::int64_t here = vector * D - start_;
    std::int64_t lines = alive(row, vector + 1);
    const float* const target = p_.target + (first_row_ + row) * p_.columns + vector * D;
    for (std::int64_t b = 0; b < lines; ++b) {
      copy(target, D, &now_.left[b * D]);
      copy(feedback_.data() + b * kBlock + here, D, &now_.heard[b * D]);
      now_.before[b] = loss_[row * p_.beam + b];
      now_.origin[b] = static_cast<std::int32_t>(b);
    }
    for (std::int64_t book = 0; book < p_.count; ++book) {
      look(lines, vector, book);
      choose(lines);
      lines = least_.size();
      for (std::int64_t b = 0; b < lines; ++b) take(b, book);
      now_.swap(next_);
    }
    alive(row, vector) = static_cast<std::int32_t>(lines);
    // Columns from `here` on are done; a whole number of lanes is moved.
    const std::int64_t open = (here + kWidth - 1) / kWidth * kWidth;
    for (std::int64_t b = 0; b < lines; ++b) {
      const std::int64_t at = node(row, vector, b);
      parents_[at] = now_.origin[b];
      loss_[row * p_.beam + b] = least_.loss(b);
      copy(&now_.entries[b * p_.count], p_.count, &chosen_[at * p_.count]);
      copy(&now_.left[b * D], D, &path_errors_[at * D]);
      copy(feedback_.data() + now_.origin[b] * kBlock, open, moved_.data() + b * kBlock);
      add_product(&now_.left[b * D], panel_ + here * kBlock, open, moved_.data() + b * kBlock);
    }
    feedback_.swap(moved_);
  }

  // Loss of every line with every entry, ||w - c L_jj||² + before = base + energy - 2 w L_jjᵀ · c, and `bound_`, which
  // the B least are not above.
  void look(std::int64_t lines, std::int64_t vector, std::int64_t book) {
    typedef float Own __attribute__((vector_size(D * sizeof(float))));
    const float* const block = s_.diagonal.data() + vector * 2 * D * D;
    Own rows[D], columns[D];
    std::memcpy(rows, block, sizeof(rows));
    std::memcpy(columns, block + D * D, sizeof(columns));
    for (std::int64_t b = 0; b < lines; ++b) {
      Own wanted, pull{};
      std::memcpy(&wanted, &now_.heard[b * D], sizeof(wanted));
      for (int d = 0; d < D; ++d) wanted += rows[d] * now_.left[b * D + d];
      float parts[D], norm = 0;
      std::memcpy(parts, &wanted, sizeof(parts));
      for (int e = 0; e < D; ++e) {
        norm += parts[e] * parts[e];
        pull += columns[e] * parts[e];
      }
      pull *= -2.0f;
      std::memcpy(&pulls_[b * D], &pull, sizeof(pull));
      base_[b] = now_.before[b] + norm;
    }
    for (float& each : minima_) each = std::numeric_limits<float>::infinity();
    std::int64_t b = 0;
    for (; b + L::kTogether <= lines; b += L::kTogether) score<L::kTogether>(b, vector, book);
    for (; b < lines; ++b) score<1>(b, vector, book);
    bound_ = bound();
  }

  // The B-th least of the minima of twice as many shares of all candidates.
  float bound() {
    std::int64_t shares = kFold;
    if (2 * p_.beam > shares) return std::numeric_limits<float>::infinity();
    for (; shares / 2 >= 2 * p_.beam; shares /= 2)
      for (std::int64_t i = 0; i < shares / 2; ++i)
        minima_[i] = minima_[i + shares / 2] < minima_[i] ? minima_[i + shares / 2] : minima_[i];
    float most = -std::numeric_limits<float>::infinity();
    for (std::int64_t i = 0; i < shares; ++i) {
      std::int32_t below = 0;
      for (std::int64_t j = 0; j < shares; ++j) below += minima_[j] < minima_[i];
      most = below < p_.beam && minima_[i] > most ? minima_[i] : most;
    }
    return most;
  }

  template <int Count>
  void score(std::int64_t line, std::int64_t vector, std::int64_t book) {
    const float* const energy = s_.energy.data() + (vector * p_.count + book) * padded_;
    const float* const entries = s_.transposed.data() + book * D * padded_;
    float* const to = candidates_.data() + line * padded_;
    Vector pull[Count][D], base[Count];
    for (int i = 0; i < Count; ++i) {
      base[i] = L::splat(base_[line + i]);
      for (int d = 0; d < D; ++d) pull[i][d] = L::splat(pulls_[(line + i) * D + d]);
    }
    for (std::int64_t entry = 0; entry < padded_; entry += kFold)
      for (std::int64_t lane = 0; lane < kFold; lane += kWidth) {
        const Vector own = L::load(energy + entry + lane);
        Vector sum[Count], least = L::load(minima_ + lane);
        for (int i = 0; i < Count; ++i) sum[i] = own + base[i];
        for (int d = 0; d < D; ++d) {
          const Vector values = L::load(entries + d * padded_ + entry + lane);
          for (int i = 0; i < Count; ++i) sum[i] += values * pull[i][d];
        }
        for (int i = 0; i < Count; ++i) {
          L::store(to + i * padded_ + entry + lane, sum[i]);
          least = L::least(sum[i], least);
        }
        L::store(minima_ + lane, least);
      }
  }

  void choose(std::int64_t lines) {
    least_.clear();
    for (std::int64_t first = 0; first < lines * padded_; first += kFold) {
      const float* const from = candidates_.data() + first;
      Vector lowest = L::load(from);
      for (std::int64_t lane = kWidth; lane < kFold; lane += kWidth) lowest = L::least(L::load(from + lane), lowest);
      if (L::up_to(lowest, bound_) == 0) continue;
      for (std::int64_t lane = 0; lane < kFold; lane += kWidth)
        for (std::uint32_t bits = L::up_to(L::load(from + lane), bound_); bits; bits &= bits - 1)
          consider(first + lane + __builtin_ctz(bits));
    }
    // Losses that are no numbers are below nothing.
    if (least_.size() == 0) least_.add(keyed(std::numeric_limits<float>::infinity(), 0));
  }

  void consider(std::int64_t place) {
    if (padded_ != p_.entries && place % padded_ >= p_.entries) return;
    least_.add(keyed(candidates_[place], static_cast<std::uint32_t>(place)));
    if (least_.full()) bound_ = least_.loss(p_.beam - 1);
  }

  // Line b of `next_` is what candidate b makes of its line.
  void take(std::int64_t b, std::int64_t book) {
    const std::int64_t from = least_.place(b) / padded_, won = least_.place(b) % padded_;
    const float* const entry = p_.codebooks + (book * p_.entries + won) * D;
    for (int d = 0; d < D; ++d) next_.left[b * D + d] = now_.left[from * D + d] - entry[d];
    copy(&now_.heard[from * D], D, &next_.heard[b * D]);
    copy(&now_.entries[from * p_.count], book, &next_.entries[b * p_.count]);
    next_.entries[b * p_.count + book] = static_cast<std::uint8_t>(won);
    next_.before[b] = now_.before[from];
    next_.origin[b] = now_.origin[from];
  }

  // The codes of the best hypothesis, the first vector's choice first.
  void write(std::int64_t row) {
    const float* const loss = loss_.data() + row * p_.beam;
    std::int64_t line = 0;
    for (std::int64_t b = 1; b < alive(row, 0); ++b) line = loss[b] < loss[line] ? b : line;
    for (std::int64_t vector = 0; vector < vectors_; ++vector) {
      const std::int64_t at = node(row, vector, line);
      for (std::int64_t book = 0; book < p_.count; ++book)
        p_.codes[(book * p_.outputs + first_row_ + row) * vectors_ + vector] = chosen_[at * p_.count + book];
      line = parents_[at];
    }
  }

  const Shared& s_;
  const Problem& p_;
  const std::int64_t vectors_, padded_;
  Least least_;
  Lines<D> now_, next_;
  Buffer<float> pulls_, base_, candidates_, feedback_, moved_, errors_, sums_;
  Buffer<std::int64_t> committed_;
  Buffer<std::int32_t> alive_;  // [rows, J + 1], hypotheses after each vector
  Buffer<std::int32_t> parents_;
  Buffer<std::uint8_t> chosen_;
  Buffer<float> path_errors_, loss_;
  Buffer<std::int32_t> levels_, widths_, place_;
  float minima_[kFold];
  float bound_ = 0;
  const float* panel_ = nullptr;
  std::int64_t start_ = 0, first_row_ = 0, top_ = 0;
};

template <class L>
void search_rows(const Shared& shared, std::int64_t begin, std::int64_t end) {
  switch (shared.problem.length) {
    case 2: return Tile<L, 2>(shared).run(begin, end);
    case 4: return Tile<L, 4>(shared).run(begin, end);
    default: return Tile<L, 8>(shared).run(begin, end);
  }
}

}  // namespace
}  // namespace vqdm
