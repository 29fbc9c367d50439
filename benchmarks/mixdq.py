# SPDX-License-Identifier: Apache-2.0
"""MixDQ's steps one on top of the other, on a bundled model's UNet: naive, BOS-aware, mixed by one metric, by two.

    python benchmarks/mixdq.py [--prompts 500] [--out benchmarks/results/mixdq.json]

Weights are rounded by row to the nearest (absmax), inputs of layers in one calibrated range each (min-max, per tensor);
text encoders and decoder stay in float. Computed in PyTorch with the values that an artifact stores. `W5A8 …` mixes
weights of 4 and 8 bits, 5 in the mean; `W8A6 …` mixes inputs of 4, 6 and 8 bits, 6 in the mean over the numbers that
layers read. Objectives of the program that mixes: `power`, summed shares of the denoiser's output that are lost; `two
metrics`, the same for quality and 1 - SSIM of the picture for content layers (feed-forward, cross-attention);
`published`, dB of the former and SSIM of the latter. The last two try several divisions of the budget, and pictures of
selection prompts decide. Inputs that `exempt` lists stay in float: the hundredth of the layers that loses most.

Four sets of prompts, none in two: calibration, measuring and selection see others than what is reported. A row that is
in the output file is not computed again.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import log10, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from turbopocket.export.build.content import SsimForm
from turbopocket.export.build.draft import pipeline_manifest
from turbopocket.export.build.probe import make_probe
from turbopocket.export.build.rewriting import rewritten
from turbopocket.export.build.walk import make_walk
from turbopocket.export.checkpoint.load import load
from turbopocket.export.evidence import evidence_for
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.families.components import components_of, described
from turbopocket.export.recipe import Recipe, make_recipe
from turbopocket.export.targets.side_files import write_tokenizers
from turbopocket.export.verify.gaps import Session, torch_runner
from turbopocket.pocket.evaluate import write_json
from turbopocket.pocket.judge import alignment, load_judge
from turbopocket.pocket.scenes import parse_caption, sample_scenes
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.compress import decompressed
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layer_rounding import Rounding, activations_name
from turbopocket.quant.layers import compressible_layers, weight_of, weight_shape
from turbopocket.quant.observe import Extremes, InputPower, QuietestOutput
from turbopocket.quant.plan import Candidate, LayerChoices, Plan, plan
from turbopocket.quant.row_losses import Question, RowwiseOutput, measure
from turbopocket.quant.scheme import parse_scheme
from turbopocket.quant.split import SHARES, content_of, different, split_plan
from turbopocket.runtimes.compare.metrics import psnr_db, ssim
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers

CONTENT = ("*.ff.*", "*.attn2.*")
WEIGHTS = ("int4-row", "int8-row")
INPUTS = ("a4-static+float", "a6-static+float", "a8-static+float")
BATCH = 32
CALIBRATION, MEASURING, SELECTION, STEPS = 32, 8, 16, 4
EXEMPT = 0.01
Pictures = NDArray[np.uint8]
Layers = dict[str, LayerChoices]


@dataclass(frozen=True)
class Arm:
    """What the UNet is given: the weight format and the rounding of inputs by layer; none of the latter: float."""

    weights: Mapping[str, str]
    inputs: Mapping[str, str]


class Subject:
    """The model, with or without the rewrite, its calibrated ranges, and what it draws as an arm says."""

    def __init__(self, source: str, bos_aware: bool) -> None:
        values = {"model": {"source": source}, "compress": {"rewrites": ["bos-aware"] if bos_aware else []}}
        self.recipe: Recipe = make_recipe(values, "benchmark")
        model = self.loaded(source)
        sampling = json.loads((model.folder / "sampling.json").read_text())
        sampler = {"steps": sampling["steps"], "guidance": sampling["guidance_scale"]}
        self.recipe = make_recipe({**values, "sampler": sampler}, "benchmark")
        self.components = rewritten(model, components_of(model), self.recipe, evidence_for(model)).components
        self.unet = next(each for each in self.components if each.name == "unet").module.model
        self.layers = compressible_layers("unet", self.unet)
        specs = {each.name: described(each) for each in self.components}
        draft = pipeline_manifest(model, self.recipe, specs, ())
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizers(model, Path(folder))
            self.session = Session(draft, open_tokenizers(Path(folder), draft), (), 0)
        self.runner = torch_runner(self.components)
        kinds = [Extremes, InputPower, QuietestOutput]
        stats = calibrate({"unet": self.unet}, lambda: self.draw(prompts("train", CALIBRATION)), kinds=kinds)
        self.layers = {name: layer for name, layer in self.layers.items() if name in stats}
        self.ranges, self.numbers = ranges_of(stats), self._numbers()
        self.stored = cache(self._stored)

    def loaded(self, source: str) -> LoadedModel:
        return load(source)

    def draw(self, asked: Sequence[str]) -> Pictures:
        session = replace(self.session, prompts=asked)
        parts = [range(start, min(start + BATCH, len(asked))) for start in range(0, len(asked), BATCH)]
        return np.stack([picture for part in parts for picture in session.draw_batch(self.runner, part)])

    def drawn(self, arm: Arm, asked: Sequence[str]) -> Pictures:
        stored = {name: self.stored(name, format) for name, format in arm.weights.items()}
        with decompressed({"unet": self.unet}, stored), self._rounding(arm.inputs):
            return self.draw(asked)

    def rounding(self, layer: str, inputs: str) -> Rounding:
        return Rounding.of(layer, parse_scheme(f"fp32+{inputs}"), self.ranges)

    def _stored(self, layer: str, format: str) -> CompressedTensor:
        return parse_format(format).compress(weight_of(layer, self.layers[layer]).detach(), ABSMAX)

    @contextmanager
    def _rounding(self, inputs: Mapping[str, str]) -> Iterator[None]:
        def hook(rounding: Rounding) -> Any:
            return lambda layer, x: (rounding.of_input(layer, x[0]), *x[1:])

        with ExitStack() as hooks:
            for name, how in inputs.items():
                own = hook(self.rounding(name, how))
                hooks.callback(self.layers[name].register_forward_pre_hook(own).remove)
            yield

    def _numbers(self) -> dict[str, int]:
        """How many numbers each layer reads in a call of one picture."""
        found: dict[str, int] = {}

        def hook(name: str) -> Any:
            def see(_layer: Any, x: Any, _y: Any) -> None:
                found[name] = x[0][0].numel()

            return see

        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                hooks.callback(layer.register_forward_hook(hook(name)).remove)
            self.draw(prompts("train", 1))
        return found


def prompts(split: Any, count: int) -> list[str]:
    """Captions of a split; measuring has the first of those for selection, which is decided with the others."""
    return [scene.caption for scene in sample_scenes(split, count, 0)]


class Measured:
    """Losses of quality and content of every layer: of weights alone, and of inputs alone."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        session = replace(subject.session, prompts=prompts("selection", MEASURING + SELECTION)[:MEASURING])
        self.quality = self._choices(make_probe(session, subject.components, STEPS).outputs()[0][1])
        walk = make_walk(session, subject.components)
        with torch.no_grad():
            form = SsimForm(walk.pictures(slice(None)))
        self.content = self._choices(walk.output(form, form.energy))
        self.content_layers = content_of(subject.layers, CONTENT)

    def _choices(self, output: RowwiseOutput) -> Layers:
        subject = self.subject
        formats = {name: [parse_format(each) for each in WEIGHTS] for name in subject.layers}
        stored = {name: [subject.stored(name, each) for each in WEIGHTS] for name in subject.layers}
        roundings = {name: {each: subject.rounding(name, each) for each in INPUTS} for name in subject.layers}
        [choices] = measure([Question(subject.layers, formats, stored, output, roundings)])
        return choices

    def of_weights(self, choices: Layers) -> Layers:
        return {name: replace(each, roundings={}) for name, each in choices.items()}

    def of_inputs(self, choices: Layers) -> Layers:
        """Bits of the numbers that a layer reads in the place of a weight's bytes."""
        numbers = self.subject.numbers
        return {
            name: LayerChoices(
                name,
                each.shape,
                tuple(Candidate(f"fp32+{how}", numbers[name] * _bits(how), each.roundings[how]) for how in INPUTS),
            )
            for name, each in choices.items()
        }

    def exempt(self, how: str) -> set[str]:
        """The layers whose inputs lose most in that format."""
        count = max(1, round(EXEMPT * len(self.quality)))
        return set(sorted(self.quality, key=lambda name: -self.quality[name].roundings[how])[:count])


