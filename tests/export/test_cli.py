# SPDX-License-Identifier: Apache-2.0
"""The command as a user meets it: what it prints, and that every mistake is one message and an exit code."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from .crash_states import killed_between

Run = Callable[..., Any]


def one_error(ran: Any, code: int) -> str:
    """The message, after checking its form: one `error:` line, maybe a hint, nothing on stdout, no traceback.

    Before it may stand the stages that ended, and those that are to come with what each will take.
    """
    lines = [line for line in ran.err.splitlines() if not re.fullmatch(r".* ([\d.]+ s|memory .* disk +[\d:]+)", line)]
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    return lines[0]


@pytest.fixture
def checkpoint(tiny_sdxl: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "checkpoint"))


def test_plan_needs_only_configs(turbopocket: Run, checkpoint: Path) -> None:
    for weights in checkpoint.rglob("*.safetensors"):
        weights.unlink()
    ran = turbopocket("plan", checkpoint, "--budget", "1.6MB", "--json")
    assert ran.code == 0
    planned = json.loads(ran.out)
    assert planned["total_bytes"] <= 1_600_000
    assert set(planned["components"]) == {"text_encoder", "text_encoder_2", "unet", "vae_decoder"}


def test_plan_estimate_is_near_what_is_built(turbopocket: Run, tiny_sdxl: Path, built: Any) -> None:
    measured = built.report.parent / "choices.json"
    formats = "int4-g32,int8-g32,fp16"
    ran = turbopocket("plan", tiny_sdxl, "--formats", formats, "--measured", measured, "--json")
    estimate = json.loads(ran.out)["fixed_bytes"]
    assert estimate == pytest.approx(built.plan.fixed_bytes, rel=0.15)


def test_plan_prints_tables_for_people(turbopocket: Run, tiny_sdxl: Path) -> None:
    ran = turbopocket("plan", tiny_sdxl, "--budget", "2MB")
    assert ran.code == 0
    assert "unet.down_blocks.1" in ran.out
    assert "smallest possible" in ran.out


def test_impossible_budget_ends_with_2_and_the_smallest_size(turbopocket: Run, tiny_sdxl: Path) -> None:
    smallest = json.loads(turbopocket("plan", tiny_sdxl, "--json").out)["smallest_bytes"]
    message = one_error(turbopocket("plan", tiny_sdxl, "--budget", "100kB"), 2)
    assert f"smallest plan is {smallest:,} bytes" in message
    assert "over the budget of 100,000 bytes" in message


def test_generate_draws_the_same_picture_from_the_same_seed(turbopocket: Run, artifact: Path, tmp_path: Path) -> None:
    pictures = []
    for name in ("a.png", "b.png"):
        ran = turbopocket("generate", artifact, "a red circle", "--seed", 7, "-o", tmp_path / name, "--json")
        assert ran.code == 0
        pictures.append(np.asarray(Image.open(tmp_path / name)))
    assert json.loads(ran.out)["seed"] == 7
    assert pictures[0].shape == (32, 32, 3)
    assert np.array_equal(*pictures)


def test_a_picture_takes_the_place_of_another_with_overwrite_only(
    turbopocket: Run, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.png"
    out.write_text("precious")
    with monkeypatch.context() as patch:
        patch.setattr("turbopocket.export.artifact.open_runner", lambda *_: pytest.fail("something was drawn"))
        ran = turbopocket("generate", artifact, "a red circle", "-o", out)
        assert f"output {out} exists" in one_error(ran, 1)
        assert "hint: give another file, or --overwrite" in ran.err
        ran = turbopocket("generate", artifact, "a red circle", "-o", artifact / "unet" / "a.png")
        assert "is in the artifact, which would not match its manifest any more" in one_error(ran, 1)
    assert out.read_text() == "precious"
    assert turbopocket("generate", artifact, "a red circle", "-o", out, "--overwrite").code == 0
    assert np.asarray(Image.open(out)).shape == (32, 32, 3)


@pytest.mark.parametrize("verb", ["check", "report", "generate"])
def test_an_artifact_whose_replacement_was_killed_halfway_is_read_as_it_was(
    turbopocket: Run, artifact: Path, tmp_path: Path, verb: str
) -> None:
    report = artifact.with_name("art.report")
    before = (report / "measurements.json").read_text()
    killed_between((artifact, report))
    assert not (report / "measurements.json").exists()
    arguments = ["red circle", "-o", tmp_path / "a.png"] if verb == "generate" else []
    ran = turbopocket(verb, artifact, *arguments)
    assert ran.code == 0, ran.err
    assert (report / "measurements.json").read_text() == before
    assert not artifact.with_name(".art.turbopocket").exists()


def test_too_long_prompt_is_drawn_with_a_warning_that_quotes_what_was_cut(
    turbopocket: Run, artifact: Path, tmp_path: Path
) -> None:
    ran = turbopocket("generate", artifact, "red " * 90 + "triangle", "-o", tmp_path / "a.png")
    assert ran.code == 0
    assert "warning: text_encoder reads 77 tokens, left out: 'red" in ran.err
    assert "triangle" in ran.err


def test_empty_prompt_is_refused_and_nothing_is_written(turbopocket: Run, artifact: Path, tmp_path: Path) -> None:
    assert "the prompt is empty" in one_error(turbopocket("generate", artifact, "  ", "-o", tmp_path / "a.png"), 1)
    assert not (tmp_path / "a.png").exists()


def test_check_passes_on_what_was_built(turbopocket: Run, artifact: Path) -> None:
    ran = turbopocket("check", artifact, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["files_verified"]
    assert found["parity"]["passed"]


def test_check_without_the_report_folder_says_what_it_could_not_do(turbopocket: Run, artifact: Path) -> None:
    shutil.rmtree(artifact.with_name("art.report"))
    ran = turbopocket("check", artifact, "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["parity"] is None
    assert "files are right, parity was not measured" in ran.err
    assert "weights.safetensors is not there" in ran.err
    assert "hint: --files-only" in ran.err
    ran = turbopocket("check", artifact, "--files-only", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["parity_not_measured"] == "only the files were asked for"


@pytest.mark.parametrize("verb", ["check", "generate"])
def test_edited_artifact_is_refused_by_file(turbopocket: Run, artifact: Path, verb: str) -> None:
    data = artifact / "unet" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    arguments = ["red circle", "-o", artifact.parent / "a.png"] if verb == "generate" else []
    assert "unet/model.onnx.data was changed" in one_error(turbopocket(verb, artifact, *arguments), 1)


def test_artifact_path_that_leaves_its_folder_is_refused(turbopocket: Run, artifact: Path) -> None:
    manifest = artifact / "manifest.json"
    manifest.write_text(manifest.read_text().replace("unet/config.json", "../unet/config.json"))
    assert "'../unet/config.json' is not a plain relative path" in one_error(turbopocket("check", artifact), 1)


def test_artifact_of_a_wrong_lowering_fails_check_with_3(turbopocket: Run, artifact: Path) -> None:
    layer = "unet.conv_norm_out"  # any change of the stored weights makes the two sides differ
    weights = artifact.with_name("art.report") / "weights.safetensors"
    _scale_first_unet_part(weights)
    ran = turbopocket("check", artifact)
    assert ran.code == 3, (layer, ran.err)
    assert "the first layer to diverge is unet." in ran.err


def _scale_first_unet_part(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("unet.") and name.endswith(".scale"))
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, path, metadata=metadata)


def test_folder_that_is_no_artifact_is_refused(turbopocket: Run, tmp_path: Path) -> None:
    for verb in ("check", "report"):
        assert "holds no manifest.json" in one_error(turbopocket(verb, tmp_path), 1)


def test_report_is_written_again(turbopocket: Run, artifact: Path) -> None:
    page = artifact.with_name("art.report") / "report.html"
    before = page.read_text()
    page.unlink()
    assert turbopocket("report", artifact).code == 0
    assert page.read_text() == before


def test_report_without_its_measurements_is_one_clear_error(turbopocket: Run, artifact: Path) -> None:
    (artifact.with_name("art.report") / "plan.json").unlink()
    assert "plan.json can not be read" in one_error(turbopocket("report", artifact), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "nowhere", "--out", "x"], "'nowhere' is neither a bundled model"),
        (["build", "pocket", "--out", "x", "--target", "tflite"], "`tflite` is not a target: known are onnx"),
        (["build", "pocket", "--out", "x", "--formats", "int5"], "`int5` is not a weight format: known are"),
        (["build", "pocket", "--out", "x", "--budget", "8 elephants"], "budget '8 elephants' is not a number with"),
        (["build", "pocket", "--out", "x", "--pin", "unet.conv_out"], "--pin 'unet.conv_out' is not GLOB=FORMAT"),
        (["build", "pocket", "--out", "x", "--steps", "0"], "sampler.steps = 0"),
        (["build", "pocket", "--out", "x", "--recipe", "fast"], "recipe 'fast' is neither a .toml file nor"),
        (
            ["build", "pocket", "--out", "x", "--set", "compress.budgt=8MB"],
            "unknown key `budgt` in [compress]: known are",
        ),
        (["build", "pocket", "--out", "x", "--set", "8MB"], "--set '8MB' is not KEY=VALUE"),
        (
            ["build", "pocket", "--out", "x", "--budget", "8MB", "--set", "compress.budget=9MB"],
            "is given more than once",
        ),
        (["plan", "pocket", "--set", "target.coreml.deployment=iOS9"], "'iOS17', 'iOS18' or 'iOS26'"),
        (["plan", "pocket", "--deployment", "iOS17"], "No such option"),
        (["recipe", "show", "demo", "--distill"], "shipped are pocket-turbo"),
        (["build", "pocket"], "Missing option '--out'"),
        (["build", "pocket", "--out", "x", "--colour", "red"], "No such option"),
        (["draw"], "No such command 'draw'"),
    ],
)
def test_wrong_request_ends_with_1_and_names_what_is_wrong(
    turbopocket: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in one_error(turbopocket(*arguments), 1)
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint_is_refused_and_nothing_is_written(turbopocket: Run, checkpoint: Path) -> None:
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = one_error(turbopocket("build", checkpoint, "--out", checkpoint.parent / "out"), 1)
    assert "diffusion_pytorch_model.safetensors" in message
    assert "1,000 bytes" in message.replace("1000 bytes", "1,000 bytes")
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_occupied_output_is_refused_before_any_work(turbopocket: Run, tiny_sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    ran = turbopocket("build", tiny_sdxl, "--out", tmp_path / "out")
    assert "is not empty" in one_error(ran, 1)
    assert "hint: give another folder, or --overwrite" in ran.err


def test_budget_too_small_for_a_build_ends_with_2_before_anything_is_drawn_or_written(
    turbopocket: Run, tiny_sd: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "short.toml"
    recipe.write_text("[calibrate]\npictures = 1\n[parity]\npictures = 1\n[sampler]\nsteps = 1\n")
    ran = turbopocket(
        "build", tiny_sd, "--recipe", recipe, "--formats", "fp16", "--budget", "1MB", "--out", tmp_path / "out"
    )
    assert ran.code == 2
    assert "smallest plan is " in ran.err
    assert "trace " in ran.err
    assert not re.search(r"^reference +[\d.]+ s$", ran.err, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["short.toml"]


def test_recipe_show_prints_toml_and_json(turbopocket: Run) -> None:
    assert 'source = "pocket-turbo"' in turbopocket("recipe", "show", "demo").out
    assert json.loads(turbopocket("recipe", "show", "--json").out)["compress"]["fit"] == "gptq"
    assert "iterations = 7" in turbopocket("recipe", "show", "--set", "finetune.iterations=7").out
    assert 'method = "tdm"' in turbopocket("recipe", "show", "pocket-turbo", "--distill").out


def test_set_reaches_a_plan(turbopocket: Run, tiny_sdxl: Path) -> None:
    ran = turbopocket(
        "plan", tiny_sdxl, "--json", "--set", 'compress.formats=["int8-row"]', "--set", "target.name=onnx"
    )
    assert ran.code == 0, ran.err
    assert set(json.loads(ran.out)["formats"]) == {"int8-row"}


def test_a_plan_takes_the_options_of_a_build(turbopocket: Run, tiny_sdxl: Path) -> None:
    def running(*asked: str) -> int:
        ran = turbopocket("plan", tiny_sdxl, "--json", "--device", "android-8gb", *asked)
        assert ran.code == 0, ran.err
        found: int = json.loads(ran.out)["devices"][0]["components"]["unet"]["running_bytes"]
        return found

    assert running("--size", "8x8") == running("--set", 'image.sizes=["8x8"]') < running()
    for option, value, named in (("--fit", "best", "fit"), ("--steps", "0", "steps"), ("--guidance", "-1", "guidance")):
        assert named in one_error(turbopocket("plan", tiny_sdxl, option, value), 1)


@pytest.mark.parametrize("verb", ["formats", "models"])
def test_listings_print_for_people_and_as_json(turbopocket: Run, verb: str) -> None:
    assert turbopocket(verb).out.strip()
    assert json.loads(turbopocket(verb, "--json").out)
