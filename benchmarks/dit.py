# SPDX-License-Identifier: Apache-2.0
"""`pocket-dit` as a subject of experiments: its transformer takes other weights, and is drawn with and recorded."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from turbopocket.export.build.draft import pipeline_manifest
from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of, described
from turbopocket.export.recipe import make_recipe
from turbopocket.export.targets.side_files import write_tokenizers
from turbopocket.export.verify.gaps import Session, torch_runner
from turbopocket.ground.arrays import Arrays
from turbopocket.pocket.scenes import sample_scenes
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.fit import FITS
from turbopocket.quant.formats import LayerFormat, parse_format
from turbopocket.quant.layers import compressible_layers, weight_shape
from turbopocket.quant.observe import LayerStats, needed_by
from turbopocket.runtimes.compare.replay import Recorder
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import ComponentSpec
from turbopocket.runtimes.runner import Runner

MODEL, DENOISER = "pocket-dit", "transformer"
BATCH, CALIBRATION = 50, 16
TRAINING, AT_ONCE = 32, 4
Pictures = NDArray[np.uint8]


def prompts(split: Any, count: int) -> list[str]:
    """Captions of a split."""
    return [scene.caption for scene in sample_scenes(split, count, 0)]


@contextmanager
def text_remembered(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Keys and values of text are computed once, not in each of 20 steps."""

    def remembering(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        last: list[Tensor] = []

        def run(x: Tensor) -> Tensor:
            if not last or last[0].shape != x.shape or not torch.equal(last[0], x):
                last[:] = x, forward(x)
            return last[1]

        return run

    with ExitStack() as undo:
        for block in blocks.values():
            for path in ("attn2.to_k", "attn2.to_v"):
                layer = block.get_submodule(path)
                layer.forward = remembering(layer.forward)  # type: ignore[method-assign]
                undo.callback(delattr, layer, "forward")
        yield


@dataclass(frozen=True)
class Exported:
    """The transformer from its ONNX file, and as much of a manifest as its runner reads; the rest as elsewhere."""

    denoiser: Runner
    others: Runner

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        runner = self.denoiser if component == DENOISER else self.others
        return runner.run(component, inputs)


@dataclass(frozen=True)
class OneComponent:
    """As much of a manifest as a runner reads."""

    components: Mapping[str, ComponentSpec]
    name: str = "benchmark"
    plan: None = None


class Subject:
    """`pocket-dit`, whose transformer is given other weights."""

    def __init__(self) -> None:
        model = load(MODEL)
        own = json.loads((model.folder / "sampling.json").read_text())
        sampler = {"steps": own["steps"], "guidance": own["guidance_scale"]}
        recipe = make_recipe({"model": {"source": MODEL}, "sampler": sampler}, "benchmark")
        self.components = components_of(model)
        draft = pipeline_manifest(model, recipe, {each.name: described(each) for each in self.components}, ())
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizers(model, Path(folder))
            self.session = Session(draft, open_tokenizers(Path(folder), draft), (), 0)
        self.runner = torch_runner(self.components)
        self.component = next(each for each in self.components if each.name == DENOISER)
        self.model = self.component.module.model
        self.layers = compressible_layers(DENOISER, self.model)
        blocks = self.component.blocks()
        self.blocks = {name: block for name, block in blocks.items() if ".transformer_blocks." in name}
        self.coded = [name for name in self.layers if ".transformer_blocks." in name]
        self.calibration = cache(lambda: self._calls(CALIBRATION, CALIBRATION))
        self.training = cache(lambda: shortened(self._calls(TRAINING, AT_ONCE)))
        self.stats = cache(self._stats)

    def _stats(self) -> dict[str, LayerStats]:
        calls, kinds = self.calibration(), {needed_by(fit) for fit in FITS}
        return calibrate({DENOISER: self.model}, lambda: [call() for call in calls], kinds=kinds)

    def draw(self, asked: Sequence[str], runner: Runner | None = None, batch: int = BATCH) -> Pictures:
        """uint8 [N, H, W, 3], prompt i from the noise of seed i."""
        session, drawing = replace(self.session, prompts=asked), runner or self.runner
        parts = [range(start, min(start + batch, len(asked))) for start in range(0, len(asked), batch)]
        with text_remembered(self.blocks):
            return np.stack([picture for part in parts for picture in session.draw_batch(drawing, part)])

    def _calls(self, pictures: int, batch: int) -> list[partial[Any]]:
        """The transformer's calls while so many training prompts are drawn, so many at a time."""
        recorder = Recorder(self.runner)
        self.draw(prompts("train", pictures), recorder, batch)
        names = list(self.component.example_inputs)
        own = [each.inputs for each in recorder.calls if each.component == DENOISER]
        return [partial(self.component.module, *(torch.from_numpy(each[name]) for name in names)) for each in own]

    def forms(self, form: LayerFormat) -> dict[str, LayerFormat]:
        """Linears of transformer blocks in the format, the rest in fp16."""
        return {name: form if name in self.coded else parse_format("fp16") for name in self.layers}

    def shape(self, layer: str) -> tuple[int, ...]:
        return weight_shape(layer, self.layers[layer])


def shortened(calls: Sequence[partial[Any]]) -> list[partial[Any]]:
    """The same calls, their text and its mask cut behind the longest prompt of all."""
    length = max(int(call.args[3].sum(1).max()) for call in calls)
    return [partial(each.func, *each.args[:2], *(text[:, :length] for text in each.args[2:])) for each in calls]