def _bits(inputs: str) -> int:
    activations = parse_scheme(f"fp32+{inputs}").input
    assert activations is not None
    return activations.bits


def published(choices: Layers, of_content: bool) -> Layers:
    """Losses that order plans as sums of SSIM, or of dB, do: what is missing from the layer's best candidate."""

    def value(loss: float) -> float:
        return 1 - loss if of_content else -10 * log10(max(loss, 1e-30))

    found = {}
    for name, layer in choices.items():
        best = max(value(each.loss) for each in layer.candidates)
        candidates = tuple(replace(each, loss=best - value(each.loss)) for each in layer.candidates)
        found[name] = replace(layer, candidates=candidates)
    return found


class Ablation:
    """The rows, each drawn from the test prompts and written down at once."""

    def __init__(self, source: str, test_prompts: int, out: Path) -> None:
        self.source, self.out, self.judge = source, out, load_judge()
        self.asked = prompts("test", test_prompts)
        self.selection = prompts("selection", MEASURING + SELECTION)[MEASURING:]
        self.result: dict[str, Any] = {"rows": {}}
        if out.is_file():
            kept = json.loads(out.read_text())
            if kept["model"] == source and kept["prompts"] == test_prompts:
                self.result = kept
        self.result |= {"model": source, "prompts": test_prompts, "machine": platform.machine(), **_settings()}
        self.subject = cache(self._subject)
        self.measured = cache(lambda: Measured(self.subject(True)))
        self.floats = cache(lambda: self.subject(False).draw(self.asked))
        self.selection_floats = cache(lambda: self.subject(True).draw(self.selection))

    def _subject(self, bos_aware: bool) -> Subject:
        return Subject(self.source, bos_aware)

    def row(self, name: str, bos_aware: bool, make: Any) -> None:
        """`make` gives an arm, and what to note of it."""
        if name in self.result["rows"]:
            return
        began = time.perf_counter()
        arm, notes = make()
        found = self.subject(bos_aware).drawn(arm, self.asked)
        self.result["rows"][name] = {**self.figures(found), **notes, "seconds": time.perf_counter() - began}
        write_json(self.out, self.result)
        print(name, self.result["rows"][name], flush=True)

    def figures(self, found: Pictures) -> dict[str, float]:
        pairs = list(zip(found, self.floats(), strict=True))
        scenes = [parse_caption(each) for each in self.asked]
        return {
            "psnr_db": psnr_db(found, self.floats()),
            "ssim": float(np.mean([ssim(one, other) for one, other in pairs])),
            "alignment": alignment(self.judge, found, scenes).all_right,
        }

    def uniform(self, weights: str, inputs: str | None, bos_aware: bool, exempt: bool = False) -> Any:
        def make() -> tuple[Arm, dict[str, Any]]:
            layers = self.subject(bos_aware).layers
            left = self.measured().exempt(inputs) if exempt and inputs else set()
            asked = {} if inputs is None else {name: inputs for name in layers if name not in left}
            return Arm(dict.fromkeys(layers, weights), asked), {"exempt": sorted(left)} if left else {}

        return make

    def mixed_weights(self, bits: float, objective: str) -> Any:
        def make() -> tuple[Arm, dict[str, Any]]:
            measured = self.measured()
            left = measured.exempt(INPUTS[-1])
            inputs = {name: INPUTS[-1] for name in measured.quality if name not in left}
            quality, content = measured.of_weights(measured.quality), measured.of_weights(measured.content)
            rows = sum(weight_shape(name, layer)[0] for name, layer in self.subject(True).layers.items())
            weights = sum(prod(weight_shape(name, layer)) for name, layer in self.subject(True).layers.items())
            budget = int(bits * weights / 8) + 2 * rows  # a scale of two bytes for each row
            arms = [
                Arm({choice.layer: choice.scheme for choice in each.choices}, inputs)
                for each in self.plans(quality, content, budget, objective)
            ]
            return self.best(arms)

        return make

    def mixed_inputs(self, bits: float, objective: str) -> Any:
        def make() -> tuple[Arm, dict[str, Any]]:
            measured = self.measured()
            quality, content = measured.of_inputs(measured.quality), measured.of_inputs(measured.content)
            budget = int(bits * sum(self.subject(True).numbers[name] for name in quality))
            weights = dict.fromkeys(quality, "int8-row")
            arms = [
                Arm(weights, {each.layer: activations_name(parse_scheme(each.scheme)) for each in found.choices})
                for found in self.plans(quality, content, budget, objective)
            ]
            return self.best(arms)

        return make

    def plans(self, quality: Layers, content: Layers, budget: int, objective: str) -> list[Plan]:
        if objective == "power":
            return [plan(list(quality.values()), budget, 0)]
        if objective == "published":
            quality, content = published(quality, False), published(content, True)
        own = {name: content[name] for name in self.measured().content_layers}
        return different([split_plan(list(quality.values()), own, share, budget, 0) for share in SHARES])

    def best(self, arms: Sequence[Arm]) -> tuple[Arm, dict[str, Any]]:
        """The arm whose pictures of selection prompts are nearest to the float model's."""
        if len(arms) == 1:
            return arms[0], {}
        nearness = [psnr_db(self.subject(True).drawn(arm, self.selection), self.selection_floats()) for arm in arms]
        return arms[int(np.argmax(nearness))], {"selection_psnr_db": nearness}


