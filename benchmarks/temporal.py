# SPDX-License-Identifier: Apache-2.0
"""What nearest rounding, learned rounding, TIAR, ranges by timestep and a cache do to temporal features and pictures.

    python benchmarks/temporal.py [--model pocket-turbo] [--folded] [--bits W4A8] [--prompts 500] [--iterations 2000]

TFMQ-DM's ablation (Huang et al., arXiv 2311.16503) on a bundled model's UNet with `bos-aware`, computed in PyTorch with
the values that an artifact stores. Weights are in `int4-row` or `int8-row`, scales by `mse`; every layer rounds its
input in one calibrated range (min-max). The first and the last convolution stay in float, as in the paper. Rows:

    nearest  rounding to the nearest          inside   blocks are reconstructed, temporal layers in them (BRECQ)
    frozen   temporal layers to the nearest   tiar     the temporal block is reconstructed by itself, before the others
    FSC      the temporal block's inputs have a range for each timestep
    cache    what `time-cache` makes a table of is in float: the rewrite is held against recorded calls, to 1e-6

`--folded` is the topology of Stable Diffusion 1.x, in which features depend on the timestep alone: the mean over
calibration prompts of what SDXL's added branch gives is added to the bias of `time_embedding`, and the branch is gone.
Its pictures are compared with its own in float.

Features are those of test prompts at every step of the walk: the cosine of the angle to the float feature, how many are
nearer to the float feature of another step of the walk, and by how many timesteps of 1 to 64 the worst prompt's is off
at each step, in the mean (`quant.temporal_errors`). PSNR is to the float model's pictures, all together, and once more
with nothing but the temporal block quantized. A row that is in the output file is not made again, and a unit whose
rounding was learned is kept in `--work`; units without temporal layers are the same in all rows that learn, and made
once.
"""

import argparse
import json
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixdq import CALIBRATION, Pictures, Subject, prompts
from torch import Tensor, nn

from turbopocket.export.build.calibration import DecodesFew
from turbopocket.export.build.rewriting import recorded
from turbopocket.export.build.temporal import found_block, temporal_inputs, with_features
from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.rewrites.base import applied
from turbopocket.export.rewrites.time_cache import TimeCache
from turbopocket.ground.names import at_place
from turbopocket.pocket.evaluate import REFERENCE_PICTURES, frechet_distance, write_json
from turbopocket.pocket.judge import alignment, load_judge
from turbopocket.pocket.render import render
from turbopocket.pocket.scenes import parse_caption, sample_scenes
from turbopocket.quant.block_inputs import CALLS_FILE, BlockInputs
from turbopocket.quant.compress import decompressed
from turbopocket.quant.fit import RECONSTRUCT
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layer_rounding import Rounding, rounded_layers
from turbopocket.quant.layers import compressible_layers, weight_of
from turbopocket.quant.options import ReconstructOptions, Temporal
from turbopocket.quant.reconstruct_blocks import (
    TEMPORAL,
    UNITS_FOLDER,
    TemporalUnit,
    reconstruct_to_files,
    reconstructed_in,
)
from turbopocket.quant.scheme import parse_scheme
from turbopocket.quant.store import OverlaidStore, WeightStore
from turbopocket.quant.temporal_errors import TemporalCall, feature_errors
from turbopocket.runtimes.compare.metrics import psnr_db

BITS = {"W4A8": ("int4-row", 8), "W8A6": ("int8-row", 6), "W8A8": ("int8-row", 8)}
IN_FLOAT = ("unet.conv_in", "unet.conv_out")
FEATURE_PROMPTS = 16
ALONE_PROMPTS = 100
FRECHET_PROMPTS = 500
"""A covariance of 128 features is not known from fewer pictures."""
Stored = Mapping[str, CompressedTensor]


@dataclass(frozen=True)
class Arm:
    """One row: what is learned, whether the temporal block has ranges by timestep, whether what can be is a table."""

    learned: Temporal | None
    by_step: bool = False
    cached: bool = False


ARMS = {
    "nearest": Arm(None),
    "frozen": Arm("frozen"),
    "inside": Arm("inside"),
    "tiar": Arm("tiar"),
    "inside, FSC": Arm("inside", by_step=True),
    "tiar, FSC": Arm("tiar", by_step=True),
    "nearest, FSC": Arm(None, by_step=True),
    "nearest, cache": Arm(None, cached=True),
    "tiar, cache": Arm("tiar", cached=True),
}


