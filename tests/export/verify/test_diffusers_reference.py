# SPDX-License-Identifier: Apache-2.0
"""The loop that phones repeat against diffusers' own pipeline, as every build compares them, and what must stop one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from turbopocket.export.build.draft import pipeline_manifest
from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of
from turbopocket.export.families.graphs import Component
from turbopocket.export.recipe import make_recipe
from turbopocket.export.targets.side_files import write_tokenizers
from turbopocket.export.verify.diffusers_reference import compare_with_diffusers, diffusers_picture
from turbopocket.export.verify.gaps import Session, ToDiffusers, torch_runner
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.text_to_image import draw, seeded_noise
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import ComponentSpec, Manifest, TensorSpec, load_manifest
from turbopocket.runtimes.scheduler_classes import SAMPLER_KINDS

PROMPT, NEGATIVE = "a red circle on the blue square", "green triangle"


class Drawing:
    """A loaded model as graphs, and what a build would draw with it; nothing is traced."""

    def __init__(self, source: Path, folder: Path, **sampler: Any) -> None:
        self.model = load(str(source), steps=sampler.get("steps"))
        self.components = components_of(self.model)
        recipe = make_recipe({"sampler": {"steps": 3, "guidance": 2.5} | sampler}, "test")
        specs = {component.name: _spec(component) for component in self.components}
        manifest = pipeline_manifest(self.model, recipe, specs, ())
        write_tokenizers(self.model, folder)
        self.session = Session(manifest, open_tokenizers(folder, manifest), [PROMPT], seed=5)

    def compare(self, **wrong: Any) -> ToDiffusers:
        """The comparison, of a loop that takes other values for some of the manifest's if `wrong` says so."""
        values = self.session.manifest.model_dump() | wrong
        session = replace(self.session, manifest=Manifest.model_validate(values))
        return compare_with_diffusers(self.model, torch_runner(self.components), session)


def _spec(component: Component) -> ComponentSpec:
    inputs = [
        TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=[1, *tensor.shape[1:]])
        for name, tensor in component.example_inputs.items()
    ]
    outputs = [TensorSpec(name=name, dtype="float32", shape=[1]) for name in component.output_names]
    return ComponentSpec(file=f"{component.name}/model.onnx", inputs=inputs, outputs=outputs)


@pytest.fixture
def sdxl(tiny_sdxl: Path, tmp_path: Path) -> Drawing:
    return Drawing(tiny_sdxl, tmp_path / "tokenizers")


@pytest.fixture
def sd(tiny_sd: Path, tmp_path: Path) -> Drawing:
    return Drawing(tiny_sd, tmp_path / "tokenizers")


def drawn(drawing: Drawing, **options: Any) -> np.ndarray:
    """Our loop's picture, free-running."""
    session = drawing.session
    runner, noise = torch_runner(drawing.components), seeded_noise(session.seed)
    return draw(runner, session.manifest, session.tokenizers, PROMPT, noise, **options)


