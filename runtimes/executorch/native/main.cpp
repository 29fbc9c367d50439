// SPDX-License-Identifier: Apache-2.0
// executorch_runner serve                          answers requests on stdin
// executorch_runner measure RUNS MODEL.pte [DATA]  memory and times of runs on zeros, as JSON
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <executorch/extension/threadpool/threadpool_guard.h>
#include <string>

#include "measure.h"
#include "serve.h"

int main(int argc, char** argv) {
  // One thread: what is compared must not depend on how work was shared out.
  const executorch::extension::threadpool::NoThreadPoolGuard one_thread;
  try {
    if (argc == 2 && !std::strcmp(argv[1], "serve")) {
      runner::serve();
      return 0;
    }
    const int runs = argc >= 4 ? std::atoi(argv[2]) : 0;
    if ((argc == 4 || argc == 5) && !std::strcmp(argv[1], "measure") && runs > 0) {
      runner::measure(argv[3], argc == 5 ? argv[4] : "", runs);
      return 0;
    }
    std::fprintf(stderr, "usage: %s serve | measure RUNS MODEL.pte [DATA.ptd]\n", argv[0]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  }
  return 1;
}
