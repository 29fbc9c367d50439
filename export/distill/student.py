# SPDX-License-Identifier: Apache-2.0
"""The student as a model folder of its teacher's layout."""

import json
import shutil
from pathlib import Path
from typing import Any

from ...quant.distill.denoiser import BIAS, Denoiser
from ...quant.store import save_tensors
from ..families.base import LoadedModel
from ..families.student import STEP_BIASES_FILE
from .recipe import DistillRecipe
from .teacher import beta_end, noise_schedule

OWN = ("unet", "judge")
"""Folders of a teacher that its student does not get."""
RECIPE_FILE = "distill.toml"
"""In the student's folder: how it was made."""


def write_student(folder: Path, model: LoadedModel, student: Denoiser, recipe: DistillRecipe) -> None:
    """The teacher's folder with the student's UNet, its schedule, the biases for fewer steps, and the recipe."""
    asked = recipe.distill
    elsewhere = [name for name, place in model.weights.items() if place != model.folder / name and name != "unet"]
    ignored = shutil.ignore_patterns(*OWN, *elsewhere)
    shutil.copytree(model.folder, folder, dirs_exist_ok=True, ignore=ignored)
    for name in elsewhere:
        saved: Any = model.modules[name].half()
        saved.save_pretrained(folder / name)
    biases = student.step_biases()
    unet = student.release()
    if asked.lora_rank is not None:
        unet.fuse_lora()
        unet.unload_lora()
    unet.get_submodule(BIAS.rpartition(".")[0]).bias.data.copy_(biases[asked.steps])
    unet.half().save_pretrained(folder / "unet")
    kept = {str(count): biases[count].half() for count in range(1, asked.steps + 1)}
    save_tensors(folder / "unet" / STEP_BIASES_FILE, kept)
    for file in folder.rglob("*.safetensors"):  # safetensors makes files for the user alone
        file.chmod((folder / "unet" / "config.json").stat().st_mode)
    spec = noise_schedule(model)
    scheduler = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": asked.horizon,
        "beta_start": spec.beta_start,
        "beta_end": beta_end(spec, asked.horizon),
        "beta_schedule": spec.beta_schedule,
        "prediction_type": spec.prediction_type,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "sampling.json").write_text(json.dumps({"steps": asked.steps, "guidance_scale": 1.0}) + "\n")
    (folder / RECIPE_FILE).write_text(recipe.to_toml())