@pytest.mark.parametrize("negative_prompt", [None, NEGATIVE])
@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_the_reference_is_the_picture_of_the_folders_own_pipeline(
    family: str, negative_prompt: str | None, request: pytest.FixtureRequest
) -> None:
    """Opened by diffusers itself, as anybody would; Euler and DDIM ask for no noise but the first."""
    drawing: Drawing = request.getfixturevalue(family)
    session, model = drawing.session, drawing.model
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model.folder)
    image = session.manifest.image
    latents = seeded_noise(session.seed)((1, 4, image.latent_height, image.latent_width))
    expected = pipeline(
        PROMPT, negative_prompt=negative_prompt, latents=torch.from_numpy(latents), num_inference_steps=4,
        guidance_scale=6.0, output_type="np",
    ).images[0]  # fmt: skip
    found = diffusers_picture(model, session.manifest, PROMPT, session.seed, negative_prompt, 4, 6.0)
    np.testing.assert_array_equal(found, expected)
    ours = drawn(drawing, steps=4, guidance=6.0, negative_prompt=negative_prompt)
    assert expected.std() > 0.01, "a flat picture would prove nothing"
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["model", *SAMPLER_KINDS])
@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd"])
def test_every_sampler_is_diffusers_scheduler_of_that_name(
    family: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    drawing = Drawing(request.getfixturevalue(family), tmp_path, kind=kind, steps=5, guidance=7.5)
    found = drawing.compare()
    assert found.failure is None
    assert 0 < found.largest_error < 1e-5
    arrays = [each.array for each in found.differences]
    last = ("input sample of call 10 of unet", "the output of call 10 of unet", "the finished picture")
    assert set(last) < set(arrays)


def test_two_right_loops_agree_where_rounding_becomes_another_picture(tiny_sdxl: Path, tmp_path: Path) -> None:
    drawing = Drawing(tiny_sdxl, tmp_path, kind="ddim", steps=30, guidance=7.5)
    free = diffusers_picture(drawing.model, drawing.session.manifest, PROMPT, drawing.session.seed)
    assert np.abs(drawn(drawing) - free).max() > 1e-4, "this sampler was chosen because it is chaotic"
    assert drawing.compare().largest_error < 1e-5


@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_is_compared_with_the_bias_of_its_steps(steps: int, tmp_path: Path) -> None:
    found = Drawing(Path("pocket-turbo"), tmp_path, steps=steps, guidance=1.0).compare()
    assert found.failure is None
    assert found.largest_error < 1e-5


def test_settings_that_stable_diffusion_takes_for_outdated_are_corrected_here_too(
    tiny_sd: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps_offset": 0, "clip_sample": True}))
    drawing = Drawing(folder, tmp_path / "tokenizers", steps=4)
    assert drawing.session.manifest.sampler.timesteps[-1] == 1
    assert drawing.session.manifest.sampler.clip_sample_range is None
    assert drawing.compare().failure is None


WRONG = "diffusers' own pipeline draws another picture from the same float weights and the same noise: relative error "


def test_a_wrong_vae_scaling_factor_is_found(sdxl: Drawing) -> None:
    image = sdxl.session.manifest.image.model_dump()
    found = sdxl.compare(image=image | {"vae_scaling_factor": image["vae_scaling_factor"] * 1.001})
    assert found.failure == f"{WRONG}0.000999 is over 0.0001 in input latent_sample of call 1 of vae_decoder"


@pytest.mark.parametrize(
    ("wrong", "array"),
    [
        ({"timestep_spacing": "leading"}, "input timestep of call 1 of unet"),
        ({"timestep_spacing": "linspace"}, "input timestep of call 3 of unet"),
        ({"beta_end": 0.01201}, "input sample of call 3 of unet"),
        ({"prediction_type": "v_prediction"}, "input sample of call 3 of unet"),
    ],
)
def test_a_wrong_walk_is_found_where_it_first_leaves_the_right_one(
    sdxl: Drawing, wrong: dict[str, Any], array: str
) -> None:
    sampler = sdxl.session.manifest.sampler.model_dump() | wrong
    found = sdxl.compare(sampler=sampler | {"timesteps": []})
    assert found.failure is not None
    assert found.failure.startswith(WRONG)
    assert found.failure.endswith(f" in {array}")


def test_text_encoders_in_the_wrong_order_are_found(sdxl: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    from turbopocket.runtimes.drawing import conditioning

    honest = conditioning.condition

    def swapped(*asked: Any) -> Any:
        values = honest(*asked)
        first, second = np.split(values["encoder_hidden_states"], [32], axis=-1)
        return values | {"encoder_hidden_states": np.concatenate([second, first], axis=-1)}

    monkeypatch.setattr("turbopocket.runtimes.drawing.text_to_image.condition", swapped)
    failure = sdxl.compare().failure
    assert failure is not None
    assert failure.endswith(" in input encoder_hidden_states of call 1 of unet")


def test_a_vae_config_that_the_loop_does_not_honour_is_found(sdxl: Drawing) -> None:
    vae: Any = sdxl.model.modules["vae"]
    vae.register_to_config(latents_mean=[0.1, 0.0, 0.0, 0.0], latents_std=[1.0, 1.0, 1.0, 2.0])
    failure = sdxl.compare().failure
    assert failure is not None
    assert failure.endswith(" in input latent_sample of call 1 of vae_decoder")


def test_a_network_that_is_asked_otherwise_than_diffusers_asks_it_is_found(
    sdxl: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = next(component for component in sdxl.components if component.name == "unet")
    honest = unet.module.forward

    def without_crop(sample: Any, timestep: Any, states: Any, pooled: Any, time_ids: Any) -> Any:
        return honest(sample, timestep, states, pooled, time_ids * 0)

    monkeypatch.setattr(unet.module, "forward", without_crop)
    failure = sdxl.compare().failure
    assert failure is not None
    assert failure.endswith(" in the output of call 1 of unet")


def test_a_loop_of_other_length_is_found(sdxl: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    from turbopocket.export.verify import diffusers_reference

    honest = diffusers_reference.draw
    monkeypatch.setattr(diffusers_reference, "draw", lambda *asked, **more: honest(*asked, steps=2, **more))
    assert "the number of calls of unet, 4 of 6" in [each.array for each in sdxl.compare().differences]
    monkeypatch.setattr(diffusers_reference, "draw", lambda *asked, **more: honest(*asked, steps=4, **more))
    assert "the number of calls of unet, 8 of 6" in [each.array for each in sdxl.compare().differences]


def test_nothing_of_the_model_or_of_diffusers_is_changed_by_it(sd: Drawing) -> None:
    unet: Any = sd.model.modules["unet"]
    unet.register_to_config(_diffusers_version="0.8.0")  # what diffusers takes for a reason to correct the config
    before = dict(unet.config), torch.get_rng_state(), diffusers.DDIMScheduler.step.__globals__["randn_tensor"]
    assert before[0]["sample_size"] == 16
    assert sd.compare().failure is None
    after = dict(unet.config), torch.get_rng_state(), diffusers.DDIMScheduler.step.__globals__["randn_tensor"]
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])
    assert after[2] is before[2]
    assert not unet._forward_hooks
    assert "decode" not in vars(sd.model.modules["vae"])


def test_a_scheduler_with_random_numbers_of_its_own_is_named(sdxl: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = diffusers.EulerDiscreteScheduler.step

    def step(self: Any, output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        return honest(self, output + 1e-3 * torch.randn(output.shape), timestep, sample, **options)

    monkeypatch.setattr(diffusers.EulerDiscreteScheduler, "step", step)
    with pytest.raises(TurbopocketError, match="EulerDiscreteScheduler draws random numbers that can not be replaced"):
        sdxl.compare()


def test_what_diffusers_refuses_to_draw_is_one_sentence(sdxl: Drawing) -> None:
    image = sdxl.session.manifest.image.model_dump()
    with pytest.raises(
        TurbopocketError, match="StableDiffusionXLPipeline of diffusers refuses to draw: .*divisible by"
    ):
        sdxl.compare(image=image | {"height": 20, "latent_height": 10}, sizes=[(20, 32)])


def _spoil_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    from turbopocket.runtimes.drawing import text_to_image

    honest = text_to_image.decode
    monkeypatch.setattr(text_to_image, "decode", lambda *asked: honest(*asked[:2], asked[2] * np.float32(1.02)))


def test_a_wrong_loop_ends_a_build_before_it_calibrates_and_leaves_nothing(
    tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil_the_decoder(monkeypatch)
    monkeypatch.setattr(
        "turbopocket.export.build.calibration.calibrate_to_files", lambda *_: pytest.fail("hours would be spent here")
    )
    ran = turbopocket("build", tiny_sd, "--steps", 2, "--formats", "fp16", "--out", tmp_path / "art")
    assert ran.code == 3
    assert f"error: {WRONG}0.02 is over 0.0001 in input latent_sample of call 1 of vae_decoder\nhint: " in ran.err
    assert list(tmp_path.iterdir()) == []


def test_check_repeats_the_comparison(
    artifact: Path, turbopocket: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = load_manifest(artifact).parity
    assert stated is not None
    assert 0 < stated["to_diffusers"] < 1e-5
    ran = turbopocket("check", artifact, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["parity"]["to_diffusers"] == stated["to_diffusers"]
    _spoil_the_decoder(monkeypatch)
    ran = turbopocket("check", artifact)
    assert ran.code == 3
    assert f"{WRONG}0.02 is over 0.0001 in input latent_sample" in ran.err
