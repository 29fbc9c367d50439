# SPDX-License-Identifier: Apache-2.0
"""`turbopocket distill` on tiny checkpoints: what the new folder holds, that it builds, and what is refused."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from turbopocket.export.checkpoint.load import load
from turbopocket.export.distill.distill import distill
from turbopocket.export.distill.prompt_states import PromptStates
from turbopocket.export.distill.recipe import DistillRecipe, load_distill_recipe
from turbopocket.export.progress import StageProgress
from turbopocket.export.settings import make_settings
from turbopocket.quant.distill.steps import FixedIntervals

SHORT = ("--iterations", 3, "--set", "distill.batch=2")
BIAS = "time_embedding.linear_2.bias"


def sets(**values: object) -> tuple[str, ...]:
    """What a command line says for these keys of `[distill]`."""
    return tuple(part for key, value in values.items() for part in ("--set", f"distill.{key}={value}"))


@pytest.fixture(scope="module")
def student(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "student"
    asked = {"iterations": 3, "batch": 2, "student_lr": 1e-3, "fake_lr": 1e-3, "warmup_iterations": 0, "log_every": 1}
    values = {"teacher": {"source": str(tiny_sdxl), "guidance": 2.0}, "distill": asked}
    distill(make_settings(DistillRecipe, values, "test"), out, progress=StageProgress(quiet=True))
    return out


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_diffusers_opens_the_student_with_the_distilled_timesteps(student: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(student)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [799, 599, 399, 199]
    assert json.loads((student / "sampling.json").read_text()) == {"steps": 4, "guidance_scale": 1.0}


def test_the_folder_says_how_it_was_made_and_that_can_be_asked_for_again(student: Path, tiny_sdxl: Path) -> None:
    recipe = load_distill_recipe(student / "distill.toml")
    assert recipe.teacher.source == str(tiny_sdxl)
    assert (recipe.teacher.guidance, recipe.distill.iterations, recipe.distill.student_lr) == (2.0, 3, 1e-3)
    assert recipe.distill.precision != "auto"


def test_a_recipe_file_is_what_is_distilled_and_the_command_line_goes_before_it(
    tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    file = tmp_path / "short.toml"
    file.write_text(
        "seed = 3\n[distill]\niterations = 5\nbatch = 2\nmethod = 'mse'\n[distill.devices]\nhuber = false\n"
    )
    ran = turbopocket("distill", tiny_sd, "--recipe", file, "--iterations", 1, "--out", tmp_path / "student", "--json")
    assert ran.code == 0, ran.err
    made = load_distill_recipe(tmp_path / "student" / "distill.toml")
    assert (made.seed, made.distill.iterations, made.distill.batch, made.distill.method) == (3, 1, 2, "mse")
    assert not made.distill.devices.huber
    assert made.distill.devices.step_condition


def test_regression_trains_and_keeps_no_fake_score(
    tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    sizes = {}
    for method in ("tdm", "mse"):
        ran = turbopocket("distill", tiny_sd, *sets(method=method), *SHORT, "--out", tmp_path / method)
        assert ran.code == 0, ran.err
        kept = tmp_path / f"{method}.run" / "checkpoint"
        sizes[method] = sum(file.stat().st_size for file in kept.glob("*.safetensors"))
    assert sizes["tdm"] == pytest.approx(2 * sizes["mse"], rel=0.01)


def test_the_students_noise_schedule_is_the_teachers_up_to_the_horizon(student: Path, tiny_sdxl: Path) -> None:
    from diffusers import DDIMScheduler

    ours, teachers = (DDIMScheduler.from_pretrained(folder, subfolder="scheduler") for folder in (student, tiny_sdxl))
    assert torch.allclose(ours.alphas_cumprod, teachers.alphas_cumprod[:800], rtol=1e-5)


def test_the_students_weights_moved_and_the_rest_did_not(student: Path, tiny_sdxl: Path) -> None:
    before, after = unet_of(tiny_sdxl), unet_of(student)
    assert not torch.allclose(before["conv_in.weight"], after["conv_in.weight"].float(), atol=1e-4)
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (student / part).read_bytes() == (tiny_sdxl / part).read_bytes()


@pytest.fixture(scope="module")
def artifact(student: Path, recipe_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from turbopocket.export.build.build import build
    from turbopocket.export.progress import StageProgress
    from turbopocket.export.recipe import make_recipe

    compress = {"formats": ["fp16"], "fit": "absmax"}
    recipe = make_recipe(
        {**recipe_values, "sampler": {}, "model": {"source": str(student)}, "compress": compress}, "test"
    )
    out = tmp_path_factory.mktemp("built") / "art"
    return build(recipe, out, overwrite=False, progress=StageProgress(quiet=True)).folder


def test_the_exported_pipeline_asks_at_exactly_the_distilled_timesteps(artifact: Path) -> None:
    from turbopocket.runtimes.drawing.text_to_image import generate
    from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
    from turbopocket.runtimes.manifest import load_manifest
    from turbopocket.runtimes.open import open_runner

    manifest = load_manifest(artifact)
    wanted = [float(step.start) for step in FixedIntervals(800, [4]).walk(4)]
    runner, asked = open_runner(artifact, manifest), []

    class Listening:
        def run(self, component: str, inputs: Any) -> Any:
            if component == "unet":
                asked.append(float(inputs["timestep"]))
            return runner.run(component, inputs)

    generate(Listening(), manifest, open_tokenizers(artifact, manifest), "a red circle", seed=0)
    assert asked == manifest.sampler.timesteps == wanted


def test_a_students_artifact_draws_in_the_steps_it_was_built_for_and_no_others(
    artifact: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    assert turbopocket("generate", artifact, "a red circle", "--steps", 4, "-o", tmp_path / "a.png").code == 0
    ran = turbopocket("generate", artifact, "a red circle", "--steps", 2, "-o", tmp_path / "b.png")
    assert ran.code == 1
    assert "built for 4 steps and draws in no other; 2 were asked" in ran.err
    assert not (tmp_path / "b.png").exists()


def test_fewer_steps_set_the_students_bias_and_untrained_ones_are_refused(student: Path) -> None:
    biases = load_file(student / "unet" / "step_biases.safetensors")
    assert sorted(biases) == ["1", "2", "3", "4"]
    assert not torch.equal(biases["1"], biases["4"])
    for steps in (1, 4):
        unet = load(str(student), steps=steps).modules["unet"]
        assert torch.equal(unet.get_parameter(BIAS), biases[str(steps)].float())
    assert torch.equal(load(str(student)).modules["unet"].get_parameter(BIAS), biases["4"].float())


def test_a_build_for_steps_the_student_never_learnt_is_refused(
    student: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    ran = turbopocket("build", student, "--steps", 6, "--out", tmp_path / "art")
    assert ran.code == 1
    assert "distilled for 1, 2, 3, 4 steps, 6 were asked" in ran.err
    assert not (tmp_path / "art").exists()


def test_logs_can_be_read_by_tensorboard_and_hold_pictures(student: Path) -> None:
    logs = b"".join(file.read_bytes() for file in student.with_name("student.run").rglob("events.out*"))
    assert b"student_loss" in logs
    assert b"\x89PNG" in logs


def test_lora_changes_the_layers_it_is_on_and_no_other(
    tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    out = tmp_path / "student"
    ran = turbopocket("distill", tiny_sd, *sets(lora_rank=4, student_lr=0.01), *SHORT, "--out", out, "--json")
    assert ran.code == 0, ran.err
    before, after = unet_of(tiny_sd), unet_of(out)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name].half(), after[name]) and name != BIAS}
    assert moved
    assert all(".to_" in name or ".ff." in name or ".proj_" in name for name in moved)


def test_batched_text_states_are_those_of_the_runtime(tiny_sdxl: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    prompts = ["a red circle", "the blue cat on a white square"]
    states = PromptStates(load(str(tiny_sdxl)), torch.device("cpu")).conditional(prompts)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    tokens, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.allclose(states["encoder_hidden_states"], tokens, atol=1e-5)
    assert torch.allclose(states["text_embeds"], pooled, atol=1e-5)


def test_a_stopped_run_of_the_same_request_goes_on_and_another_request_is_refused(
    tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "student"
    with monkeypatch.context() as patch:
        patch.setattr("turbopocket.export.distill.distill.write_student", interrupted)
        assert turbopocket("distill", tiny_sd, *SHORT, "--out", out).code == 130
    assert not out.exists()
    other = turbopocket("distill", tiny_sd, "--iterations", 4, *SHORT[2:], "--out", out)
    assert other.code == 1
    assert "holds another run: iterations is 3 there, 4 here" in other.err
    assert turbopocket("distill", tiny_sd, *SHORT, "--out", out).code == 0
    assert (out / "model_index.json").is_file()


@pytest.mark.parametrize("file", ["iteration", "model.safetensors", "optimizer.bin"])
def test_a_damaged_checkpoint_is_one_clear_error(
    file: str, tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "student"
    with monkeypatch.context() as patch:
        patch.setattr("turbopocket.export.distill.distill.write_student", interrupted)
        assert turbopocket("distill", tiny_sd, *SHORT, "--out", out).code == 130
    (tmp_path / "student.run" / "checkpoint" / file).write_bytes(b"cut")
    ran = turbopocket("distill", tiny_sd, *SHORT, "--out", out)
    assert ran.code == 1
    assert "checkpoint is damaged" in ran.err
    assert not out.exists()


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


TWELVE_ITERATIONS = """
from pathlib import Path
import turbopocket
from turbopocket.export.settings import with_values

