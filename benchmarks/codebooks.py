# SPDX-License-Identifier: Apache-2.0
"""The UNet of `pocket-turbo` in codebooks of 2, 3 and 4 bits, device by device, beside scalar formats of as many bytes.

    python benchmarks/codebooks.py [--formats avq2x8-d8,int4-row] [--out benchmarks/results/codebooks.json]

Steps of VQDM, each on top of the one before: residual k-means; beam search under the Hessian; Hessians collected anew
behind the stored blocks (`sequential`); fine-tuning. Every layer of 4,096 weights or more that takes the format is
stored in it, the rest of the UNet in fp16; text encoders and decoder stay as they are. Values are those the artifact
stores, computed in PyTorch. All bits are of the whole UNet: `all_in_bits` counts every tensor, `weight_bits` codes and
row scales of the coded layers alone, without codebooks, which a small layer can not share out over many weights.

With `-shared` the codebooks are the same for all layers, made for normal numbers and then fine-tuned for the UNet.

Pictures are drawn from the test split, prompt i from the noise of seed i; calibration and fine-tuning saw others.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distillation import Painter
from torch import Tensor

from turbopocket.export.families.components import components_of
from turbopocket.pocket.evaluate import frechet_distance, write_json
from turbopocket.pocket.judge import alignment, load_judge
from turbopocket.pocket.render import render
from turbopocket.pocket.scenes import sample_scenes
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.compress import compress, decompressed
from turbopocket.quant.finetune import Calls, fine_tune
from turbopocket.quant.fit import parse_fit
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.observe import LayerStats
from turbopocket.quant.options import FineTuneOptions
from turbopocket.quant.plan import Choice, Plan
from turbopocket.quant.sequential import compress_in_blocks
from turbopocket.runtimes.compare.metrics import psnr_db

CODEBOOKS = (
    *("avq2x8-d8", "avq3x8-d8", "avq4x8-d8"),
    *("avq2x8-d8-shared", "avq3x8-d8-shared", "avq4x8-d8-shared"),
)
SCALARS = {
    "lut2": ("mse",),
    "lut3": ("mse",),
    "lut4": ("mse",),
    "int4-row": ("absmax", "mse", "gptq"),
    "int4-g32": ("gptq",),
}
LEAST_WEIGHTS = 4096
CALIBRATION_PICTURES = 16
TUNING_PICTURES = 256
TUNING = FineTuneOptions(iterations=400, batch=16)
PROMPTS = 500
FRECHET_PICTURES = 2000


class Student:
    """`pocket-turbo`, whose UNet is given other weights, and what it drew before."""

    def __init__(self, source: str) -> None:
        self.painter = Painter(source, 4, 1.0, step_biases=True)
        self.component = next(each for each in components_of(self.painter.model) if each.name == "unet")
        self.unet = self.component.module.model
        self.layers = compressible_layers("unet", self.unet)
        self.judge = load_judge()
        self.float_pictures = self.drawn(FRECHET_PICTURES)

    def drawn(self, count: int) -> Tensor:
        """(N, 3, 64, 64) uint8 pictures of the test split."""
        scenes = sample_scenes("test", count, 0)
        return self.painter.draw([scene.caption for scene in scenes], range(count))

    def stats(self) -> dict[str, LayerStats]:
        """Of every layer that runs, while calibration pictures are drawn."""
        return calibrate({"unet": self.unet}, self.calibration)

    def calibration(self) -> None:
        """Draws the calibration pictures with the weights that the UNet then has."""
        captions = [scene.caption for scene in sample_scenes("train", CALIBRATION_PICTURES, 0)]
        self.painter.draw(captions, range(CALIBRATION_PICTURES))

    def calibration_calls(self, _component: str) -> list[Callable[[], object]]:
        """What runs the UNet as it was run while the calibration pictures were drawn."""
        found: list[Callable[[], object]] = []

        def heard(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(partial(self.unet, *positional, **named))

        hook = self.unet.register_forward_pre_hook(heard, with_kwargs=True)
        self.calibration()
        hook.remove()
        return found

    def calls(self) -> Calls:
        """The UNet's own calls while it draws pictures for fine-tuning."""
        found = []

        def heard(_: Any, positional: tuple[Tensor, ...], named: dict[str, Any], output: tuple[Tensor]) -> None:
            found.append(((*positional, *named["added_cond_kwargs"].values()), output))

        hook = self.unet.register_forward_hook(heard, with_kwargs=True)
        captions = [scene.caption for scene in sample_scenes("train", TUNING_PICTURES, 1)]
        self.painter.draw(captions, range(TUNING_PICTURES))
        hook.remove()
        return Calls.of(found)

    def measured(self, weights: dict[str, CompressedTensor]) -> dict[str, float]:
        """Pictures with these weights, against the same prompts and seeds with its own, and by themselves."""
        with decompressed({"unet": self.unet}, weights):
            pictures = self.drawn(FRECHET_PICTURES)
        pairs = zip(pictures[:PROMPTS].numpy(), self.float_pictures[:PROMPTS].numpy(), strict=True)
        psnrs = [psnr_db(found.transpose(1, 2, 0), own.transpose(1, 2, 0)) for found, own in pairs]
        return {"median_psnr_db_to_float": float(np.median(psnrs))} | self.seen(pictures)

    def seen(self, pictures: Tensor) -> dict[str, float]:
        """What the judge says."""
        reference = render(sample_scenes("test", FRECHET_PICTURES, 1), torch.Generator().manual_seed(0))
        found = alignment(self.judge, pictures[:PROMPTS], sample_scenes("test", PROMPTS, 0)).all_right
        return {"alignment": found, "frechet": frechet_distance(self.judge, pictures, reference)}


