# SPDX-License-Identifier: Apache-2.0
"""What fits take at SDXL's widths: seconds and memory of single layers, and from these hours for the whole UNet.

    python benchmarks/fit_times.py [--fits gptq,vqdm] [--shapes 1280x1280,…] [--out benchmarks/results/fit_times.json]

Layers are made: rows of normal weights with log-normal scales, and inputs of 512 directions whose n-th has energy
1 / n, and noise. Each is fitted in a process of its own; seconds are processor time on one thread, memory is the
largest that the process held on top of weight and (half) Hessian. A layer of O outputs and K columns takes
a K³ + b O K + c O K² seconds, with a, b and c by least squares on relative errors; the UNet is the sum over its
published layers. Of vqdm it says too much: codebooks are solved for on a sample of a million weights, which of layers
of few rows is all of them. Shapes are added to what the results hold, so that single ones can be run when there is
room.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from scipy.optimize import nnls
from synthetic_sdxl import configs
from torch import Tensor

from turbopocket.pocket.evaluate import write_json
from turbopocket.quant.fit import GPTQ, VQDM
from turbopocket.quant.fit.hessian import HalfMatrix
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.observe.moments import STRIP_COLUMNS

FITS = {"gptq": (GPTQ, "int4-g32"), "vqdm": (VQDM, "avq2x8-d8")}
SHAPES = "640x640,1280x1280,1280x2048,1280x5120,256x5120,256x11520,64x11520"
DIRECTIONS = 512


def layer(outputs: int, columns: int) -> tuple[Tensor, HalfMatrix]:
    """A weight and the second moment of its inputs, see above."""
    random = torch.Generator().manual_seed(0)
    scale_O1 = (0.3 * torch.randn(outputs, 1, generator=random)).exp() / columns**0.5
    weight_OK = scale_O1 * torch.randn(outputs, columns, generator=random)
    directions_KN = torch.randn(columns, DIRECTIONS, generator=random) * torch.arange(1, DIRECTIONS + 1).rsqrt()
    strips = []
    for start in range(0, columns, STRIP_COLUMNS):
        end = min(start + STRIP_COLUMNS, columns)
        strips.append(directions_KN[:end] @ directions_KN[start:end].T)
        strips[-1].diagonal(-start).add_(0.3)
    return weight_OK, HalfMatrix(tuple(strips))


def status_bytes(field: str) -> int:
    """A line of what Linux says of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def measured(name: str, outputs: int, columns: int) -> dict[str, Any]:
    """Seconds and bytes of one fit in this process."""
    torch.set_num_threads(1)
    fit, text = FITS[name]
    form = parse_format(text)
    form.compress(torch.randn(256, 64), fit, torch.eye(64))  # libraries load
    weight_OK, half = layer(outputs, columns)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is held now
    before, start = status_bytes("VmRSS"), time.process_time()
    form.compress(weight_OK, fit, half)
    seconds, peak = time.process_time() - start, status_bytes("VmHWM")
    return {
        "shape": [outputs, columns],
        "seconds": seconds,
        "seconds_per_million": seconds / weight_OK.numel() * 1e6,
        "bytes_over_inputs": peak - before,
        "bytes_of_process": peak,
    }


def unet_shapes() -> list[tuple[int, int]]:
    """Outputs and columns of every layer of SDXL's UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs(1)["unet"])
    weights = [layer.weight for layer in compressible_layers("unet", unet).values()]
    return [(len(weight), weight[0].numel()) for weight in weights]  # type: ignore[arg-type]


def terms(shapes: list[tuple[int, int]]) -> np.ndarray[Any, Any]:
    """[N, 3], in units of 1e12 operations."""
    return np.array([[k**3, o * k * 1e4, o * k**2] for o, k in shapes]) / 1e12


def projection(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The UNet's hours from these layers, and how far the law is from each of them."""
    shapes, seconds = [tuple(row["shape"]) for row in rows], np.array([row["seconds"] for row in rows])
    law, _ = nnls(terms(shapes) / seconds[:, None], np.ones(len(rows)))
    unet = unet_shapes()
    total, weights = float((terms(unet) @ law).sum()), sum(o * k for o, k in unet)
    return {
        "law": dict(zip(("K3", "OK_1e4", "OK2"), law.tolist(), strict=True)),
        "law_over_measured": (terms(shapes) @ law / seconds).tolist(),
        "unet_core_hours": total / 3600,
        "unet_seconds_per_million": total / weights * 1e6,
    }


def main() -> None:
    """Measures what is asked for, and writes the JSON after every layer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fits", default=",".join(FITS))
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--one", nargs=3, metavar=("FIT", "O", "K"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fit_times.json")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(asked.one[0], int(asked.one[1]), int(asked.one[2]))))
        return
    result: dict[str, Any] = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.is_file() else {}
    result |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    for name in asked.fits.split(","):
        of_fit = result.setdefault(name, {"format": FITS[name][1], "layers": {}})
        for shape in asked.shapes.split(","):
            command = [sys.executable, __file__, "--one", name, *shape.split("x")]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            of_fit["layers"][shape] = json.loads(told.splitlines()[-1])
            of_fit["projected"] = projection(list(of_fit["layers"].values()))
            write_json(asked.out, result)
            print(name, of_fit["layers"][shape], of_fit["projected"], flush=True)


if __name__ == "__main__":
    main()