values = {
    "teacher.source": teacher, "teacher.guidance": 2.0, "distill.iterations": 12, "distill.batch": 2,
    "distill.student_lr": 1e-3, "distill.fake_lr": 1e-3, "distill.log_every": 1, "distill.checkpoint_every_s": 0,
}
turbopocket.distill(with_values(turbopocket.DistillRecipe(), values), out)
"""


def losses_of(lines: Iterable[str], stop_at: int | None = None) -> dict[str, str]:
    """By iteration ("3/12"), the losses that a run printed, up to and with iteration `stop_at`."""
    found: dict[str, str] = {}
    for line in lines:
        shown = re.match(r"(\d+)/12: (.*?);", line.strip())
        if shown:
            found[f"{shown[1]}/12"] = shown[2]
            if int(shown[1]) == stop_at:
                break
    return found


@pytest.mark.parametrize("killed_at", [random.SystemRandom().randint(2, 10)], ids=["random_step"])
def test_a_run_killed_at_a_random_step_ends_as_the_run_that_was_left_alone(
    killed_at: int, tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", f"teacher, out = {str(tiny_sd)!r}, {str(killed)!r}\n{TWELVE_ITERATIONS}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        found = losses_of(process.stderr or (), stop_at=killed_at)
        process.kill()
    assert not killed.exists()
    assert len(found) == killed_at
    curves = []
    for out in (killed, whole):
        capsys.readouterr()
        exec(TWELVE_ITERATIONS, {"teacher": str(tiny_sd), "out": str(out)})
        curves.append(losses_of(capsys.readouterr().err.splitlines()))
    assert len(curves[0]) < 12, f"killed at {killed_at}, and began from nothing"
    assert found | curves[0] == curves[1], f"killed at {killed_at}"
    for name, values in unet_of(whole).items():
        assert torch.equal(values, unet_of(killed)[name]), f"{name}, killed at {killed_at}"


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "no steps": (("--steps", 0), "allowed are 1 to 8"),
    "nine steps": (("--steps", 9), "allowed are 1 to 8"),
    "method": (sets(method="magic"), "known are tdm, mse"),
    "device": (
        ("--set", "distill.devices.hub=false"),
        "[distill.devices]: known are `separate_intervals`, `importance",
    ),
    "precision": (sets(precision="int8"), "distill.precision = 'int8': input should be 'auto', 'no', 'bf16' or 'fp16'"),
    "iterations": (("--iterations", 0), "1 or more is needed"),
    "learning rate": (sets(student_lr=2), "between 0 and 1"),
    "rank": (sets(lora_rank=0), "1 or more is needed"),
    "no logs": (sets(log_every=0), "log_every = 0: 1 or more is needed"),
    "odd value": (sets(batch="many"), "distill.batch = 'many': input should be a valid integer"),
    "unknown key": (sets(stepz=2), "unknown key `stepz` in [distill]: known are `iterations`, `batch`"),
    "a build's key": (
        ("--set", "compress.budget=8MB"),
        "unknown key `compress`: known are `teacher`, `distill`, `seed`",
    ),
    "a build's recipe": (("--recipe", "demo"), "recipe 'demo' is neither a .toml file nor a shipped recipe"),
    "horizon of no length": (sets(horizon=0), "this teacher has 1000 timesteps, at least 100 are needed"),
    "horizon beyond the teacher": (sets(horizon=1001), "this teacher has 1000 timesteps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_odd_requests_are_refused_before_any_work(
    name: str, tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    arguments, message = REFUSED[name]
    ran = turbopocket("distill", tiny_sd, *arguments, "--out", tmp_path / "student")
    assert ran.code == 1
    assert message in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"\n \n", "holds no prompt"), (b"\x89PNG\xff\xfe", "is not UTF-8 text")],
)
def test_prompt_files_that_are_none_are_refused(
    content: bytes | None, message: str, tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    ran = turbopocket("distill", tiny_sd, "--prompts", file, "--out", tmp_path / "student")
    assert ran.code == 1
    assert message in ran.err
    assert not (tmp_path / "student.run").exists()


def test_a_teacher_that_is_no_pipeline_is_refused(tmp_path: Path, turbopocket: Callable[..., Any]) -> None:
    (tmp_path / "teacher").mkdir()
    ran = turbopocket("distill", tmp_path / "teacher", "--out", tmp_path / "student")
    assert ran.code == 1
    assert "model_index.json" in ran.err


def test_too_little_memory_is_said_before_training(
    tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbopocket.export.distill.networks._free_bytes", lambda device: 1_000_000)
    ran = turbopocket("distill", tiny_sd, *SHORT, "--out", tmp_path / "student")
    assert ran.code == 1
    assert "0.0 GB are free on cpu" in ran.err
    assert "--set distill.lora_rank=64" in ran.err


def test_no_folder_is_overwritten_unasked(tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any]) -> None:
    out = tmp_path / "student"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "--overwrite" in turbopocket("distill", tiny_sd, *SHORT, "--out", out).err
    ran = turbopocket("distill", tiny_sd, *SHORT, "--out", out, "--overwrite")
    assert ran.code == 1
    assert "replaces what is ours and nothing else" in ran.err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert (out / "thesis.txt").read_text() == "years of work"