class Folded(Subject):
    """A model without SDXL's added branch, whose mean is in the bias of the time embedding."""

    def loaded(self, source: str) -> LoadedModel:
        plain = Subject(source, bos_aware=True)
        told = temporal_inputs(plain.components, plain.session, prompts("train", CALIBRATION))
        added = {
            name: torch.cat([call.inputs[name] for call in told if call.place.step == 0])
            for name in ("text_embeds", "time_ids")
        }
        model = load(source)
        unet: Any = model.modules["unet"]
        with torch.no_grad():
            mean = unet.get_aug_embed(added["text_embeds"], None, added).mean(0)
        last = unet.time_embedding.linear_2
        last.bias = nn.Parameter(last.bias + mean, requires_grad=False)
        unet.register_to_config(addition_embed_type=None)
        del unet.add_embedding, unet.add_time_proj
        return replace(model, family=replace(model.family, pipeline=partial(_without_added, model.family.pipeline)))


def _without_added(pipeline: Any, *args: Any) -> Any:
    found = pipeline(*args)
    feeds = {name: feed for name, feed in found.denoiser.inputs.items() if name == "encoder_hidden_states"}
    return found.model_copy(update={"denoiser": found.denoiser.model_copy(update={"inputs": feeds})})


class Ablation:
    """The rows of one model at one width, each measured and written down at once."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.name = f"{asked.model}, folded" if asked.folded else asked.model
        self.options = ReconstructOptions(iterations=asked.iterations, learning_rate=asked.learning_rate)
        self.block_alone = asked.block_alone
        self.out, self.work, self.pictures = asked.out, asked.work / self.name.replace(", ", "-"), asked.pictures
        self.about = {
            "prompts": asked.prompts,
            "feature_prompts": FEATURE_PROMPTS,
            "alone_prompts": min(ALONE_PROMPTS, asked.prompts),
            "calibration_prompts": CALIBRATION,
            "reconstruction_pictures": asked.pictures,
            "iterations": asked.iterations,
            "learning_rate": asked.learning_rate,
            "machine": platform.machine(),
        }
        self.subject = (Folded if asked.folded else Subject)(asked.model, bos_aware=True)
        subject, self.unet = self.subject, self.subject.unet
        self.denoiser = next(each for each in subject.components if each.name == "unet")
        self.asked, self.judge = prompts("test", asked.prompts), load_judge()
        self.told = temporal_inputs(subject.components, subject.session, self.asked[:FEATURE_PROMPTS])
        self.block = found_block(subject.components, subject.session.manifest, self.told[0])
        self.calls = with_features(self.block, self.told)
        self.own = {name: subject.layers[name] for name in self.block.layers}
        self.cached, self.nearest = cache(self._cached), cache(self._nearest)
        self.floats, self.inputs = cache(self._floats), cache(self._inputs)
        others = sample_scenes("test", REFERENCE_PICTURES, 1)
        self.reference = cache(lambda: render(others, torch.Generator().manual_seed(0)))

    def row(self, bits: str, name: str) -> None:
        """One row, if it is not there; with `block_alone`, as much of it as the temporal block's layers say."""
        model = self._kept()
        rows = model["rows"].setdefault(bits, {})
        if name in rows and (self.block_alone or "psnr_db" in rows[name]):
            return
        began = time.process_time()
        stored, roundings = self.made(bits, name)
        made = time.process_time()
        alone = {each: stored[each] for each in self.own}, {each: roundings[each] for each in self.own}
        whole = {}
        if not self.block_alone:
            with self.quantized(stored, roundings):
                pictures = self.subject.draw(self.asked)
            whole = self.seen(pictures)
            whole |= {"psnr_db": _finite(psnr_db(pictures, self.floats())), "median_psnr_db": self._median(pictures)}
        with self.quantized(*alone):
            of_block = self.subject.draw(self.asked[:ALONE_PROMPTS])
        rows[name] = {
            **whole,
            **self.features(*alone),
            "block_alone_psnr_db": _finite(psnr_db(of_block, self.floats()[: len(of_block)])),
            "block_alone_median_psnr_db": self._median(of_block),
            "making_seconds": made - began,
            "seconds": time.process_time() - began,
        }
        model["temporal_inputs"], model["temporal_share"] = list(self.block.inputs), self.block.share
        model["cached_layers"] = sorted(self.cached())
        self._write(model)
        told = {key: value for key, value in rows[name].items() if key != "blocks"}
        print(self.name, bits, name, told, flush=True)

    def float_row(self) -> None:
        """What the judge says of the float model."""
        model = self._kept()
        name = "float_alone" if self.block_alone else "float"
        if name not in model:
            model[name] = self.seen(self.floats())
            self._write(model)

    def _kept(self) -> dict[str, Any]:
        models = json.loads(self.out.read_text()) if self.out.is_file() else {}
        model: dict[str, Any] = models.get(self.name, {})
        same = {key: model.get(key) for key in self.about} == self.about
        return model if same else {**self.about, "rows": {}}

    def _write(self, model: dict[str, Any]) -> None:
        models = json.loads(self.out.read_text()) if self.out.is_file() else {}
        write_json(self.out, {**models, self.name: model})

    def made(self, bits: str, name: str) -> tuple[Stored, dict[str, Rounding]]:
        """Weights and roundings of every layer that is quantized in a row."""
        arm, (form, width) = ARMS[name], BITS[bits]
        in_float = {*IN_FLOAT, *(self.cached() if arm.cached else ())}
        schemes = {}
        for layer in self.subject.layers:
            scales = "step" if arm.by_step and layer in self.own else "static"
            schemes[layer] = parse_scheme("fp32" if layer in in_float else f"{form}+a{width}-{scales}+float")
        roundings = {layer: Rounding.of(layer, each, self.subject.ranges) for layer, each in schemes.items()}
        stored: Stored = {layer: self.nearest(layer, str(each.weight)) for layer, each in schemes.items()}
        if arm.learned is None:
            return stored, roundings
        folder = self._folder(bits, name)
        if arm.learned != "frozen":
            self._begin_with(folder, self._folder(bits, "frozen"))
        calls = temporal_inputs(self.subject.components, self.subject.session, prompts("train", self.pictures))
        temporal = TemporalUnit(self.block, self.denoiser.module, self.subject.layers, with_features(self.block, calls))
        options = replace(self.options, temporal=arm.learned)
        blocks = self.denoiser.blocks()
        if self.block_alone:
            blocks = {each: blocks[each] for each in blocks if arm.learned == "inside" and self._mixed(each)}
        inputs = self.inputs() if blocks else BlockInputs(folder)
        reconstruct_to_files(blocks, temporal, inputs, stored, roundings, options, 0, folder)
        return OverlaidStore(stored, reconstructed_in(folder)), roundings

    def _folder(self, bits: str, name: str) -> Path:
        how = f"{self.options.iterations}-{self.options.learning_rate:g}-{self.pictures}"
        return Path(self.work / how / bits / name.replace(", ", "-"))

    def _begin_with(self, folder: Path, other: Path) -> None:
        """Units that know no temporal layer are learned from the same arguments in every row, so with the same end."""
        (folder / UNITS_FOLDER).mkdir(parents=True, exist_ok=True)
        for file in (other / UNITS_FOLDER).glob("*.json"):
            if self._mixed(file.stem) or file.stem == TEMPORAL or (folder / UNITS_FOLDER / file.name).is_file():
                continue
            formats = {layer: parse_format(form) for layer, form in json.loads(file.read_text())["layers"].items()}
            for layer in formats:
                shutil.copy(WeightStore(other, formats).file(layer), WeightStore(folder, formats).file(layer))
            shutil.copy(file, folder / UNITS_FOLDER / file.name)

    def _mixed(self, unit: str) -> bool:
        return any(f"{layer}.".startswith(f"{unit}.") for layer in self.block.layers)

    @contextmanager
    def quantized(self, stored: Stored, roundings: Mapping[str, Rounding]) -> Iterator[None]:
        """While the block runs, these layers compute as they are stored."""
        with decompressed({"unet": self.unet}, stored), rounded_layers(self.subject.layers, roundings):
            yield

    def seen(self, pictures: Pictures) -> dict[str, float]:
        """What the judge says."""
        scenes = [parse_caption(each) for each in self.asked[: len(pictures)]]
        found = {"alignment": alignment(self.judge, pictures, scenes).all_right}
        if len(pictures) >= FRECHET_PROMPTS:
            found["frechet"] = frechet_distance(self.judge, pictures, self.reference())
        return found

    def features(self, stored: Stored, roundings: Mapping[str, Rounding]) -> dict[str, Any]:
        """Errors of temporal features, of all and by block."""
        with torch.inference_mode():
            expected = [self._features(call) for call in self.calls]
            with self.quantized(stored, roundings):
                found = [self._features(call) for call in self.calls]
        walks: dict[bytes, list[int]] = defaultdict(list)
        for index, call in enumerate(self.calls):
            walks[_conditions(call)].append(index)
        cosines: dict[str, list[float]] = {name: [] for name in self.block.ends}
        mismatches = dict.fromkeys(self.block.ends, 0)
        for walk in walks.values():
            for name in self.block.ends:
                floats = torch.cat([expected[index][name] for index in walk]).double()
                own = torch.cat([found[index][name] for index in walk]).double()
                cosines[name] += nn.functional.cosine_similarity(floats, own).tolist()
                nearest = torch.cdist(own, floats).argmin(1)
                mismatches[name] += int((nearest != torch.arange(len(walk))).sum())
        shifts: dict[str, list[int]] = {name: [] for name in self.block.ends}
        quantized = partial(self.quantized, stored, roundings)
        for each in feature_errors(self.block, self.denoiser.module, self.own, self.calls, "timestep", quantized):
            shifts[each.layer].append(abs(each.shift))
        everything = [cosine for own in cosines.values() for cosine in own]
        return {
            "cosine": float(np.mean(everything)),
            "least_cosine": min(everything),
            "features": len(everything),
            "mismatches": sum(mismatches.values()),
            "shift": float(np.mean([shift for own in shifts.values() for shift in own])),
            "blocks": {
                name: {
                    "cosine": float(np.mean(cosines[name])),
                    "least_cosine": min(cosines[name]),
                    "mismatches": mismatches[name],
                    "shift": float(np.mean(shifts[name])),
                }
                for name in self.block.ends
            },
        }

    def _features(self, call: TemporalCall) -> dict[str, Tensor]:
        with at_place(**asdict(call.place)):
            return self.block.features(self.denoiser.module, self.own, call.inputs)

    def _median(self, pictures: Pictures) -> float | None:
        found = [psnr_db(one, other) for one, other in zip(pictures, self.floats(), strict=False)]
        return _finite(float(np.median(found)))

    def _nearest(self, layer: str, form: str) -> CompressedTensor:
        weight = weight_of(layer, self.subject.layers[layer]).detach()
        return parse_format(form).compress(weight, RECONSTRUCT)

    def _cached(self) -> set[str]:
        """Layers that the rewrite replaces by a table, after it was found to give the same."""
        session = replace(self.subject.session, prompts=self.asked[:2])
        pipeline, timesteps = session.manifest.pipeline, session.manifest.sampler.timesteps
        calls = recorded(session, self.subject.components)
        found = applied(TimeCache(), self.denoiser, pipeline, calls, timesteps).component
        return set(self.block.layers) - set(compressible_layers("unet", found.module.model))

    def _floats(self) -> Pictures:
        asked = self.asked[:ALONE_PROMPTS] if self.block_alone else self.asked
        file = self.work / f"float-{len(asked)}.npy"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, self.subject.draw(asked))
        pictures: Pictures = np.load(file)
        return pictures

    def _inputs(self) -> BlockInputs:
        """What blocks are called with while pictures to learn from are drawn; kept in files."""
        folder = self.work / f"inputs-{self.pictures}"
        inputs = BlockInputs(folder)
        if not (folder / CALLS_FILE).is_file():
            session = replace(self.subject.session, prompts=prompts("train", self.pictures))
            runner = DecodesFew(self.subject.runner, session.manifest, 0)
            with inputs.recording(self.denoiser.blocks(), self.subject.layers):
                for index in range(self.pictures):
                    session.draw(runner, index)
        return inputs


def _finite(decibels: float) -> float | None:
    """None of equal pictures: JSON has no infinity."""
    return decibels if np.isfinite(decibels) else None


def _conditions(call: TemporalCall) -> bytes:
    """Equal for calls that differ in the timestep alone: those of one walk."""
    return b"".join(value.numpy().tobytes() for name, value in call.inputs.items() if name != "timestep")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-turbo")
    parser.add_argument("--folded", action="store_true", help="without SDXL's added branch")
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--rows", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--block-alone", action="store_true", help="features and the block alone: minutes, not hours")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=32, help="to learn from")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/temporal.json"))
    parser.add_argument("--work", type=Path, default=Path("build/temporal"))
    asked = parser.parse_args(given)
    torch.set_num_threads(1)
    ablation = Ablation(asked)
    ablation.float_row()
    for bits in asked.bits:
        for name in asked.rows:
            ablation.row(bits, name)


if __name__ == "__main__":
    main()
