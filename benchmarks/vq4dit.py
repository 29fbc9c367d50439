# SPDX-License-Identifier: Apache-2.0
"""The transformer of `pocket-dit` at 2 and 3 bits: VQ4DiT, its rivals of codebooks, and scalars, at equal bytes.

    python benchmarks/vq4dit.py [--prompts 500] [--only 'vq8-d4*' …] [--out benchmarks/results/vq4dit.json]

Linears of transformer blocks, 7.3 of 8.0 M weights, are stored in the row's format, the rest in fp16, as it is shipped;
text encoder and decoder stay as they are. Computed in PyTorch with the values that an artifact stores. All rows draw
the same test prompts from the same noise in the model's own 20 steps. Calibration and training see others: 16 pictures
for statistics, 32 for what is trained, four at a time; text is cut behind the longest prompt there, where all is
masked. `n = 1` trains codebooks, scales and biases on the blocks' outputs, as VQ4DiT does without candidates;
`fine-tuning` the same on the transformer's output.

Learned scalars: which way each weight is rounded is learned on the blocks' outputs (`reconstruct`), then scales and
biases on the transformer's (`fine-tuning`). ONNX has neither integers of 2 or 3 bits nor codes of 6: bytes are those of
codes, scales, zero points and codebooks in the place of a format's that it has.

`bits` are of the coded layers, scales and codebooks counted, `all_in_bits` of the transformer's ONNX files. Seconds are
processor time of one thread for the whole way to the row's weights; memory is what the process held beyond what it held
before. A row that is in the output file is not computed again.
"""

import argparse
import fnmatch
import json
import math
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit import DENOISER, MODEL, TRAINING, Exported, OneComponent, Pictures, Subject, prompts
from fit_times import status_bytes

from turbopocket.export.families.components import parameter_count
from turbopocket.export.targets.onnx.program import TracedGraph
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.ground.heap import give_back_freed
from turbopocket.pocket.evaluate import frechet_distance, write_json
from turbopocket.pocket.judge import alignment, load_judge
from turbopocket.pocket.render import render
from turbopocket.pocket.scenes import parse_caption, sample_scenes
from turbopocket.quant.block_inputs import BlockInputs
from turbopocket.quant.candidate_training import train_in_blocks
from turbopocket.quant.compress import decompressed
from turbopocket.quant.finetune import Calls, fine_tune, stand_ins
from turbopocket.quant.fit import parse_fit
from turbopocket.quant.formats import Affine, CompressedTensor, LayerFormat, parse_format
from turbopocket.quant.layers import weight_of
from turbopocket.quant.observe import hessian_for
from turbopocket.quant.options import CandidateOptions, FineTuneOptions, ReconstructOptions
from turbopocket.quant.plan import Choice, Plan
from turbopocket.quant.reconstruct import reconstruct
from turbopocket.quant.reconstruct_blocks import BlockUnit
from turbopocket.quant.scheme import Scheme
from turbopocket.quant.sequential import compress_in_blocks
from turbopocket.runtimes.compare.metrics import psnr_db
from turbopocket.runtimes.onnx.runner import OnnxRunner

REFERENCE, EXPORTED = 2000, 20
ITERATIONS = 200
TUNING = FineTuneOptions(iterations=ITERATIONS, pictures=TRAINING)
LEARNING = ReconstructOptions(iterations=2 * ITERATIONS, batch=2, learning_rate=3e-2, temporal="inside")
Weights = dict[str, CompressedTensor]
Stage = str | CandidateOptions | FineTuneOptions | ReconstructOptions
"""The name of a fit, `sequential` behind it where blocks are fitted one after another; or what is trained after it."""


class Scalar(Affine):
    """Integers of any width: not a format of any target."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class Way:
    """How a row's weights come to be."""

    format: LayerFormat
    stages: tuple[Stage, ...]


def stored_by_a_target(form: LayerFormat) -> LayerFormat:
    """The format, or the nearest that ONNX has: all but codes, scales and codebooks is equal."""
    if isinstance(form, Scalar):
        return Affine(4, form.group, form.symmetric)
    return parse_format("vq8-d4") if str(form) == "vq6-d2" else form