def _settings() -> dict[str, Any]:
    return {
        "calibration_prompts": CALIBRATION,
        "measuring_prompts": MEASURING,
        "selection_prompts": SELECTION,
        "content": list(CONTENT),
    }


def run(ablation: Ablation) -> None:
    ablation.row("float", True, lambda: (Arm({}, {}), {}))
    for name, weights, inputs in (
        ("W8A8", "int8-row", INPUTS[2]),
        ("W8A6", "int8-row", INPUTS[1]),
        ("W4A8", "int4-row", INPUTS[2]),
    ):
        ablation.row(f"{name} naive", False, ablation.uniform(weights, inputs, False))
        ablation.row(f"{name} + BOS", True, ablation.uniform(weights, inputs, True))
        ablation.row(f"{name} + BOS + exempt", True, ablation.uniform(weights, inputs, True, exempt=True))
    for objective in ("power", "two metrics", "published"):
        for bits in (4.5, 5):
            ablation.row(f"W{bits}A8 {objective}", True, ablation.mixed_weights(bits, objective))
        ablation.row(f"W8A6 mixed {objective}", True, ablation.mixed_inputs(6, objective))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-turbo")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mixdq.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    run(Ablation(asked.model, asked.prompts, asked.out))


if __name__ == "__main__":
    main()
