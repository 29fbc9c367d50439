# SPDX-License-Identifier: Apache-2.0
"""Ranges of activations by timestep beside one range for all, in exported ONNX files of a bundled model's UNet.

    python benchmarks/tfmq.py [--model pocket-turbo] [--prompts 32] [--calibration 32 64] [--out ...]

The UNet is rewritten with `bos-aware`, its weights are stored in `int8-row` (absmax), and it is lowered as a build
lowers it: every Linear rounds its input, every Conv2d its input and output, as `a8-static` or as `a8-step`. ONNX
Runtime draws test prompts with both files, text encoders and decoder are PyTorch's in float. PSNR is that of all
pictures together against the float model's, and of single ones the median and the least. Calibration prompts, of which
each row says how many, are not among these.

Times are of one call of both UNets and of fp32, in turns in one process, one thread: the least processor time of a run,
which others on the machine disturb least, so that only ratios are to be read. A row that is in the output file is not
made again.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from turbopocket.export.build.draft import pipeline_manifest
from turbopocket.export.build.rewriting import rewritten
from turbopocket.export.checkpoint.load import load
from turbopocket.export.evidence import evidence_for
from turbopocket.export.families.components import components_of, described
from turbopocket.export.recipe import make_recipe
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.export.targets.side_files import write_tokenizers
from turbopocket.export.verify.gaps import Session, torch_runner
from turbopocket.ground.arrays import Arrays
from turbopocket.pocket.evaluate import write_json
from turbopocket.pocket.scenes import sample_scenes
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layers import weight_of
from turbopocket.quant.observe import Extremes, InputPower, QuietestOutput
from turbopocket.quant.ranges import Ranges
from turbopocket.quant.scheme import Scheme, parse_scheme
from turbopocket.runtimes.compare.metrics import psnr_db
from turbopocket.runtimes.compare.replay import Recorder
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import ComponentSpec
from turbopocket.runtimes.onnx.runner import OnnxRunner
from turbopocket.runtimes.runner import Runner

BATCH, ROUNDS = 16, 60
FORMAT, DENOISER = "int8-row", "unet"
ROUNDINGS = {
    "a8-static": {"linear": "a8-static+float", "conv2d": "a8-static"},
    "a8-step": {"linear": "a8-step+float", "conv2d": "a8-step"},
    "Linear a8-static, Conv2d a8-step": {"linear": "a8-static+float", "conv2d": "a8-step"},
    "Linear a8-dynamic, Conv2d a8-static": {"linear": "a8-dynamic", "conv2d": "a8-static"},
}
"""The last two with the most calibration prompts alone."""
BOTH = {name: ROUNDINGS[name] for name in ("a8-static", "a8-step")}
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class OneComponent:
    """As much of a manifest as a runner reads."""

    components: Mapping[str, ComponentSpec]
    name: str = "benchmark"
    plan: None = None


@dataclass(frozen=True)
class Drawn:
    """A runner in which the denoiser is another's."""

    denoiser: Runner
    others: Runner

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        runner = self.denoiser if component == DENOISER else self.others
        return runner.run(component, inputs)


def prompts(split: Any, count: int) -> list[str]:
    """Captions of a split."""
    return [scene.caption for scene in sample_scenes(split, count, 0)]