def ways() -> dict[str, Way]:
    """All rows but `float`."""
    found: dict[str, Way] = {}
    n = partial(CandidateOptions, iterations=ITERATIONS, pictures=TRAINING)
    for text in ("vq8-d4", "vq6-d2"):
        form = parse_format(text)
        found[f"{text}, k-means"] = Way(form, ("mse",))
        found[f"{text}, k-means + fine-tuning"] = Way(form, ("mse", TUNING))
        found[f"{text}, n = 1"] = Way(form, ("mse", n(count=1)))
        for count in (2, 3):
            for schedule in ("joint", "freeze"):
                for start in ("equal", "distance"):
                    asked = n(count=count, schedule=schedule, start=start)
                    if text == "vq8-d4" or (schedule, start) == ("joint", "distance"):
                        found[f"{text}, n = {count}, {schedule}, {start}"] = Way(form, ("mse", asked))
    two = parse_format("vq8-d4")
    found["vq8-d4, n = 4, joint, distance"] = Way(two, ("mse", n(count=4)))
    found["vq8-d4, n = 2, joint, distance + fine-tuning"] = Way(two, ("mse", n(count=2), TUNING))
    for text in ("avq2x8-d8-shared", "avq2x8-d8"):
        form = parse_format(text)
        found[f"{text}, vqdm"] = Way(form, ("vqdm sequential",))
        found[f"{text}, vqdm + fine-tuning"] = Way(form, ("vqdm sequential", TUNING))
        found[f"{text}, vqdm + n = 2"] = Way(form, ("vqdm sequential", n(count=2)))
    for bits in (2, 3, 4):
        scalar = Scalar(bits, 128, symmetric=False)
        found[f"int{bits}-g128-asym, gptq"] = Way(scalar, ("gptq",))
        if bits < 4:
            found[f"int{bits}-g128-asym, reconstruct"] = Way(scalar, ("mse", LEARNING))
            found[f"int{bits}-g128-asym, reconstruct + fine-tuning"] = Way(scalar, ("mse", LEARNING, TUNING))
    return found


