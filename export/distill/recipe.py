# SPDX-License-Identifier: Apache-2.0
"""The recipe of a distillation: everything that it may be asked for, typed, with every default visible."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from ...ground.errors import TurbopocketError
from ...quant.distill.options import MAX_STEPS, METHOD_NAMES, DistillOptions, Precision
from ..recipe import MAX_GUIDANCE
from ..settings import Section, parse_settings, read_settings


class TeacherSection(Section):
    """The model that is distilled."""

    source: str = "pocket"
    """A bundled name, a diffusers folder, a single-file checkpoint, a UNet's own folder, or a hub id."""
    config: str | None = None
    """For a single file or a UNet: the folder or hub id with configs, tokenizers and the parts that it lacks."""
    guidance: float | None = Field(default=None, ge=0.0, le=MAX_GUIDANCE)
    """Classifier-free guidance that it is asked with; 1 or less: none. Without it, what the model ships with."""


@dataclass(frozen=True)
class DistillSection(DistillOptions):
    """What the student is to learn, and how, beside the options of the training itself.

    Attributes:
        steps: the most that the student draws in, 1 to 8; it also learns all fewer ones.
        method: tdm, or mse: regression to the teacher's trajectory.
        prompts: a text file, one a line; without it, the model's own.
        lora_rank: trains LoRA matrices of this rank; without it, all weights.
        horizon: walks start at training timestep `horizon` - 1 from pure noise: the teacher's last timesteps hold next
            to no signal, and what a network says there is multiplied by its inverse (the released code of TDM starts
            at 800 of 1000, or at 900).
        precision: of the arithmetic: no (float32), bf16, fp16; auto is bf16 where the device multiplies in it, else
            float32: a CPU that has to imitate bf16 is 35 times slower in it.
        gradient_checkpointing: less memory, a third more time.
    """

    steps: int = 4
    method: str = "tdm"
    prompts: Path | None = None
    lora_rank: int | None = None
    horizon: int = 800
    precision: Literal["auto", Precision] = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHOD_NAMES:
            raise TurbopocketError(f"method {self.method!r} is not known: known are {', '.join(METHOD_NAMES)}")
        if not 1 <= self.steps <= MAX_STEPS:
            raise TurbopocketError(f"steps = {self.steps}: allowed are 1 to {MAX_STEPS}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise TurbopocketError(f"lora_rank = {self.lora_rank}: 1 or more is needed")


class DistillRecipe(Section):
    """One distillation, whole: the sections of its file, which also lies in the student's folder."""

    shipped_in: ClassVar[str] = "distill"
    teacher: TeacherSection = TeacherSection()
    distill: DistillSection = DistillSection()
    seed: int = Field(default=0, ge=0)


def load_distill_recipe(source: str | Path) -> DistillRecipe:
    """Returns the recipe in a TOML file, such as the `distill.toml` of a student, or a shipped one by name.

    Raises TurbopocketError when the file is missing, is not TOML, or holds a key or value that is not known;
    the message lists the known ones.
    """
    return parse_settings(DistillRecipe, *read_settings(source, DistillRecipe))
