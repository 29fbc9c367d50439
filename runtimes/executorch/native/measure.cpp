// SPDX-License-Identifier: Apache-2.0
#include "measure.h"

#include <chrono>
#include <cstdio>

#include "model.h"
#include "process.h"

namespace runner {

namespace {

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

void print(const char* name, const Resident& found) {
  printf("\"%s\": {\"anon_bytes\": %lld, \"file_bytes\": %lld}, ", name, (long long)found.anonymous,
         (long long)found.file);
}

}  // namespace

void measure(const std::string& program, const std::string& data, int runs) {
  const Resident start = resident();
  const auto begun = Clock::now();
  Model model(program, data);
  const double load_ms = ms_since(begun);
  const Resident loaded = resident();
  auto inputs = model.zero_inputs();
  const std::vector<std::string> names(model.output_count(), "output");
  std::string run_ms;
  Resident ran{};
  int64_t mapped = 0;
  for (int run = 0; run < runs; ++run) {
    const auto at = Clock::now();
    model.run(inputs, names);
    run_ms += (run ? ", " : "") + std::to_string(ms_since(at));
    if (run > 0) continue;
    ran = resident();
    mapped = pages_of(program) + (data.empty() ? 0 : pages_of(data));
  }
  printf("{");
  print("start", start);
  print("loaded", loaded);
  print("ran", ran);
  printf("\"mapped_bytes\": %lld, \"peak_bytes\": %lld, \"load_ms\": %f, \"run_ms\": [%s]}\n", (long long)mapped,
         (long long)resident().peak, load_ms, run_ms.c_str());
}

}  // namespace runner