class Maker:
    """Weights of rows, stage by stage; a stage that two rows have in common is made once while it is remembered."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.made: dict[tuple[LayerFormat, tuple[Stage, ...]], tuple[Weights, dict[str, float]]] = {}
        self.losses: dict[str, dict[str, float]] = {}
        """Of the blocks in which candidates were trained last, on calls held out."""

    def weights(self, way: Way) -> tuple[Weights, dict[str, float]]:
        """The weights, with seconds and bytes of the whole way to them."""
        key = way.format, way.stages
        if key not in self.made:
            before, spent = self.weights(Way(way.format, way.stages[:-1])) if way.stages[1:] else ({}, {})
            self.subject.stats(), self.subject.training()  # all rows have these in common
            give_back_freed()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is held now
            held, start = status_bytes("VmRSS"), time.process_time()
            made = self._stage(way.format, way.stages[-1], before)
            seconds, grown = time.process_time() - start, status_bytes("VmHWM") - held
            if not way.stages[1:]:
                self.made = {}  # a row's ways follow each other
            self.made[key] = (
                made,
                {
                    "fit_seconds": spent.get("fit_seconds", 0.0) + seconds,
                    "fit_peak_bytes": max(spent.get("fit_peak_bytes", 0), grown),
                },
            )
        return self.made[key]

    def _stage(self, form: LayerFormat, stage: Stage, before: Weights) -> Weights:
        subject, modules = self.subject, {DENOISER: self.subject.model}
        if isinstance(stage, FineTuneOptions):
            with torch.no_grad():
                calls = Calls.of([(call.args, (call(),)) for call in subject.training()])
            return fine_tune(subject.component.module, before, calls, stage).weights
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(stage, ReconstructOptions):
                return before | self._reconstructed(before, stage, Path(folder))
            if isinstance(stage, CandidateOptions):
                asked = modules, subject.component.blocks(), subject.layers, before, list(subject.stats())
                trained, losses = train_in_blocks(*asked, lambda _: subject.training(), stage, Path(folder))
                self.losses = {name.rpartition(".")[2]: asdict(each) for name, each in losses.items()}
                return trained
            fit, stats, forms = parse_fit(stage.split()[0]), subject.stats(), subject.forms(form)
            if stage.endswith("sequential"):
                shapes = {name: subject.shape(name) for name in forms}
                chosen = [Choice(n, shapes[n], str(own), own.nbytes(shapes[n]), 0.0) for n, own in forms.items()]
                where = modules, subject.component.blocks(), subject.layers, Plan(tuple(chosen), 0, None), fit, stats
                return compress_in_blocks(*where, lambda _: subject.calibration(), Path(folder))
        weights = {name: weight_of(name, layer).detach() for name, layer in subject.layers.items()}
        return {name: own.compress(weights[name], fit, hessian_for(fit, stats[name])) for name, own in forms.items()}

    def _reconstructed(self, before: Weights, options: ReconstructOptions, folder: Path) -> Weights:
        found: Weights = {}
        inputs = BlockInputs(folder)
        with torch.no_grad(), inputs.recording(self.subject.blocks, {}):
            for call in self.subject.training():
                call()
        for name, block in self.subject.blocks.items():
            learned = {layer: before[layer] for layer in self.subject.coded if layer.startswith(f"{name}.")}
            unit = BlockUnit(name, block, inputs, torch.device("cpu"))
            found |= reconstruct(unit, learned, {}, {}, options).weights
        return found


class Table:
    """The rows, each drawn from the test prompts and written down at once."""

    def __init__(self, count: int, out: Path) -> None:
        self.subject, self.judge, self.out = Subject(), load_judge(), out
        self.maker, self.asked = Maker(self.subject), prompts("test", count)
        self.about = {"model": MODEL, "split": "test", "prompts": count, "machine": platform.machine()}
        self.about |= {"steps": self.subject.session.manifest.sampler.steps, "tuning": asdict(TUNING)}
        self.about |= {
            "learning": asdict(LEARNING),
            "candidates": asdict(CandidateOptions(iterations=ITERATIONS, pictures=TRAINING)),
        }
        self.result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
        if {name: self.result.get(name) for name in self.about} != self.about:
            self.result = {**self.about, "rows": {}}
        self.floats = cache(lambda: self.subject.draw(self.asked))
        self.traced = cache(self._traced)
        self.reference = cache(lambda: render(sample_scenes("test", REFERENCE, 1), torch.Generator().manual_seed(0)))

    def row(self, name: str, way: Way | None) -> None:
        if name in self.result["rows"]:
            return
        if way is None:
            self.write(name, self.figures(self.floats()))
            return
        weights, spent = self.maker.weights(way)
        with decompressed({DENOISER: self.subject.model}, weights):
            found = self.subject.draw(self.asked)
        told = {"block_losses": self.maker.losses} if isinstance(way.stages[-1], CandidateOptions) else {}
        self.write(name, self.figures(found) | self.sizes(way) | spent | told)

    def write(self, name: str, figures: Mapping[str, Any]) -> None:
        self.result["rows"][name] = dict(figures)
        write_json(self.out, self.result)
        print(name, figures, flush=True)

    def figures(self, found: Pictures) -> dict[str, float]:
        own = self.floats()
        scenes = [parse_caption(each) for each in self.asked]
        figures = {
            "alignment": alignment(self.judge, found, scenes).all_right,
            "frechet": frechet_distance(self.judge, found, self.reference()),
        }
        if found is own:
            return figures
        each = [psnr_db(*pair) for pair in zip(found, own, strict=True)]
        to_float = {"psnr_db": psnr_db(found, own), "mean_psnr_db": float(np.mean(each))}
        return figures | to_float | {"frechet_to_float": frechet_distance(self.judge, found, own)}

    def _traced(self, trained: bool) -> TracedGraph:
        """The transformer's graph, which keeps equal biases once; those that were trained are not equal."""
        modules = {DENOISER: self.subject.model}
        with decompressed(modules, stand_ins(modules) if trained else {}):
            return Onnx().trace(self.subject.component)

    def sizes(self, way: Way) -> dict[str, float]:
        subject, form = self.subject, way.format
        stand_in = stored_by_a_target(form)
        trained = any(isinstance(stage, CandidateOptions | FineTuneOptions) for stage in way.stages)
        schemes = {name: Scheme(own) for name, own in subject.forms(stand_in).items()}
        coded = sum(form.nbytes(subject.shape(name)) for name in subject.coded)
        stood_in = sum(stand_in.nbytes(subject.shape(name)) for name in subject.coded)
        nbytes = Onnx().lowered_bytes(self.traced(trained), schemes) + coded - stood_in
        weights = sum(math.prod(subject.shape(name)) for name in subject.coded)
        return {
            "bytes": nbytes,
            "bits": 8 * coded / weights,
            "all_in_bits": 8 * nbytes / parameter_count(subject.component),
            "coded_weights": weights,
        }

    def exported(self, name: str, way: Way) -> None:
        """The row's first pictures once more, from the ONNX file."""
        if name in self.result.get("exported", {}):
            return
        weights, _ = self.maker.weights(way)
        subject, asked = self.subject, self.asked[:EXPORTED]
        rest = {name: each for name, each in weights.items() if name not in subject.layers}
        with tempfile.TemporaryDirectory() as folder:
            with decompressed({DENOISER: subject.model}, rest):
                traced = Onnx().trace(subject.component)
            spec = Onnx().lower(traced, {name: weights[name] for name in subject.layers}, Path(folder))
            nbytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            runner = OnnxRunner(Path(folder), OneComponent({DENOISER: spec}), threads=1)  # type: ignore[arg-type]
            with decompressed({DENOISER: subject.model}, weights):
                found, stored = subject.draw(asked, Exported(runner, subject.runner)), subject.draw(asked)
        self.result.setdefault("exported", {})[name] = {
            "pictures": len(asked),
            "psnr_db_to_pytorch": min(psnr_db(found, stored), 99.0),
            "largest_difference": int(np.abs(found.astype(int) - stored).max()),
            "bytes": nbytes,
        }
        write_json(self.out, self.result)
        print("exported", name, self.result["exported"][name], flush=True)


def main() -> None:
    """Measures, and writes the JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="rows of these names, in this order")
    parser.add_argument("--export", default="vq8-d4, n = 2, joint, distance", help="the row that is exported too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vq4dit.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(asked.prompts, asked.out)
    table.row("float", None)
    found = ways()
    for name in dict.fromkeys(name for glob in asked.only for name in fnmatch.filter(found, glob)):
        table.row(name, found[name])
        if name == asked.export:
            table.exported(name, found[name])


if __name__ == "__main__":
    main()
