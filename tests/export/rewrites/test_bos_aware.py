# SPDX-License-Identifier: Apache-2.0
"""The first text token's keys and values as constants: the same outputs, and none of a prompt where there is none."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turbopocket.export.build.build import build
from turbopocket.export.build.rewriting import recorded, rewritten, shaped
from turbopocket.export.check import check
from turbopocket.export.checkpoint.load import load
from turbopocket.export.evidence import evidence_for
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.families.components import components_of, described
from turbopocket.export.families.graphs import Component
from turbopocket.export.plan import plan
from turbopocket.export.recipe import Recipe, make_recipe
from turbopocket.export.rewrites.base import Rewritten, applied
from turbopocket.export.rewrites.bos_aware import STATES, BosAware, BosAwareProcessor, TextStates
from turbopocket.export.verify.gaps import Session
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.observe import Extremes
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.compare.replay import Call
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.pipeline import Pipeline

from ...pixart_checkpoints import write_alpha
from ..drawer import drawer

PROMPTS = ["a red circle on the blue square", "the blue square"]


@dataclass
class Subject:
    """A model's denoiser, and calls that it had while the model drew."""

    model: LoadedModel
    components: Sequence[Component]
    pipeline: Pipeline
    calls: list[Call]

    @property
    def denoiser(self) -> Component:
        return next(each for each in self.components if each.name == self.pipeline.denoiser.component)

    def applied(self) -> Rewritten:
        return applied(BosAware(), self.denoiser, self.pipeline, self.calls, ())


def subject_of(folder: Path, out: Path, **sampler: Any) -> Subject:
    made = drawer(folder, out, **sampler)
    session = Session(made.manifest, open_tokenizers(made.artifact, made.manifest), PROMPTS, 3)
    components = components_of(made.model)
    return Subject(made.model, components, made.manifest.pipeline, recorded(session, components))


@pytest.fixture(scope="module")
def turbo() -> tuple[Subject, Recipe]:
    """The bundled SDXL-like model, whose BOS is the outlier that the paper is about."""
    recipe = make_recipe({"compress": {"rewrites": ["bos-aware"]}, "sampler": {"steps": 2}}, "a test")
    model = load(recipe.model.source, (), 2)
    components = components_of(model)
    pipeline = model.family.pipeline(model, {each.name: described(each) for each in components})
    return Subject(model, components, pipeline, []), recipe


