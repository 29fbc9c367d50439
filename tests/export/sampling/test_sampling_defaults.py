# SPDX-License-Identifier: Apache-2.0
"""What a model that is published without steps and guidance is drawn with: told by a sign and said, or asked for."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.families.registry import FAMILIES
from turbopocket.export.recipe import make_recipe, recipe_of
from turbopocket.export.sampling.defaults import Sampling, sampling_of
from turbopocket.export.sampling.spec import with_sampling
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.manifest import load_manifest

Named = Callable[..., Path]
TRAILING = {"timestep_spacing": "trailing"}
LEADING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}


@pytest.fixture
def named(tiny_sdxl: Path, tmp_path: Path) -> Named:
    """A folder of that name with tiny SDXL's configs and no `sampling.json`, and values of its own in some of them."""

    def make(name: str, source: Path = tiny_sdxl, **values: dict[str, Any]) -> Path:
        folder = tmp_path / name
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "sampling.json"))
        for part, own in ({"scheduler": LEADING} | values).items():
            path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
            path.write_text(json.dumps(json.loads(path.read_text()) | own))
            if "_class_name" in own:
                index = json.loads((folder / "model_index.json").read_text())
                index["scheduler"] = ["diffusers", own["_class_name"]]
                (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


def sampling(folder: Path, *lora: str, **given: Any) -> Sampling:
    return sampling_of(load_shapes(str(folder)), lora=[Path(name) for name in lora], **given)


def test_the_pipelines_guidance_is_what_diffusers_calls_them_with() -> None:
    for family in FAMILIES.values():
        call = inspect.signature(getattr(diffusers, family.pipeline_class).__call__)
        assert call.parameters["guidance_scale"].default == family.guidance


def test_a_model_without_any_sign_gets_thirty_steps_and_its_pipelines_guidance_and_is_told_so(
    named: Named, tiny_sd: Path
) -> None:
    xl, sd = sampling(named("my-model")), sampling(named("other-model", tiny_sd))
    assert (xl.steps, xl.guidance, sd.steps, sd.guidance) == (30, 5.0, 30, 7.5)
    assert xl.notes == (
        "steps 30 and guidance 5 assumed: nothing says that my-model was made for few steps, "
        "and diffusers draws with that guidance",
    )


CARDS = [
    ("sdxl-turbo", 1, 0.0),
    ("sd-turbo", 1, 0.0),
    ("sd_xl_turbo_1.0_fp16", 1, 0.0),
    ("models--stabilityai--sdxl-turbo/snapshots/71153311d3dbb46851df1931d3ca6e939de83304", 1, 0.0),
    ("sdxl_lightning_4step_unet", 4, 0.0),
    ("SDXL-Lightning-8step", 8, 0.0),
    ("Hyper-SD15-2steps", 2, 0.0),
    ("dmd2_sdxl_4step", 4, 0.0),
    ("dmd2_sdxl_1step_unet_fp16", 1, 0.0),
    ("dreamshaper-xl-v2-turbo", 6, 2.0),
    ("DreamShaperXL_Lightning", 4, 2.0),
    ("lcm-ssd-1b-merged", 4, 1.0),
    ("flash-sdxl", 4, 0.0),
    ("sdxs-512-0.9", 1, 0.0),
]


@pytest.mark.parametrize(("name", "steps", "guidance"), CARDS)
def test_a_name_tells_what_the_card_draws_with(named: Named, name: str, steps: int, guidance: float) -> None:
    found = sampling(named(name))
    assert (found.steps, found.guidance) == (steps, guidance)
    assert found.notes[0].startswith(f"steps {steps} and guidance {guidance:g} assumed: its name is ")


@pytest.mark.parametrize(
    ("file", "steps", "guidance"),
    [
        ("sdxl_lightning_4step_lora.safetensors", 4, 0.0),
        ("Hyper-SDXL-8steps-lora.safetensors", 8, 0.0),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", 4, 0.0),
        ("pcm_sdxl_smallcfg_2step_converted.safetensors", 2, 0.0),
        ("pcm_sd15_normalcfg_8step_converted.safetensors", 8, 7.5),
        ("lcm-lora-sdxl/pytorch_lora_weights.safetensors", 4, 1.0),
        ("models--h1t--TCD-SDXL-LoRA/snapshots/a1b2/pytorch_lora_weights.safetensors", 4, 0.0),
    ],
)
def test_a_lora_file_tells_it_for_an_ordinary_model(named: Named, file: str, steps: int, guidance: float) -> None:
    found = sampling(named("my-model"), f"/somewhere/{file}")
    assert (found.steps, found.guidance) == (steps, guidance)
    assert " assumed: LoRA " in found.notes[0]


def test_a_style_lora_tells_nothing(named: Named) -> None:
    found = sampling(named("my-model"), "hyperrealism-2000steps.safetensors", "flash-photo.safetensors")
    assert (found.steps, found.guidance) == (30, 5.0)


def test_where_the_unet_came_from_tells_it_too(named: Named) -> None:
    found = sampling(named("my-model", unet={"_name_or_path": "stabilityai/sdxl-turbo"}))
    assert (found.steps, found.guidance) == (1, 0.0)
    assert found.notes[0] == "steps 1 and guidance 0 assumed: its UNet came from sdxl-turbo (Turbo)"
    ordinary = sampling(named("another", unet={"_name_or_path": "/data/pytorch-lightning/run/unet"}))
    assert ordinary.steps == 30


def test_the_scheduler_class_tells_it_where_no_name_does(named: Named) -> None:
    found = sampling(named("my-model", scheduler={"_class_name": "LCMScheduler"}))
    assert (found.steps, found.guidance) == (4, 1.0)
    assert found.notes == ("steps 4 and guidance 1 assumed: its scheduler is LCMScheduler (LCM)",)


@pytest.mark.parametrize(
    ("name", "steps", "unknown"),
    [
        ("fancy-turbo-xl", None, "many steps and how much guidance"),
        ("juggernautXL_v9Lightning", 5, "much guidance"),
        ("realvis-lightning-4step", None, "many steps and how much guidance"),
        ("sdxl-lightning", None, "many steps"),
        ("sdxl_lightning_1step_x0", None, "many steps"),
        ("Hyper-SDXL-8steps-CFG", None, "much guidance"),
        ("my-4step-model", None, "many steps and how much guidance"),
    ],
)
def test_a_sign_that_does_not_tell_a_number_makes_it_asked_for(
    named: Named, name: str, steps: int | None, unknown: str
) -> None:
    with pytest.raises(TurbopocketError) as found:
        sampling(named(name), steps=steps)
    assert str(found.value).startswith(
        f"{name} does not tell with how {unknown} it is to be drawn: its name is {name} ("
    )
    flags = [f"--{flag}" for flag in ("steps", "guidance") if flag in unknown]
    assert found.value.hint == f"give {' and '.join(flags)}"
    given = sampling(named(f"{name}-again"), steps=3, guidance=1.5)
    assert (given.steps, given.guidance) == (3, 1.5)
    assert not any("assumed" in note for note in given.notes)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler"])
def test_trailing_spacing_without_a_name_is_asked_about(named: Named, scheduler: str) -> None:
    """The published SDXL-Turbo folder under another name; ordinary checkpoints mostly lead or are linspaced."""
    trailing = {"_class_name": scheduler} | TRAILING
    with pytest.raises(TurbopocketError, match=f"its {scheduler} has timestep_spacing trailing"):
        sampling(named("my-model", scheduler=trailing))
    zero_snr = sampling(named("with-zero-snr", scheduler=trailing | {"rescale_betas_zero_snr": True}))
    assert zero_snr.steps == 30


def test_signs_that_disagree_are_both_named_and_only_what_they_disagree_on_is_asked(named: Named) -> None:
    folder = named("sdxl-turbo")
    with pytest.raises(TurbopocketError) as found:
        sampling(folder, "sdxl_lightning_4step_lora.safetensors")
    assert "how many steps it is" in str(found.value)
    assert "its name is sdxl-turbo (Turbo) and LoRA sdxl_lightning_4step_lora (SDXL-Lightning)" in str(found.value)
    assert sampling(folder, "sdxl_lightning_4step_lora.safetensors", steps=4).guidance == 0.0
    agreed = sampling(named("lcm-model"), "dmd2_sdxl_4step_lora.safetensors")
    assert (agreed.steps, agreed.guidance) == (4, 1.0)


def test_what_is_given_wins_over_the_folder_and_the_folder_over_its_name(named: Named) -> None:
    folder = named("sdxl-turbo")
    (folder / "sampling.json").write_text('{"steps": 2, "guidance_scale": 1.5}')
    own = sampling(folder)
    assert (own.steps, own.guidance, own.notes) == (2, 1.5, ())
    assert sampling(folder, steps=3, guidance=0.0).steps == 3
    (folder / "sampling.json").write_text('{"steps": 2}')
    assert sampling(folder).notes == ("guidance 0 assumed: its name is sdxl-turbo (Turbo)",)


def test_a_sampler_other_than_the_kind_was_made_for_is_said(named: Named) -> None:
    def notes(folder: Path, **recipe: Any) -> tuple[str, ...]:
        return with_sampling(make_recipe(recipe, "test"), load_shapes(str(folder)))[1]

    lora = {"lora": ["sdxl_lightning_4step_lora.safetensors"]}
    told = "SDXL-Lightning was made for timestep_spacing trailing, this sampler has leading: "
    assert notes(named("my-model"), model=lora)[1:] == (f"{told}LoRA sdxl_lightning_4step_lora",)
    trailing = named("trailing", scheduler={**LEADING, "timestep_spacing": "trailing"})
    assert len(notes(trailing, model=lora)) == 1
    assert "LCM was made for kind lcm, this sampler has euler" in notes(named("lcm-sdxl"))[1]
    assert len(notes(named("lcm-again"), sampler={"kind": "lcm"})) == 1


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("5", "holds a JSON int; an object is needed"),
        ("[]", "holds a JSON list; an object is needed"),
        ('"x"', "holds a JSON str; an object is needed"),
        ('{"steps": "4"}', "steps: Input should be a valid integer"),
        ('{"steps": 2.5}', "steps: Input should be a valid integer"),
        ('{"steps": true}', "steps: Input should be a valid integer"),
        ('{"steps": 0}', "steps: Input should be greater than or equal to 1"),
        ('{"steps": 100000}', "steps: Input should be less than or equal to 1000"),
        ('{"guidance_scale": NaN}', "guidance_scale: Input should be a finite number"),
        ('{"guidance_scale": 1e400}', "guidance_scale: Input should be "),
        ('{"guidance_scale": -1}', "guidance_scale: Input should be greater than or equal to 0"),
        ('{"guidance_scale": false}', "guidance_scale: Input should be a valid number"),
        ('{"guidance": 5}', "guidance: Extra inputs are not permitted; known are `steps`, `guidance_scale`"),
        ('{"steps": ', "is not JSON"),
    ],
)
def test_a_sampling_file_that_is_none_is_refused_in_one_sentence(named: Named, text: str, fault: str) -> None:
    folder = named("my-model")
    (folder / "sampling.json").write_text(text)
    with pytest.raises(TurbopocketError) as found:
        sampling(folder)
    assert str(found.value).startswith(f"{folder / 'sampling.json'}")
    assert fault in str(found.value)


