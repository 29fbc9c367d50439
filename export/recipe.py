# SPDX-License-Identifier: Apache-2.0
"""The recipe: everything a user may ask for, typed, with every default visible.

No stage receives a Recipe; `build` hands each stage the values it needs.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    create_model,
    field_validator,
    model_validator,
)

from ..quant.names import RECONSTRUCT, known_fit, known_scheme
from ..quant.options import CandidateOptions, FineTuneOptions, ReconstructOptions
from ..runtimes.image_size import ImageSize, parse_size
from ..runtimes.manifest import Manifest
from ..runtimes.schedule import MAX_STEPS
from ..runtimes.scheduler_classes import known_kind
from .checkpoint.bundled import BUNDLED
from .checkpoint.lora.file import LoraFile
from .output.names import RECIPE_FILE
from .output.staging import report_folder
from .rewrites.names import REWRITE_NAMES, known_rewrite
from .settings import Section, make_settings, parse_settings, read_settings
from .target_options import TARGET_ENTRIES, known_target, with_several_sizes
from .units import parse_bytes

MAX_GUIDANCE = 50.0
MODEL_SAMPLER = "model"
"""What `sampler.kind` calls the scheduler that a checkpoint was saved with."""


class ModelSection(Section):
    """Where the float model comes from."""

    source: str = "pocket-turbo"
    """A bundled name, a diffusers folder, a single-file checkpoint, a UNet's own folder, or a hub id."""
    config: str | None = None
    """For a single file or a UNet: the folder or hub id with configs, tokenizers and the parts that it lacks."""
    lora: tuple[Annotated[LoraFile, PlainValidator(LoraFile.parse), PlainSerializer(str)], ...] = ()
    """LoRA files merged into the weights before compression, in order: "FILE", or "FILE:0.8" for a strength of 0.8."""


TargetName = Annotated[str, AfterValidator(known_target)]


class TargetSection(Section):
    """What the phone runs. Beside these keys each target has a section of its name; the named one's counts."""

    model_config = ConfigDict(extra="allow")

    name: TargetName = "onnx"
    also: tuple[TargetName, ...] = ()
    """Further targets of the same build; each target's artifact is then a folder of its name in the output folder."""

    @classmethod
    def keys(cls) -> dict[str, Any]:
        return super().keys() | {name: entry.options for name, entry in TARGET_ENTRIES.items()}

    @model_validator(mode="after")
    def _targets_differ(self) -> Self:
        names = (self.name, *self.also)
        if len(set(names)) < len(names):
            raise ValueError(f"targets {', '.join(names)}: each may be asked for once")
        return self

    @model_validator(mode="after")
    def _sections_are_options(self) -> Self:
        """Every target has its options, those that nobody stated by default."""
        fields: dict[str, Any] = {
            name: (entry.options, Field(default_factory=entry.options)) for name, entry in TARGET_ENTRIES.items()
        }
        found = create_model("TargetOptions", __base__=Section, **fields).model_validate(self.__pydantic_extra__)
        object.__setattr__(self, "__pydantic_extra__", {name: getattr(found, name) for name in fields})
        return self

    @property
    def options(self) -> Any:
        """The named target's options."""
        return getattr(self, self.name)


