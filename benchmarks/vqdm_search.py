# SPDX-License-Identifier: Apache-2.0
"""VQDM with its search in PyTorch and in C++ side by side, in dB and seconds.

    python benchmarks/vqdm_search.py [--out benchmarks/results/vqdm_search.json]

The layer is the wide one of `benchmarks/vqdm.py`, made and not trained. Seconds are processor time on one thread per
million weights, the k-means start included; `shares` says where they go.
"""

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from vqdm import FORMAT, measured, profiled, wide_layer

from turbopocket.pocket.evaluate import write_json
from turbopocket.quant.fit import VQDM
from turbopocket.quant.fit.native import search_library, searched_with


def main() -> None:
    """Measures, and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vqdm_search.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    library = search_library()
    if library is None:
        raise SystemExit("the search is not built: make search")
    weight_OK, hessian_KK = wide_layer()
    rows: dict[str, Any] = {}
    for name, chosen in (("pytorch", None), ("c++", library)):
        with searched_with(chosen):
            row = measured(FORMAT, VQDM, weight_OK, hessian_KK)
            row["seconds_per_million"] = row.pop("seconds") / weight_OK.numel() * 1e6
            rows[name] = row | {"shares": profiled(weight_OK, hessian_KK)}
    result = {
        "format": FORMAT,
        "shape": list(weight_OK.shape),
        "path": library.paths()[-1],
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    write_json(options.out, result | {"search": rows})
    print(rows)


if __name__ == "__main__":
    main()