def test_a_folder_that_only_completes_a_unet_does_not_say_how_it_is_drawn(
    named: Named, tiny_sdxl: Path, tmp_path: Path
) -> None:
    folder = named("complete")
    (folder / "sampling.json").write_text('{"steps": 2, "guidance_scale": 1.5}')
    unet = tmp_path / "sdxl_lightning_8step_unet"
    shutil.copytree(tiny_sdxl / "unet", unet)
    found = sampling_of(load_shapes(str(unet), str(folder)))
    assert (found.steps, found.guidance) == (8, 0.0)


def test_a_build_says_what_it_assumed_wherever_a_person_looks(
    named: Named, tiny_sdxl: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    folder = named("sdxl-turbo", scheduler={"_class_name": "EulerAncestralDiscreteScheduler"} | TRAILING)
    for file in tiny_sdxl.rglob("*.safetensors"):
        shutil.copyfile(file, folder / file.relative_to(tiny_sdxl))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[calibrate]\npictures = 1\n[parity]\npictures = 1\n")
    told = "steps 1 and guidance 0 assumed: its name is sdxl-turbo (Turbo)"
    out = tmp_path / "art"
    ran = turbopocket("build", folder, "--recipe", recipe, "--formats", "fp16", "--fit", "absmax", "--out", out)
    assert ran.code == 0, ran.err
    assert f"note: {told}" in ran.err
    assert f"note: {told}" in ran.out
    manifest = load_manifest(out)
    assert manifest.notes == [told]
    assert (manifest.sampler.steps, manifest.sampler.guidance_scale) == (1, 0.0)
    assert f"Note: {told}." in (tmp_path / "art.report" / "report.html").read_text()
    assert told in json.loads(turbopocket("check", out, "--json").out)["notes"]
    again = recipe_of(out, manifest)
    assert with_sampling(again, load_shapes(str(folder))) == (again, ())


def test_a_build_that_would_have_to_guess_asks_before_any_weight_is_read(
    named: Named, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    folder = named("my-model", scheduler=TRAILING)
    ran = turbopocket("build", folder, "--out", tmp_path / "art")
    assert ran.code == 1
    assert "error: my-model does not tell with how many steps and how much guidance it is to be drawn: " in ran.err
    assert "hint: give --steps and --guidance" in ran.err
    ran = turbopocket("build", folder, "--steps", 1, "--guidance", 0, "--out", tmp_path / "art")
    assert "text_encoder has no weights" in ran.err  # the fixture has configs only


def test_plan_needs_no_steps_and_says_what_a_build_would_do(named: Named, turbopocket: Callable[..., Any]) -> None:
    ran = turbopocket("plan", named("sdxl-turbo", scheduler=TRAILING), "--json")
    assert json.loads(ran.out)["notes"] == ["steps 1 and guidance 0 assumed: its name is sdxl-turbo (Turbo)"]
    (note,) = json.loads(turbopocket("plan", named("my-model", scheduler=TRAILING), "--json").out)["notes"]
    assert note.startswith("build will ask for it: my-model does not tell with how many steps")


def test_distillation_takes_its_teachers_guidance_by_the_same_rule(
    named: Named, tiny_sdxl: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    folder = named("my-model", scheduler=TRAILING)
    for file in tiny_sdxl.rglob("*.safetensors"):
        shutil.copyfile(file, folder / file.relative_to(tiny_sdxl))
    short = ("--iterations", 1, "--set", "distill.batch=1", "--steps", 1)
    ran = turbopocket("distill", folder, *short, "--out", tmp_path / "student")
    assert ran.code == 1
    assert "my-model does not tell with how much guidance it is to be drawn" in ran.err
    assert "hint: give --guidance" in ran.err
    folder = folder.rename(tmp_path / "dreamshaper-xl-v2-turbo")
    ran = turbopocket("distill", folder, *short, "--out", tmp_path / "student", "--json")
    assert ran.code == 0, ran.err
    told = "guidance 2 assumed: its name is dreamshaper-xl-v2-turbo (DreamShaper XL Turbo)"
    assert json.loads(ran.out)["notes"] == [told]
    run = json.loads((tmp_path / "student.run" / "run.json").read_text())
    assert run["guidance"] == 2.0