class CompressSection(Section):
    """How many bytes may be shipped and what may be done to get there."""

    budget: str | None = None
    """Bytes of the whole artifact, such as "8MB"; without it every layer takes its best format."""
    formats: tuple[str, ...] = ("fp16", "int8-g32", "int4-g32", "int8-row", "int4-row")
    """Weight formats, whose activations are left to the target, or whole schemes such as "int8-row+a8-static"."""
    fit: str = "gptq"
    """How values are chosen: absmax, mse, gptq (error feedback), vqdm (gptq, and a tree search for `avq`), or
    reconstruct (mse, and then the rounding of the denoiser's integers is learned by block: see `[reconstruct]`)."""
    sequential: bool = False
    """Fit block by block, each to the inputs that the stored blocks before it cause; a killed build goes on there."""
    average_bits: float | None = Field(default=None, gt=0, le=32)
    """In the place of a budget: so many stored bits for each weight of all layers, scales and codebooks counted."""
    peak_memory: str | None = None
    """Most memory that any component is predicted to take of the device at its peak, such as "1.5GB"."""
    content: tuple[str, ...] = ()
    """Globs over layer names, such as ("*.ff.*", "*.attn2.*"): these are judged by 1 - SSIM of the picture, the others
    by the denoiser's output; plans of several divisions of the budget are drawn with, and the best is taken."""
    exempt: float = Field(default=0.0, ge=0, lt=1)
    """Share of the layers, those whose rounded activations lose most, that keep floats where a target can: 0.01."""
    rewrites: tuple[str, ...] = ()
    """Changes of the denoiser that change no output: "bos-aware" keeps the first text token's keys and values in float,
    so that it does not ruin the ranges of what cross-attentions read; "time-cache" has tables of what
    the UNet makes of the shipped timesteps alone."""
    pin: Mapping[str, str] = Field(default_factory=dict)
    """Glob over layer names to format or scheme, such as {"unet.conv_out" = "fp16"}."""

    @field_validator("budget")
    @classmethod
    def _budget_has_a_unit(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @field_validator("peak_memory")
    @classmethod
    def _memory_has_a_unit(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value, "peak_memory")
        return value

    @field_validator("formats")
    @classmethod
    def _formats_are_known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for text in values:
            known_scheme(text)
        return values

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.budget is not None and self.average_bits is not None:
            raise ValueError(f"budget = {self.budget} and average_bits = {self.average_bits:g}: one is enough")
        return self

    @field_validator("rewrites")
    @classmethod
    def _rewrites_are_known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        names = [known_rewrite(name) for name in values]
        return tuple(name for name in REWRITE_NAMES if name in names)

    @field_validator("pin")
    @classmethod
    def _pinned_schemes_are_known(cls, values: Mapping[str, str]) -> Mapping[str, str]:
        for text in values.values():
            known_scheme(text)
        return values

    @model_validator(mode="after")
    def _blocks_are_fitted_once(self) -> Self:
        if self.sequential and self.fit == RECONSTRUCT:
            raise ValueError(
                f"fit = {self.fit} goes by blocks itself, on inputs of the float model: leave out sequential"
            )
        return self

    @field_validator("fit")
    @classmethod
    def _fit_is_known(cls, value: str) -> str:
        return known_fit(value)

    @property
    def budget_bytes(self) -> int | None:
        return None if self.budget is None else parse_bytes(self.budget)

    @property
    def peak_memory_bytes(self) -> int | None:
        return None if self.peak_memory is None else parse_bytes(self.peak_memory, "peak_memory")


class ImageSection(Section):
    """What pictures the artifact draws."""

    sizes: tuple[str, ...] = ()
    """WIDTHxHEIGHT in pixels, the default first; several where the target takes them. Without any: the model's own."""

    @field_validator("sizes")
    @classmethod
    def _sizes_differ(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        sizes = [parse_size(value) for value in values]
        if twice := next((size for size in sizes if sizes.count(size) > 1), None):
            raise ValueError(f"size {twice} is asked for {sizes.count(twice)} times, once is enough")
        return values

    @property
    def image_sizes(self) -> tuple[ImageSize, ...]:
        return tuple(parse_size(text) for text in self.sizes)


def _known_sampler(kind: str) -> str:
    return kind if kind == MODEL_SAMPLER else known_kind(kind)


class SamplerSection(Section):
    """How the artifact draws; calibration, parity and phones use the same steps."""

    kind: Annotated[str, AfterValidator(_known_sampler)] = MODEL_SAMPLER
    """`model` keeps the scheduler saved with the checkpoint; another walks the checkpoint's noise schedule."""
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    image_to_image: bool = False
    """Ship the VAE's encoder as well, so that drawing can begin with a picture."""
    guidance: float | None = Field(default=None, ge=0.0, le=MAX_GUIDANCE)
    """Classifier-free guidance; 1 or less switches it off.

    Steps and guidance left out are the model's own (`sampling.json`) or what its kind is published with; a build says
    what it assumed.
    """


class CalibrateSection(Section):
    """What the layers are shown before they are compressed."""

    pictures: int = Field(default=16, ge=1, le=4096)
    prompts: Path | None = None
    """A text file, one prompt a line; without it the model's own training prompts, or the built-in list."""
    decoded_pixels: int = Field(default=2**21, ge=1)
    """The VAE runs until it has had so many pixels, eight pictures of 512 x 512; the rest of the model sees all."""


class ParitySection(Section):
    """What must hold before an artifact counts as built."""

    pictures: int = Field(default=4, ge=1, le=64)
    max_lowering_error: float | None = Field(default=None, gt=0)
    """Largest ||runtime - PyTorch|| / ||PyTorch||, both with the stored weights, per component and timestep.

    Without it what the target is held to: 1e-4 for onnx, 1e-3 for coreml, whose programs compute with fp16 constants,
    for executorch 1e-4, and by layer 5e-3 where inputs are rounded to int8, 1.5e-2 where outputs are too: on either
    side of a tie, they differ by a step.
    """


class MachineSection(Section):
    """What a build may take of the machine that it runs on; no part of what is shipped."""

    max_ram: str | None = None
    """Most memory of all its processes together, such as "8GB": it is refused, or keeps to that."""

    @field_validator("max_ram")
    @classmethod
    def _memory_has_a_unit(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value, "max_ram")
        return value

    @property
    def max_ram_bytes(self) -> int | None:
        return None if self.max_ram is None else parse_bytes(self.max_ram, "max_ram")


class Recipe(Section):
    """One build, whole: the sections of a recipe file."""

    model: ModelSection = ModelSection()
    target: TargetSection = Field(default_factory=TargetSection)
    compress: CompressSection = CompressSection()
    image: ImageSection = ImageSection()
    sampler: SamplerSection = SamplerSection()
    calibrate: CalibrateSection = CalibrateSection()
    reconstruct: ReconstructOptions = ReconstructOptions()
    candidates: CandidateOptions = CandidateOptions()
    finetune: FineTuneOptions = FineTuneOptions()
    parity: ParitySection = ParitySection()
    machine: MachineSection = MachineSection()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _sizes_fit_in_one_artifact(self) -> Self:
        asked = ", ".join(self.image.sizes)
        for name in (self.target.name, *self.target.also):
            if len(self.image.sizes) > 1 and name not in with_several_sizes():
                raise ValueError(
                    f"{name} takes one size in an artifact, {len(self.image.sizes)} are asked for ({asked}): "
                    f"build one artifact for each, or one for {', '.join(with_several_sizes())}, which takes several"
                )
        return self

    @property
    def moves_vectors(self) -> bool:
        """Whether training changes norms or biases, which are part of a graph."""
        return bool(self.candidates.count or self.finetune.iterations)

    def without_places(self, model: str) -> Self:
        """Returns the recipe as it is shipped: `model` and the names of files in the place of paths on this machine,
        of which it says nothing."""

        def name(text: str) -> str:
            return Path(text).name if _is_here(text) else text

        own = self.model
        section = {
            "source": model if _is_here(own.source) else own.source,
            "config": None if own.config is None else name(own.config),
            "lora": tuple(replace(each, file=Path(each.file.name)) for each in own.lora),
        }
        prompts = self.calibrate.prompts and Path(self.calibrate.prompts.name)
        calibrate = self.calibrate.model_copy(update={"prompts": prompts})
        shipped = {"model": own.model_copy(update=section), "calibrate": calibrate, "machine": MachineSection()}
        return self.model_copy(update=shipped)

    def with_whole_paths(self) -> Self:
        """Returns the same for a reader in any folder: paths on this machine from its root."""

        def whole(text: str) -> str:
            return str(Path(text).expanduser().absolute()) if _is_here(text) else text

        own = self.model
        section = {
            "source": whole(own.source),
            "config": None if own.config is None else whole(own.config),
            "lora": tuple(replace(each, file=each.file.absolute()) for each in own.lora),
        }
        return self.model_copy(update={"model": own.model_copy(update=section)})

    def per_target(self) -> dict[str, Self]:
        """Returns one recipe for each target that is asked for, by its name."""
        names = (self.target.name, *self.target.also)
        targets = {name: self.target.model_copy(update={"name": name, "also": ()}) for name in names}
        return {name: self.model_copy(update={"target": target}) for name, target in targets.items()}


def load_recipe(source: str | Path) -> Recipe:
    """Returns the recipe in a TOML file, or a shipped one by name (`demo`, `codebooks`).

    Raises TurbopocketError when the file is missing, is not TOML, or holds a key or value that is not known;
    the message lists the known ones.
    """
    return parse_settings(Recipe, *read_settings(source, Recipe))


def parse_recipe(text: str, name: str) -> Recipe:
    """Returns the recipe that `text` holds; `name` is what errors call it."""
    return parse_settings(Recipe, text, name)


def recipe_of(artifact: Path, manifest: Manifest) -> Recipe:
    """Returns the recipe in an artifact's manifest, with the model where the report beside the artifact says it lies.

    Raises TurbopocketError for a manifest, or a file beside it, that holds no recipe.
    """
    shipped = parse_recipe(manifest.recipe, f"{artifact}: the manifest's recipe")
    beside = report_folder(artifact.absolute()) / RECIPE_FILE
    if not beside.is_file():
        return shipped
    return shipped.model_copy(update={"model": load_recipe(beside).model})


def _is_here(text: str) -> bool:
    """Whether a source is a file or folder of this machine; bundled names and hub ids are none."""
    return text not in BUNDLED and os.path.exists(os.path.expanduser(text))  # noqa: PTH110, PTH111 - never raise


def make_recipe(values: Mapping[str, Any], name: str) -> Recipe:
    """Returns a checked Recipe from nested values, as a TOML file holds them."""
    return make_settings(Recipe, values, name)
