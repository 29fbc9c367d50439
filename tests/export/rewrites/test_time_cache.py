# SPDX-License-Identifier: Apache-2.0
"""What depends on the timestep alone as tables: the same outputs at the shipped timesteps, fewer bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.build.build import build
from turbopocket.export.build.rewriting import recorded, rewritten, shaped
from turbopocket.export.checkpoint.load import load
from turbopocket.export.evidence import evidence_for
from turbopocket.export.families.components import components_of
from turbopocket.export.families.graphs import Component
from turbopocket.export.plan import plan
from turbopocket.export.recipe import make_recipe
from turbopocket.export.rewrites.base import Rewritten, applied
from turbopocket.export.rewrites.time_cache import TimeCache, TimeTable
from turbopocket.export.verify.gaps import Session, torch_runner
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.compare.replay import Call, Recorder
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import load_manifest

from ...pixart_checkpoints import write_alpha
from ..drawer import drawer

PROMPTS = ["a red circle on the blue square", "the blue square"]
STEPS = 3


class Subject:
    """A model's UNet, calls that it had while two prompts were drawn, and the timesteps."""

    def __init__(self, folder: Path, out: Path) -> None:
        made = drawer(folder, out, steps=STEPS, guidance=3.0)
        tokenizers = open_tokenizers(made.artifact, made.manifest)
        self.session = Session(made.manifest, tokenizers, PROMPTS, 3)
        self.components = components_of(made.model)
        self.pipeline, self.timesteps = made.manifest.pipeline, made.manifest.sampler.timesteps
        self.unet = next(each for each in self.components if each.role == "denoiser")
        self.calls = recorded(self.session, self.components)

    def all_calls(self) -> list[Call]:
        """Of one picture."""
        recorder = Recorder(torch_runner(self.components))
        self.session.draw(recorder, 0)
        return [call for call in recorder.calls if call.component == "unet"]

    def applied(self, rewrite: TimeCache, calls: Sequence[Call] | None = None) -> Component:
        return applied(rewrite, self.unet, self.pipeline, calls or self.calls, self.timesteps).component


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tiny_sdxl, tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def sd(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tiny_sd, tmp_path_factory.mktemp("sd"))


def tensors(call: Call) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(each)) for name, each in call.inputs.items()}


def error(component: Component, call: Call) -> float:
    """Of a recorded call's output."""
    inputs = tensors(call)
    with torch.no_grad():
        output = component.module(*(inputs[name] for name in component.example_inputs))
    return relative_error(output.numpy(), call.outputs["out_sample"])


@pytest.mark.parametrize("layout", ["sdxl", "sd"])
def test_every_call_of_a_walk_gives_what_it_gave(layout: str, request: pytest.FixtureRequest) -> None:
    subject: Subject = request.getfixturevalue(layout)
    found, calls = subject.applied(TimeCache()), subject.all_calls()
    assert len({call.timestep for call in calls}) == STEPS
    assert max(error(found, call) for call in calls) < 1e-6
    unet, before = found.module.model, subject.unet.module.model
    tables = [path for path, each in unet.named_modules() if isinstance(each, TimeTable)]
    projections = [path for path, _ in before.named_modules() if path.endswith("time_emb_proj")]
    assert projections
    assert tables == (["time_embedding"] if layout == "sdxl" else projections)
    assert sum(each.numel() for each in unet.parameters()) < sum(each.numel() for each in before.parameters())
    assert "time_embedding.linear_1.weight" in dict(before.named_parameters())


def test_the_row_of_another_timestep_is_noticed(sdxl: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(self: TimeTable, x_B1: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.rows[:1].expand(len(x_B1), -1)

    found = sdxl.applied(TimeCache())
    monkeypatch.setattr(TimeTable, "forward", first)
    errors = {call.timestep: error(found, call) for call in sdxl.all_calls()}
    assert errors[sdxl.timesteps[0]] < 1e-6 < errors[sdxl.timesteps[-1]]


class Zeros(nn.Module):
    """Adds nothing to the time embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.width)


class OfOnePrompt(TimeCache):
    """Planted: a table of the time embedding with what the first prompt adds to it."""

    def made(self, denoiser: Component, pipeline: Any, calls: Sequence[Call], timesteps: Sequence[float]) -> Rewritten:
        found = super().made(denoiser, pipeline, calls, timesteps)
        inputs, unet = tensors(calls[0]), found.component.module.model
        added = {name: inputs[name] for name in ("text_embeds", "time_ids")}
        with torch.no_grad():
            of_prompt = denoiser.module.model.get_aug_embed(inputs["sample"], inputs["encoder_hidden_states"], added)
        unet.time_embedding = TimeTable(unet.time_embedding.keys.data, unet.time_embedding.rows.data + of_prompt)
        unet.add_embedding = Zeros(of_prompt.shape[-1])
        return found


def test_a_cache_that_holds_for_one_prompt_only_is_refused(sdxl: Subject) -> None:
    own = sdxl.calls[:1]
    assert error(sdxl.applied(OfOnePrompt(), own), own[0]) < 1e-6, "of the prompt that it was made for it is right"
    with pytest.raises(TurbopocketError, match=r"time-cache: in recorded call \d unet gives out_sample"):
        sdxl.applied(OfOnePrompt())


def test_a_transformer_is_refused(tmp_path: Path) -> None:
    write_alpha(tmp_path / "model")
    model = load(str(tmp_path / "model"))
    values = {"compress": {"rewrites": ["time-cache"]}, "sampler": {"steps": 2, "guidance": 1.0}}
    with pytest.raises(TurbopocketError, match="time-cache: transformer is no UNet with a time embedding"):
        shaped(components_of(model), make_recipe(values, "a test"), model)


def test_an_artifact_weighs_less_and_draws_in_its_steps_alone(tiny_sd: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": {"source": str(tiny_sd)},
        "compress": {"formats": ["int8-row", "fp16"], "fit": "absmax", "rewrites": ["time-cache"]},
        "sampler": {"steps": 2, "guidance": 1.0},
        "calibrate": {"pictures": 1},
        "parity": {"pictures": 1},
    }
    recipe = make_recipe(values, "a test")
    built = build(recipe, tmp_path / "art", keep=False)
    assert built.gaps.failure is None
    assert load_manifest(tmp_path / "art").only_these_steps
    assert not any("time_emb" in layer for layer in built.plan.schemes)
    assert abs(built.plan.total_bytes - built.total_bytes) <= 0.01 * built.total_bytes
    without = make_recipe({**values, "compress": {**values["compress"], "rewrites": []}}, "a test")
    cached, plain = plan(recipe), plan(without)
    assert cached.plan.total_bytes < plain.plan.total_bytes
    model = load(str(tiny_sd))
    found = rewritten(model, components_of(model), recipe, evidence_for(model))
    assert found.only_these_steps
    assert found.specs[0].text_encoders == {}
    assert found.specs[0].facts["numbers_after"] < found.specs[0].facts["numbers_before"]