@pytest.fixture(scope="module")
def guided(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """SDXL's layout, guided away from zeros."""
    return subject_of(tiny_sdxl, tmp_path_factory.mktemp("sdxl"), steps=2, guidance=3.0)


def test_no_output_changes_and_keys_are_made_of_the_other_tokens(turbo: tuple[Subject, Recipe]) -> None:
    subject, recipe = turbo
    found = rewritten(subject.model, subject.components, recipe, evidence_for(subject.model))
    [spec] = found.specs
    assert spec.facts["ratio"] == spec.facts["largest_bos"] / spec.facts["largest_other"] > 30
    assert found.remarks[0].startswith("bos-aware: the first token's text states reach 904")
    ranges = []
    for components in (subject.components, found.components):
        unet = next(each for each in components if each.name == "unet")
        inputs = [torch.zeros_like(each) for each in unet.example_inputs.values()]
        inputs[2] = torch.arange(inputs[2].numel(), dtype=torch.float32).reshape(inputs[2].shape) % 7
        inputs[2][:, 0, 0] = 900.0
        stats = calibrate({"unet": unet.module.model}, lambda: unet.module(*inputs), kinds=[Extremes])  # noqa: B023
        ranges.append(max(layer[Extremes].input[1] for name, layer in stats.items() if ".attn2.to_k" in name))
    assert ranges == [900.0, 6.0]


def test_the_half_without_a_prompt_has_no_constants_of_one(guided: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert guided.pipeline.without_prompt == "zeros"
    assert [bool(call.inputs[STATES].any()) for call in guided.calls] == [True, False, True, False, False]
    found = guided.applied().component
    for call in guided.calls:
        with torch.no_grad():
            output = found.module(*(torch.from_numpy(np.asarray(call.inputs[name])) for name in found.example_inputs))
        assert relative_error(output.numpy(), call.outputs["out_sample"]) < 1e-6

    def of_a_prompt(
        self: BosAwareProcessor, constant_E: torch.Tensor, rest: torch.Tensor, is_prompt: torch.Tensor
    ) -> torch.Tensor:
        return constant_E.expand(len(rest), 1, -1)

    monkeypatch.setattr(BosAwareProcessor, "_of_first", of_a_prompt)
    with pytest.raises(TurbopocketError, match=r"in recorded call 1 unet gives out_sample with a relative error of"):
        guided.applied()


def test_both_halves_may_be_in_one_batch(guided: Subject) -> None:
    one, other = guided.calls[:2]
    together = {
        name: np.concatenate([one.inputs[name], other.inputs[name]]) if one.inputs[name].ndim else one.inputs[name]
        for name in guided.denoiser.example_inputs
    }
    with torch.no_grad():
        output = guided.applied().component.module(*map(torch.from_numpy, together.values())).numpy()
    expected = np.concatenate([one.outputs["out_sample"], other.outputs["out_sample"]])
    assert relative_error(output, expected) < 1e-6


def test_the_empty_prompt_begins_as_all_prompts_do(tiny_sd: Path, tmp_path: Path) -> None:
    subject = subject_of(tiny_sd, tmp_path, steps=2, guidance=3.0)
    assert subject.pipeline.without_prompt == "empty prompt"
    own = [path for path, _ in subject.applied().component.module.named_parameters() if "bos" in path]
    assert own
    assert not any(".attn1." in path for path in own)


def test_states_that_depend_on_the_prompt_are_refused(guided: Subject) -> None:
    states = guided.calls[2].inputs[STATES].copy()
    states[:, 0] *= 1.001
    calls = [*guided.calls[:2], replace(guided.calls[2], inputs={**guided.calls[2].inputs, STATES: states})]
    with pytest.raises(TurbopocketError, match="the first token differ by 0.001 between prompts, more than 1e-06"):
        applied(BosAware(), guided.denoiser, guided.pipeline, calls, ())


def test_a_transformer_that_reads_t5_is_refused(tmp_path: Path) -> None:
    write_alpha(tmp_path / "model")
    model = load(str(tmp_path / "model"))
    components = components_of(model)
    recipe = make_recipe({"compress": {"rewrites": ["bos-aware"]}}, "a test")
    with pytest.raises(TurbopocketError, match="bos-aware: transformer has no cross-attention to the states of CLIP"):
        shaped(components, recipe, model)


def test_the_float_model_stays_as_it_was(guided: Subject) -> None:
    before = [name for name, _ in guided.model.modules["unet"].named_parameters()]
    own = dict(guided.applied().component.module.named_parameters())
    assert [name for name, _ in guided.model.modules["unet"].named_parameters()] == before
    shared = dict(guided.denoiser.module.named_parameters())
    assert all(own[name] is value for name, value in shared.items())
    assert len(own) - len(shared) == 2 * sum(".attn2.to_k." in name for name in shared)


def test_an_artifact_has_the_constants_and_is_refused_with_another_encoder(tiny_sdxl: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": {"source": str(tiny_sdxl)},
        "compress": {"formats": ["int8-row", "fp16"], "fit": "absmax", "rewrites": ["bos-aware"]},
        "sampler": {"steps": 1, "guidance": 0.0},
        "calibrate": {"pictures": 1},
        "parity": {"pictures": 1},
    }
    out = tmp_path / "art"
    built = build(make_recipe(values, "a test"), out, keep=False)
    assert built.gaps.failure is None
    assert abs(built.plan.total_bytes - built.total_bytes) <= 0.01 * built.total_bytes
    without = {**values, "compress": {**values["compress"], "rewrites": []}}
    planned, plain = (plan(make_recipe(each, "a test")) for each in (values, without))
    assert planned.fixed_bytes > plain.fixed_bytes
    file = out / "manifest.json"
    manifest = json.loads(file.read_text())
    [spec] = manifest["rewrites"]
    assert spec["name"] == "bos-aware"
    assert set(spec["text_encoders"]) == {"text_encoder", "text_encoder_2"}
    assert check(out).failure is None
    spec["text_encoders"]["text_encoder_2"] = "0" * 64
    file.write_text(json.dumps(manifest))
    with pytest.raises(
        TurbopocketError, match="constants of bos-aware were made from another text_encoder_2: sha256 0"
    ):
        check(out)


def test_states_that_were_read_without_gradients_are_read_again_with_them() -> None:
    text, states = TextStates(zeros=True), torch.randn(1, 3, 4, requires_grad=True)
    with torch.no_grad():
        kept = text.parts(states)
        assert text.parts(states)[0] is kept[0]
    assert text.parts(states)[0].requires_grad
    assert text.parts(torch.zeros(2, 3, 4))[1].flatten().tolist() == [0.0, 0.0]
