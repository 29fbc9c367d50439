# SPDX-License-Identifier: Apache-2.0
"""Whole models that other processes measure: libraries' modules, rewritten ones, weights in checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from turbopocket.export.build.content import SsimForm
from turbopocket.export.build.probe import make_probe
from turbopocket.export.build.walk import make_walk
from turbopocket.export.families.components import component_name, components_of, layers_of
from turbopocket.export.families.graphs import Component
from turbopocket.export.rewrites.bos_aware import _with_constants
from turbopocket.export.verify.gaps import Session
from turbopocket.quant import row_losses
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layers import weight_of
from turbopocket.quant.row_losses import Question, RowwiseOutput, measure
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers

from ...quant.test_row_losses import elsewhere
from ..drawer import drawer

PROMPTS = ["a red circle on the blue square", "the blue square"]
FORMATS = [parse_format("int8-row"), parse_format("int4-row")]


def outputs_of(session: Session, components: Sequence[Component]) -> list[tuple[Sequence[str], RowwiseOutput]]:
    """Content of the pictures, then quality."""
    walk = make_walk(session, components)
    with torch.no_grad():
        form = SsimForm(walk.pictures(slice(0, len(PROMPTS))))
    names = [each.name for each in components]
    return [(names, walk.output(form, form.energy)), *make_probe(session, components, 2).outputs()]


def stored_of(layers: Mapping[str, nn.Module]) -> dict[str, list[CompressedTensor]]:
    return {
        name: [each.compress(weight_of(name, layer), ABSMAX, None) for each in FORMATS]
        for name, layer in layers.items()
    }


def test_twins_of_whole_models_measure_the_same(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(row_losses, "WORTH_SECONDS", 0.0)
    made = drawer(tiny_sdxl, tmp_path / "art", steps=2)
    components = components_of(made.model)
    pipeline = made.manifest.pipeline
    components = [
        _with_constants(each, pipeline, torch.randn(1, 96)) if each.name == pipeline.denoiser.component else each
        for each in components
    ]
    session = Session(made.manifest, open_tokenizers(made.artifact, made.manifest), PROMPTS, 3)
    layers = dict(list(layers_of(components).items())[::7])
    stored = stored_of(layers)
    questions = [
        Question(layers, {name: FORMATS for name in layers if component_name(name) in names}, stored, output)
        for names, output in outputs_of(session, components)
    ]
    here = measure(questions)
    assert measure(questions, spread=elsewhere, folder=tmp_path) == here
    losses = [each.loss for found in here for choices in found.values() for each in choices.candidates]
    assert sum(loss > 0 for loss in losses) > len(losses) / 2  # nothing reads the last layers of text encoders
    # A layer that has another weight here is measured with it there.
    name = next(name for name in layers if component_name(name) == pipeline.denoiser.component)
    other = replace(questions[1], stored={**stored, name: stored[name][::-1]})
    [found] = measure([other], spread=elsewhere, folder=tmp_path / "art")
    assert found[name].candidates[0].loss == here[1][name].candidates[1].loss