def planned(student: Student, text: str, ran: dict[str, LayerStats]) -> Plan:
    """Every layer that is large enough and takes the format in it, the rest in fp16."""
    wanted, dense = parse_format(text), parse_format("fp16")
    choices = []
    for name in ran:
        shape = tuple(student.layers[name].weight.shape)
        form = wanted if wanted.fits(shape) is None and math.prod(shape) >= LEAST_WEIGHTS else dense
        choices.append(Choice(name, shape, str(form), form.nbytes(shape), 0.0))
    return Plan(tuple(choices), 0, None)


def sizes(student: Student, weights: dict[str, CompressedTensor]) -> dict[str, float]:
    """Bytes and bits a weight of the whole UNet, and of the coded layers by themselves."""
    layers = {name: weights[name] for name in student.layers if name in weights}
    coded = [each for each in layers.values() if str(each.format) != "fp16"]
    rest = sum(p.numel() for p in student.unet.parameters()) - sum(math.prod(each.shape) for each in layers.values())
    nbytes = sum(each.nbytes for each in layers.values()) + 4 * rest + shared_bytes(coded)
    shared = sum(
        each.parts[name].nbytes
        for each in coded
        for name in set(each.parts) - set(each.format.shared_parts)
        if name in ("codebooks", "table")
    )
    weights_coded = sum(math.prod(each.shape) for each in coded)
    return {
        "coded_layers": len(coded),
        "layers": len(layers),
        "coded_share_of_weights": weights_coded / sum(p.numel() for p in student.unet.parameters()),
        "bytes": nbytes,
        "all_in_bits": 8 * nbytes / sum(p.numel() for p in student.unet.parameters()),
        "weight_bits": 8 * (sum(each.nbytes for each in coded) - shared) / weights_coded,
    }


def shares_codebooks(text: str) -> bool:
    """Whether layers in this format have their codebooks in common."""
    return bool(parse_format(text).shared_parts)


def shared_bytes(coded: list[CompressedTensor]) -> int:
    """Bytes of what all layers of a format have in common, once each."""
    first = {str(each.format): each for each in coded}
    return sum(each.parts[name].nbytes for each in first.values() for name in each.format.shared_parts)


def main() -> None:
    """Measures, and writes the JSON after every row; rows that are there already are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket-turbo")
    parser.add_argument("--formats", default=",".join((*CODEBOOKS, *SCALARS)))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "codebooks.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    student = Student(options.model)
    ran = student.stats()
    rows: dict[str, Any] = json.loads(options.out.read_text())["rows"] if options.out.is_file() else {}

    def add(text: str, method: str, weights: dict[str, CompressedTensor], start: float) -> None:
        seconds = time.process_time() - start
        rows[f"{text} {method}"] = sizes(student, weights) | student.measured(weights) | {"fit_seconds": seconds}
        print(text, method, rows[f"{text} {method}"], flush=True)
        about = {"model": options.model, "prompts": PROMPTS, "pictures": FRECHET_PICTURES, "split": "test"}
        write_json(options.out, {**about, "tuning_iterations": TUNING.iterations, "rows": rows})

    if "float" not in rows:
        rows["float"] = student.seen(student.float_pictures)
    calls = None
    for text in options.formats.split(","):
        plan = planned(student, text, ran)
        layers = {name: student.layers[name] for name in ran}
        if text not in CODEBOOKS:
            for fit in SCALARS[text]:
                start = time.process_time()
                add(text, fit, compress(layers, plan, parse_fit(fit), ran), start)
            continue
        plain = "nearest sums" if shares_codebooks(text) else "residual k-means"
        for name, fit in ((plain, "mse"), ("+ beam search", "vqdm")):
            start = time.process_time()
            add(text, name, compress(layers, plan, parse_fit(fit), ran), start)
        start = time.process_time()
        asked = {"unet": student.unet}, student.component.blocks(), layers, plan, parse_fit("vqdm"), ran
        with tempfile.TemporaryDirectory() as folder:
            weights = compress_in_blocks(*asked, student.calibration_calls, Path(folder))
        add(text, "+ sequential", weights, start)
        start = time.process_time()
        calls = calls or student.calls()
        tuned = fine_tune(student.component.module, weights, calls, TUNING)
        print(text, "held-out loss", tuned.before, tuned.after, flush=True)
        add(text, "+ fine-tuning", tuned.weights, start)


if __name__ == "__main__":
    main()