class Subject:
    """The model with its rewrite, what it draws with, and its UNet lowered in several ways."""

    def __init__(self, source: str, folder: Path) -> None:
        self.folder, self.target = folder, Onnx()
        model = load(source)
        sampling = json.loads((model.folder / "sampling.json").read_text())
        recipe = make_recipe(
            {
                "model": {"source": source},
                "compress": {"rewrites": ["bos-aware"]},
                "sampler": {"steps": sampling["steps"], "guidance": sampling["guidance_scale"]},
            },
            "benchmark",
        )
        components = rewritten(model, components_of(model), recipe, evidence_for(model)).components
        draft = pipeline_manifest(model, recipe, {each.name: described(each) for each in components}, ())
        write_tokenizers(model, folder)
        self.session = Session(draft, open_tokenizers(folder, draft), (), 0)
        self.runner = torch_runner(components)
        self.unet = next(each for each in components if each.name == DENOISER)
        self.traced = self.target.trace(self.unet)
        self.weights = {name: self._compressed(name) for name in self.traced.layers}
        self.ranges = cache(self._ranges)

    def draw(self, denoiser: Runner, asked: Sequence[str]) -> Pictures:
        """The pictures of some prompts, each from the noise of its index."""
        session, runner = replace(self.session, prompts=asked), Drawn(denoiser, self.runner)
        parts = [range(start, min(start + BATCH, len(asked))) for start in range(0, len(asked), BATCH)]
        return np.stack([picture for part in parts for picture in session.draw_batch(runner, part)])

    def _compressed(self, layer: str) -> CompressedTensor:
        module = self.unet.module.model.get_submodule(self.traced.layers[layer].path)
        return parse_format(FORMAT).compress(weight_of(layer, module).detach(), ABSMAX)

    def _ranges(self, pictures: int) -> dict[str, Ranges]:
        session = replace(self.session, prompts=prompts("train", pictures))

        def run() -> None:
            for index in range(pictures):
                session.draw(self.runner, index)

        return ranges_of(
            calibrate({DENOISER: self.unet.module.model}, run, kinds=[Extremes, InputPower, QuietestOutput])
        )

    def lowered(self, name: str, rounding: Mapping[str, str], pictures: int) -> OnnxRunner:
        """The UNet's file, opened."""
        folder = self.folder / f"{name}-{pictures}".replace(" ", "")
        ranges = self.ranges(pictures) if rounding else {}
        traced = self.target.fitted(self.traced, self.unet, ranges)
        schemes = {
            layer: parse_scheme(f"{FORMAT}+{rounding[each.kind]}") if rounding else Scheme(parse_format("fp32"))
            for layer, each in traced.layers.items()
        }
        spec = self.target.lower(traced, self.weights if rounding else self._dense(), folder, schemes)
        return OnnxRunner(folder, OneComponent({DENOISER: spec}), threads=1)  # type: ignore[arg-type]

    def _dense(self) -> dict[str, CompressedTensor]:
        return {
            name: parse_format("fp32").compress(
                weight_of(name, self.unet.module.model.get_submodule(each.path)).detach(), ABSMAX
            )
            for name, each in self.traced.layers.items()
        }


def ratios(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of processor time of a run of each, the least of `ROUNDS` in turns."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            began = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - began)
    return {name: 1000 * seconds for name, seconds in least.items()}


def timed(subject: Subject, pictures: int) -> dict[str, Any]:
    """A call of each UNet, of one picture at the second timestep, batch 1 and 8."""
    runners = {name: subject.lowered(name, rounding, pictures) for name, rounding in BOTH.items()}
    runners["fp32"] = subject.lowered("fp32", {}, 0)
    recorder = Recorder(subject.runner)
    replace(subject.session, prompts=prompts("test", 1)).draw(recorder, 0)
    call = [each for each in recorder.calls if each.component == DENOISER][1]
    found: dict[str, Any] = {}
    for batch in (1, 8):
        inputs = {name: np.repeat(each, batch, 0) if each.ndim else each for name, each in call.inputs.items()}
        runs = {name: (lambda runner=runner: runner.run(DENOISER, inputs)) for name, runner in runners.items()}  # noqa: B023
        milliseconds = ratios(runs)
        found[f"batch {batch}"] = {**milliseconds, "step / static": milliseconds["a8-step"] / milliseconds["a8-static"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-turbo")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--calibration", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tfmq_ranges.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    about = {"model": asked.model, "prompts": asked.prompts, "machine": platform.machine()}
    result: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    if {name: result.get(name) for name in about} != about:
        result = {**about, "rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(asked.model, Path(folder))
        test = prompts("test", asked.prompts)
        floats = cache(lambda: subject.draw(subject.runner, test))
        for pictures in asked.calibration:
            for name, rounding in ROUNDINGS.items() if pictures == max(asked.calibration) else BOTH.items():
                row = f"{name}, {pictures} calibration pictures"
                if row not in result["rows"]:
                    found = subject.draw(subject.lowered(name, rounding, pictures), test)
                    each = [psnr_db(one, other) for one, other in zip(found, floats(), strict=True)]
                    result["rows"][row] = {
                        "psnr_db": psnr_db(found, floats()),
                        "median_psnr_db": float(np.median(each)),
                        "least_psnr_db": min(each),
                    }
                    write_json(asked.out, result)
                    print(row, result["rows"][row], flush=True)
        if "milliseconds" not in result:
            result["milliseconds"] = timed(subject, max(asked.calibration))
            write_json(asked.out, result)
        print(result["milliseconds"])


if __name__ == "__main__":
    main()
