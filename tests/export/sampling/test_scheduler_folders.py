# SPDX-License-Identifier: Apache-2.0
"""Model folders with the schedulers that people have: refused alike by `plan` and `build`, or drawn like diffusers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.checkpoint.load import load
from turbopocket.export.distill.distill import distill
from turbopocket.export.distill.recipe import DistillRecipe
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import SamplerSection
from turbopocket.export.sampling.spec import sampler_spec
from turbopocket.export.settings import make_settings
from turbopocket.ground.errors import TurbopocketError

EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0, "sigma_min": 0.002, "rho": 7.0}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Writer = Callable[..., Path]


@pytest.fixture
def with_scheduler(tiny_sdxl: Path, tmp_path: Path) -> Writer:
    """Writes the tiny checkpoint with another scheduler config; the index names its class, or the one that is given."""

    def write(config: dict[str, Any], in_index: str | None = None) -> Path:
        folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", in_index or config["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.mark.parametrize("kind", ["model", "euler"])
@pytest.mark.parametrize(
    ("config", "in_index", "message"),
    [
        (EDM, None, "scheduler class 'EDMDPMSolverMultistepScheduler': the model was trained on the sigmas of EDM"),
        (EDM, "EulerDiscreteScheduler", "scheduler class 'EDMDPMSolverMultistepScheduler': the model was trained on"),
        (FLOW, None, "scheduler class 'FlowMatchEulerDiscreteScheduler': the model was trained on the straight lines"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0, **BETAS},
            None,
            "DPMSolverMultistepScheduler: use_flow_sigmas = True is not supported, the model was trained by flow match",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 2_000_000_000, **BETAS},
            None,
            "EulerDiscreteScheduler: num_train_timesteps: Input should be less than or equal to 10000",
        ),
    ],
)
def test_plan_and_build_refuse_a_noise_schedule_without_betas_in_the_same_words(
    config: dict[str, Any],
    in_index: str | None,
    message: str,
    kind: str,
    with_scheduler: Writer,
    turbopocket: Any,
    tmp_path: Path,
) -> None:
    folder, recipe, out = with_scheduler(config, in_index), tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(f'[sampler]\nkind = "{kind}"\nsteps = 2\nguidance = 1.0\n')
    planned = turbopocket("plan", folder, "--recipe", recipe)
    built = turbopocket("build", folder, "--recipe", recipe, "--out", out)
    assert (planned.code, built.code) == (1, 1)
    for said in (planned.err, built.err):
        assert message in re.sub(r"\s+", " ", said)
        assert "hint" not in said
    assert not out.exists()


def test_a_scheduler_without_a_sampler_is_refused_with_the_words_for_a_recipe(
    with_scheduler: Writer, turbopocket: Any, tmp_path: Path
) -> None:
    folder, recipe = with_scheduler({"_class_name": "UniPCMultistepScheduler", **BETAS}), tmp_path / "recipe.toml"
    refused = turbopocket("plan", folder, "--formats", "fp16")
    assert refused.code == 1
    kind = re.search(r"`sampler\.kind` = (\w+), ", re.sub(r"\s+", " ", refused.err))
    assert kind is not None
    recipe.write_text(f'[compress]\nformats = ["fp16"]\n[sampler]\nkind = "{kind[1]}"\n')
    assert turbopocket("plan", folder, "--recipe", recipe).code == 0


def test_a_stated_zero_terminal_snr_reaches_the_manifest(with_scheduler: Writer) -> None:
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    model = load(str(with_scheduler({"_class_name": "EulerDiscreteScheduler", **zero, **BETAS})))
    for kind in ("model", "dpmpp_2m", "ddim"):
        spec = sampler_spec(model, SamplerSection(kind=kind, steps=4, guidance=5.0))
        assert (spec.rescale_betas_zero_snr, spec.prediction_type, spec.timesteps[0]) == (True, "v_prediction", 999)


def test_a_teacher_is_distilled_whatever_sampler_its_folder_names_but_zero_terminal_snr(
    with_scheduler: Writer, tmp_path: Path
) -> None:
    """A student's folder says its noise schedule by a first and a last beta, which zero terminal SNR has not."""
    folder = with_scheduler({"_class_name": "UniPCMultistepScheduler", **BETAS})
    asked = {"steps": 2, "iterations": 1, "batch": 1, "student_lr": 1e-3, "fake_lr": 1e-3, "warmup_iterations": 0}
    recipe = make_settings(
        DistillRecipe, {"teacher": {"source": str(folder), "guidance": 2.0}, "distill": asked}, "test"
    )
    distill(recipe, tmp_path / "student", False, StageProgress(quiet=True))
    config = json.loads((tmp_path / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["_class_name"], config["beta_start"], config["beta_schedule"]) == (
        "DDIMScheduler",
        0.00085,
        "scaled_linear",
    )
    scheduler = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, **BETAS}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(TurbopocketError, match="rescale_betas_zero_snr = True: cut at a horizon, this teacher's noise"):
        distill(recipe, tmp_path / "other", False, StageProgress(quiet=True))
