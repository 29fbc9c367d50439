// SPDX-License-Identifier: Apache-2.0
// fuzz RUNS [SEED]: searches of all shapes on every path, built under sanitizers. Arrays lie on the heap in exactly
// their sizes. Small ones are held against every choice there is, where the beam is wide enough to keep them all; the
// paths are held against each other. Prints how many ran and how many were refused; any fault ends the process.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "search.h"

namespace {

std::mt19937_64 random_bits;

std::int64_t between(std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(random_bits() % static_cast<std::uint64_t>(high - low + 1));
}
bool once_in(int n) { return between(1, n) == 1; }
float normal() { return std::normal_distribution<float>()(random_bits); }

void require(bool truth, const char* what) {
  if (truth) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

std::unique_ptr<float[]> normals(std::int64_t count) {
  std::unique_ptr<float[]> made(new float[static_cast<std::size_t>(count)]);
  for (std::int64_t i = 0; i < count; ++i) made[static_cast<std::size_t>(i)] = normal();
  return made;
}

struct Layer {
  vqdm::Problem sizes;
  std::unique_ptr<float[]> target, codebooks, lower;

  explicit Layer(const vqdm::Problem& p)
      : sizes(p), target(normals(p.outputs * p.columns)), codebooks(normals(p.count * p.entries * p.length)),
        lower(normals(p.columns * p.columns)) {
    for (std::int64_t i = 0; i < p.columns; ++i)
      for (std::int64_t j = 0; j < p.columns; ++j) {
        float& value = lower[static_cast<std::size_t>(i * p.columns + j)];
        value = j > i ? 0 : j == i ? 0.1f + std::fabs(value) : value / std::sqrt(static_cast<float>(p.columns));
      }
    if (once_in(20)) target[0] = once_in(2) ? NAN : INFINITY;
    sizes.target = target.get();
    sizes.codebooks = codebooks.get();
    sizes.lower = lower.get();
  }

  std::vector<std::uint8_t> searched(const vqdm::Path& path) const {
    std::unique_ptr<std::uint8_t[]> codes(new std::uint8_t[static_cast<std::size_t>(total())]);
    vqdm::Problem problem = sizes;
    problem.codes = codes.get();
    vqdm::search(problem, path, between(1, 3));
    for (std::int64_t i = 0; i < total(); ++i) require(codes[static_cast<std::size_t>(i)] < sizes.entries, "no such entry");
    return {codes.get(), codes.get() + total()};
  }
  std::int64_t total() const { return sizes.count * sizes.outputs * sizes.vectors(); }

  // ||(target - Σ vectors) L||² of a row.
  double loss(const std::vector<std::uint8_t>& codes, std::int64_t row) const {
    std::vector<double> error(static_cast<std::size_t>(sizes.columns));
    for (std::int64_t k = 0; k < sizes.columns; ++k) {
      double& left = error[static_cast<std::size_t>(k)];
      left = target[static_cast<std::size_t>(row * sizes.columns + k)];
      for (std::int64_t m = 0; m < sizes.count; ++m) {
        const std::int64_t place = (m * sizes.outputs + row) * sizes.vectors() + k / sizes.length;
        left -= entry(m, codes[static_cast<std::size_t>(place)], k % sizes.length);
      }
    }
    double sum = 0;
    for (std::int64_t j = 0; j < sizes.columns; ++j) {
      double seen = 0;
      for (std::int64_t k = j; k < sizes.columns; ++k)
        seen += error[static_cast<std::size_t>(k)] * lower[static_cast<std::size_t>(k * sizes.columns + j)];
      sum += seen * seen;
    }
    return sum;
  }
  float entry(std::int64_t book, std::int64_t code, std::int64_t column) const {
    return codebooks[static_cast<std::size_t>((book * sizes.entries + code) * sizes.length + column)];
  }

  // The least loss of a row that any codes have; `codes` are tried in place.
  double least(std::vector<std::uint8_t>& codes, std::int64_t row, std::int64_t choice = 0) const {
    if (choice == sizes.count * sizes.vectors()) return loss(codes, row);
    const std::int64_t book = choice / sizes.vectors(), vector = choice % sizes.vectors();
    double best = INFINITY;
    for (std::int64_t code = 0; code < sizes.entries; ++code) {
      codes[static_cast<std::size_t>((book * sizes.outputs + row) * sizes.vectors() + vector)] =
          static_cast<std::uint8_t>(code);
      best = std::fmin(best, least(codes, row, choice + 1));
    }
    return best;
  }
};

vqdm::Problem sizes() {
  vqdm::Problem p{};
  p.length = std::int64_t{2} << between(0, 2);
  p.outputs = between(1, 30);
  p.columns = p.length * between(1, once_in(5) ? 40 : 12);
  p.count = between(1, 3);
  p.entries = once_in(3) ? between(1, 256) : between(1, 20);
  p.beam = once_in(4) ? between(1, 70) : between(1, 9);
  if (once_in(3)) {  // every choice is kept
    p.entries = 2;
    p.columns = p.length * between(1, 3);
    p.count = 2;
    p.beam = std::int64_t{1} << (2 * p.vectors());
  }
  std::int64_t* const all[] = {&p.outputs, &p.columns, &p.count, &p.entries, &p.length, &p.beam};
  if (once_in(4)) *all[between(0, 5)] = (once_in(2) ? 1 : -1) * ((std::int64_t{1} << between(0, 62)) + between(-1, 1));
  return p;
}

bool run() {
  const vqdm::Problem p = sizes();
  if (vqdm::fault(p) != nullptr) return false;
  if (p.outputs > 64 || p.columns > 512 || p.beam > 256 || p.count > 4) return false;  // right, and not for a short run
  const Layer layer(p);
  std::vector<double> first(static_cast<std::size_t>(p.outputs));
  for (std::size_t i = 0; vqdm::path_name(i) != nullptr; ++i) {
    std::vector<std::uint8_t> codes = layer.searched(*vqdm::find_path(vqdm::path_name(i)));
    for (std::int64_t row = 0; row < p.outputs; ++row) {
      const double found = layer.loss(codes, row);
      double& other = first[static_cast<std::size_t>(row)];
      if (i == 0) other = found;
      // A beam may lose a path to rounding where two losses are all but equal; never by much.
      require(!std::isfinite(found) || std::fabs(found - other) <= 0.05 * other + 1e-3, "the paths differ");
      double kept = 1;
      for (std::int64_t choice = 0; choice < p.count * p.vectors(); ++choice) kept *= static_cast<double>(p.entries);
      if (kept > static_cast<double>(p.beam) || kept > 4096 || !std::isfinite(found)) continue;
      std::vector<std::uint8_t> tried = codes;
      require(found <= layer.least(tried, row) * 1.001 + 1e-4, "better codes were kept and not taken");
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const long runs = count > 1 ? std::atol(arguments[1]) : 1000;
  random_bits.seed(count > 2 ? static_cast<std::uint64_t>(std::atoll(arguments[2])) : 0);
  long refused = 0;
  for (long i = 0; i < runs; ++i) refused += run() ? 0 : 1;
  std::printf("%ld searches: %ld refused\n", runs, refused);
}
