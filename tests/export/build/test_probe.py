# SPDX-License-Identifier: Apache-2.0
"""Where the harm of a perturbed layer is felt: behind text encoders, denoiser, decoder and encoder of whole models."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from turbopocket.export.build.probe import Probe, make_probe
from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import component_name, components_of, layers_of
from turbopocket.export.verify.gaps import Session, torch_runner
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.compress import decompressed
from turbopocket.quant.fit import MSE
from turbopocket.quant.formats import parse_format
from turbopocket.quant.row_losses import Question, measure
from turbopocket.quant.sensitivity import compress_candidates
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers

from ...pixart_checkpoints import write_alpha
from ..drawer import drawer

PROMPTS = ["a red circle on the blue square", "the blue square"]
FORMATS = [parse_format("int8-row"), parse_format("int4-row")]
LAYERS = {
    "text_encoder.encoder.layers.0.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2.text_projection",
    "vae_encoder.encoder.conv_in",
    "unet.time_embedding.linear_1",
    "unet.add_embedding.linear_1",
    "unet.conv_in",
    "vae_decoder.decoder.conv_in",
}


def probe_of(folder: Path, out: Path, steps: int, **sampler: object) -> tuple[Probe, Session, Callable[[], None]]:
    """The probe of a tiny model, its session, and what draws its pictures."""
    made = drawer(folder, out, **sampler)
    components = components_of(made.model, image_to_image=bool(sampler.get("image_to_image")))
    session = Session(made.manifest, open_tokenizers(made.artifact, made.manifest), PROMPTS, 3)
    runner = torch_runner(components)

    def draw() -> None:
        for index in range(len(PROMPTS)):
            session.draw(runner, index)

    return make_probe(session, components, steps), session, draw


def test_losses_are_those_of_the_layer_alone_in_the_model(tiny_sdxl: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    probe, _, draw = probe_of(tiny_sdxl, tmp_path / "art", steps=2, image_to_image=True)
    modules = {name: component.module.model for name, component in probe.components.items()}
    layers = {name: layer for name, layer in layers_of(list(probe.components.values())).items() if name in LAYERS}
    assert set(layers) == LAYERS
    stats = calibrate(modules, draw, only=LAYERS)
    candidates = dict.fromkeys(layers, FORMATS)
    stored = dict(compress_candidates(layers, stats, candidates, MSE))
    with torch.no_grad():
        middle = probe.outputs()[-1][1].run(slice(0, 1))
    assert middle.shape[1] == probe.latents.shape[1], "variances are no part of it"
    felt: list[str] = []
    for components, output in probe.outputs():
        own = {name: formats for name, formats in candidates.items() if component_name(name) in components}
        [choices] = measure([Question(layers, own, stored, output, vectors=150)])
        rows = slice(0, output.rows)
        with torch.no_grad():
            expected = output.run(rows)
            for name in own:
                with decompressed(modules, {name: stored[name][0]}):
                    error = float((output.run(rows) - expected).square().sum() / expected.square().sum())
                assert error > 0, name
                assert choices[name].candidates[0].loss == pytest.approx(error, rel=0.3), name
                felt.append(name)
    assert sorted(felt) == sorted(LAYERS)


def test_of_a_large_picture_the_middle_is_decoded_and_read(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = probe_of(tiny_sdxl, tmp_path / "whole", steps=1, image_to_image=True)
    monkeypatch.setattr("turbopocket.export.build.probe.LATENT_SIDE", 4)
    probe, session, _ = probe_of(tiny_sdxl, tmp_path / "middle", steps=1, image_to_image=True)
    assert whole.samples is not None
    assert probe.samples is not None
    height, width = whole.latents.shape[2:]
    assert (height, width) > (4, 4)
    top, left = (height - 4) // 2, (width - 4) // 2
    assert np.array_equal(probe.latents, whole.latents[:, :, top : top + 4, left : left + 4])
    factor = session.manifest.image.height // session.manifest.image.latent_height
    assert probe.samples.shape[2:] == (4 * factor, 4 * factor)
    assert [tuple(output.run(slice(0, 1)).shape[2:]) for _, output in probe.outputs()] == [
        (height, width),
        (4 * factor, 4 * factor),
        (4, 4),
    ]


def test_prediction_of_the_probe_is_that_of_the_walk(tiny_sd: Path, tmp_path: Path) -> None:
    # Prompts, steps and text states of a row belong together, with guidance too, for which the empty prompt is read.
    probe, session, _ = probe_of(tiny_sd, tmp_path / "art", steps=2, guidance=5.0)
    denoiser = session.manifest.pipeline.denoiser
    _, output = probe.outputs()[0]
    assert output.rows == 2 * len(PROMPTS)
    inputs = probe.denoiser_inputs
    with torch.no_grad():
        found = output.run(slice(1, 4)).numpy()
    expected = torch_runner(list(probe.components.values())).run(denoiser.component, inputs)[denoiser.output]
    np.testing.assert_allclose(found, expected[1:4], atol=1e-5)
    states = inputs["encoder_hidden_states"]
    assert np.array_equal(states[0], states[1])
    assert not np.allclose(states[1], states[2])


def test_variances_that_no_loop_reads_are_not_felt(tmp_path: Path) -> None:
    write_alpha(tmp_path / "alpha")
    probe, session, _ = probe_of(tmp_path / "alpha", tmp_path / "art", steps=1)
    components, output = probe.outputs()[0]
    assert session.manifest.pipeline.denoiser.channels == "first half"
    assert components == ("text_encoder", "transformer")
    with torch.no_grad():
        assert output.run(slice(0, 1)).shape[1] == load(str(tmp_path / "alpha")).denoiser.config.in_channels
