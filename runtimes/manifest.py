# SPDX-License-Identifier: Apache-2.0
"""The contract between whoever builds an artifact and whoever reads it, phones included: `manifest.json`."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ..ground.errors import TurbopocketError
from ..ground.reading import parse_json, read_text
from ..ground.records import schema_version
from .ceilings import MOST_CHANNELS, MOST_LETTERS, MOST_VALUES
from .image_size import MOST_PIXELS_ASIDE, ImageSize
from .pipeline import Name, Pipeline, Record, RelativePath, RewriteSpec, RuntimeSpec, SamplerTable, SelfCheck
from .schedule import SamplerSpec, validation_summary
from .upgrade import upgraded

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "ComponentSpec",
    "FileEntry",
    "ImageSpec",
    "LoopSpec",
    "LoopTensor",
    "Manifest",
    "ModelOrigin",
    "RewriteSpec",
    "RuntimeSpec",
    "SamplerSpec",
    "TensorSpec",
    "file_entries",
    "load_manifest",
    "sha256_of",
    "verify",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION: Literal[2] = 2


PositiveInt = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=MOST_PIXELS_ASIDE)]
Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]


class FileEntry(Record):
    """One stored file: its path inside the artifact, its length and its hash."""

    path: RelativePath
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TensorSpec(Record):
    """A named tensor; a dimension is a number, or a name when it may vary from call to call."""

    name: Name
    dtype: Literal["float32", "float16", "int64", "int32", "uint8", "int8", "bool"]
    shape: list[PositiveInt | str]

    @model_validator(mode="after")
    def _fits_in_memory(self) -> Self:
        if math.prod(size for size in self.shape if isinstance(size, int)) > MOST_VALUES:
            raise ValueError(f"{self.name} of {self.shape} has more than {MOST_VALUES:,} values")
        return self


class LoopTensor(TensorSpec):
    """A tensor as the loop has it, and how the file has it: under the name `tensor`, with that tensor's number type.

    The file's first dimension is how many items it takes at once; the loop asks for as many as it likes. `layout`:
    `repeated`, the loop's scalar or [1] once an item; `B D 1 T`, the loop's [B, T, D] with its tokens last.
    """

    tensor: Name
    layout: Literal["as it is", "repeated", "B D 1 T"] = "as it is"


class LoopSpec(Record):
    """How the loop names and shapes what goes in and what comes out, where a target's files do it otherwise."""

    inputs: list[LoopTensor] = Field(min_length=1)
    outputs: list[LoopTensor] = Field(min_length=1)


class ComponentSpec(Record):
    """One graph the phone runs: its main file, and the tensors that its files have, in the graph's order.

    `data` is the file of its weights, which lies beside it and is opened with it: ONNX's external data (artifacts from
    before name none, and have it as `file` with .data behind), an ExecuTorch program's .ptd file. `packages`
    are Core ML's, to be run one after the other: each is given, by name, what it asks for of the inputs and of what
    those before it gave. `loop` is there when the loop's tensors are not the files' own.
    """

    file: RelativePath
    data: RelativePath | None = None
    packages: list[RelativePath] = Field(default_factory=list)
    inputs: list[TensorSpec] = Field(min_length=1)
    outputs: list[TensorSpec] = Field(min_length=1)
    loop: LoopSpec | None = None

    @property
    def loop_inputs(self) -> Sequence[TensorSpec]:
        """What goes in, as the loop has it."""
        return self.inputs if self.loop is None else self.loop.inputs

    @property
    def loop_outputs(self) -> Sequence[TensorSpec]:
        """What comes out, as the loop has it."""
        return self.outputs if self.loop is None else self.loop.outputs

    @model_validator(mode="after")
    def _loop_has_the_files_tensors(self) -> "ComponentSpec":
        if self.loop is not None:
            for side, loop, own in (
                ("inputs", self.loop.inputs, self.inputs),
                ("outputs", self.loop.outputs, self.outputs),
            ):
                named, there = sorted(each.tensor for each in loop), sorted(each.name for each in own)
                if named != there:
                    raise ValueError(f"loop.{side} stand for {', '.join(named)}; the file has {', '.join(there)}")
        return self


class ImageSpec(Record):
    """The picture in pixels, and its latents, which the VAE has as z: `runtimes.latents` turns one into the other.

    latents = (z - latents_mean) * vae_scaling_factor / latents_std, by channel; a model may have no mean and deviation.
    Dimensions of an artifact for several sizes have the names of these fields where a graph leaves them free.
    """

    height: Side
    width: Side
    latent_channels: Channels
    latent_height: Side
    latent_width: Side
    vae_scaling_factor: float = Field(gt=0)
    latents_mean: list[float] | None = None
    latents_std: list[Annotated[float, Field(gt=0)]] | None = None

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> "ImageSpec":
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(f"{name} has {len(values)} numbers for {self.latent_channels} latent channels")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std belong together")
        return self

    @property
    def size(self) -> ImageSize:
        """The picture's size in pixels."""
        return ImageSize(self.height, self.width)

    @property
    def position(self) -> ImageSize:
        """Pixels that one position of the latents stands for."""
        return ImageSize(self.height // self.latent_height, self.width // self.latent_width)

    def at(self, size: ImageSize) -> "ImageSpec":
        """The same of a picture of that size."""
        latent_height, latent_width = size.height // self.position.height, size.width // self.position.width
        latent = {"latent_height": latent_height, "latent_width": latent_width}
        return self.model_copy(update={"height": size.height, "width": size.width, **latent})

    @model_validator(mode="after")
    def _positions_are_whole(self) -> "ImageSpec":
        if self.height % self.latent_height or self.width % self.latent_width:
            latents = ImageSize(self.latent_height, self.latent_width)
            raise ValueError(f"a picture of {self.size} has no whole pixels for each of {latents} latent positions")
        return self


class ModelOrigin(Record):
    """What an artifact was made from: the model's name, and the hash of its weights, configs and tokenizers.

    `license` and `author` are as its model card has them; None where that does not say it.
    """

    name: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    license: Name | None = None
    author: Name | None = None


class Manifest(Record):
    """Everything a reader of an artifact may rely on; `files` lists all its files but `manifest.json`."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: Name
    family: Name
    """For people: nothing that draws asks for it."""
    target: Name
    files: list[FileEntry]
    components: dict[str, ComponentSpec]
    tokenizers: dict[str, RelativePath]
    prompt_replacements: dict[str, dict[Name, Annotated[str, Field(max_length=MOST_LETTERS)]]] = Field(
        default_factory=dict
    )
    """For a text encoder: tokens in a prompt that stand for several vectors, and what to write in their place."""
    pipeline: Pipeline
    sampler: SamplerSpec
    sampler_table: SamplerTable | None = None
    """The sampler's steps in numbers; None in an artifact from before manifests had them."""
    only_these_steps: bool = False
    """Whether it draws in exactly the sampler's steps: weights of a student, or activations rounded by the timestep."""
    image: ImageSpec
    """What it draws when no size is asked for."""
    sizes: list[ImageSize] = Field(min_length=1)
    """[height, width] in pixels of all pictures that it draws; the first is that of `image`."""
    tools: dict[str, str]
    recipe: str
    """Names models and files without saying where they lay."""
    model: ModelOrigin | None = None
    """None in an artifact from before manifests had it."""
    rewrites: list[RewriteSpec] = Field(default_factory=list)
    """What was changed in the denoiser's graph; a reader that runs all of an artifact's files has nothing to do."""
    runtime: RuntimeSpec | None = None
    """None in an artifact from before manifests had it."""
    notes: list[str] = Field(default_factory=list)
    """What the build assumed where neither recipe nor model said it, and what rewrites found, a sentence each."""
    plan: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    self_check: SelfCheck | None = None
    """None in an artifact from before manifests had it."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all listed files together."""
        return sum(entry.bytes for entry in self.files)

    def at_size(self, size: ImageSize) -> "Manifest":
        """The same with `image` of that size. Raises TurbopocketError when the artifact was not built for it."""
        if size not in self.sizes:
            listed = ", ".join(map(str, self.sizes))
            raise TurbopocketError(
                f"{self.name} was asked for {size}, this artifact was built for {listed}",
                hint=f"build another with --size {size}",
            )
        return self.model_copy(update={"image": self.image.at(size)})

    @property
    def largest_size(self) -> ImageSize:
        """The size of most pixels."""
        return max(self.sizes, key=lambda size: size.height * size.width)

    def of_picture(self, index: int) -> "Manifest":
        """The same at the size of picture `index` of several: all sizes in turn, the default first."""
        return self.at_size(self.sizes[index % len(self.sizes)])

    @model_validator(mode="after")
    def _sizes_are_whole(self) -> "Manifest":
        image = self.image
        if self.sizes[0] != image.size:
            raise ValueError(f"sizes begins with {self.sizes[0]}, image is {image.size}")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes lists {', '.join(map(str, self.sizes))}: one of them twice")
        for size in self.sizes:
            if max(size) > MOST_PIXELS_ASIDE:
                raise ValueError(f"sizes lists {size}: a side may have {MOST_PIXELS_ASIDE:,} pixels")
            if min(size) < 1 or any(side % pixels for side, pixels in zip(size, image.position, strict=True)):
                raise ValueError(f"sizes lists {size}: a latent position has {image.position} pixels")
        return self

    @model_validator(mode="after")
    def _refers_to_listed_files(self) -> "Manifest":
        paths = [entry.path for entry in self.files]
        if twice := {path for path in paths if paths.count(path) > 1}:
            raise ValueError(f"files lists {', '.join(sorted(twice))} more than once")
        if MANIFEST_NAME in paths:
            raise ValueError(f"files lists {MANIFEST_NAME}, which cannot hold its own hash")
        needed = {file for spec in self.components.values() for file in (spec.file, spec.data) if file is not None}
        needed |= {f"{package}/Manifest.json" for spec in self.components.values() for package in spec.packages}
        needed |= {f"{folder}/tokenizer.json" for folder in self.tokenizers.values()}
        needed |= {each.file for each in self.self_check.outputs.values()} if self.self_check else set()
        if missing := needed - set(paths):
            raise ValueError(f"{', '.join(sorted(missing))} is used but not in files")
        if strangers := set(self.tokenizers) - set(self.components):
            raise ValueError(f"tokenizers names {', '.join(sorted(strangers))}, which is not a component")
        if strangers := {each for rewrite in self.rewrites for each in rewrite.text_encoders} - set(self.tokenizers):
            raise ValueError(f"rewrites names {', '.join(sorted(strangers))}, which has no tokenizer")
        if strangers := set(self.prompt_replacements) - set(self.tokenizers):
            raise ValueError(f"prompt_replacements names {', '.join(sorted(strangers))}, which has no tokenizer")
        return self

    @model_validator(mode="after")
    def _pipeline_fits_the_components(self) -> "Manifest":
        if mute := set(self.pipeline.text_encoders) - set(self.tokenizers):
            raise ValueError(f"pipeline: text encoder {', '.join(sorted(mute))} has no tokenizer")
        for component, side, name in self.pipeline.uses():
            if component not in self.components:
                raise ValueError(f"pipeline names {component}, which is not a component")
            spec = self.components[component]
            there = [each.name for each in (spec.loop_inputs if side == "input" else spec.loop_outputs)]
            if name not in there:
                raise ValueError(f"pipeline names {side} {name} of {component}, which has {', '.join(there)}")
        asked = self.pipeline.denoiser
        fed = {asked.latents, asked.timestep, *asked.inputs}
        if hungry := [each.name for each in self.components[asked.component].loop_inputs if each.name not in fed]:
            raise ValueError(f"pipeline does not say what feeds input {', '.join(hungry)} of {asked.component}")
        return self


def load_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`, true to the schema; `verify` compares it with the files.

    One of an older schema is brought up to this one. Raises TurbopocketError for a missing or unreadable file, broken
    JSON, an unknown schema version or a wrong field, of which it names the first.
    """
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        raise TurbopocketError(f"{folder} is not an artifact: it holds no {MANIFEST_NAME}")
    text = read_text(path)
    found = parse_json(text, str(path))
    version = schema_version(found, str(path), SCHEMA_VERSION)
    try:
        text = text if version == SCHEMA_VERSION else json.dumps(upgraded(found))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise TurbopocketError(f"{path} is not what schema_version {version} says: {error!r}") from error
    try:
        return Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise TurbopocketError(f"{path}: {validation_summary(error)}") from error


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """The path of the manifest, which now stands complete in `folder`; a half-written one is never seen."""
    text = manifest.model_dump_json(indent=2) + "\n"
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=folder, prefix=f".{MANIFEST_NAME}.", delete=False
    ) as beside:
        beside.write(text)
    path = folder / MANIFEST_NAME
    Path(beside.name).chmod(0o644)
    return Path(beside.name).replace(path)


def file_entries(folder: Path) -> list[FileEntry]:
    """Every file under `folder` but the manifest, hashed, in path order; TurbopocketError for symlinks."""
    return [_entry(folder, path) for path in _paths_on_disk(folder)]


def verify(folder: Path, manifest: Manifest) -> None:
    """Returns when `folder` holds exactly the listed files, byte for byte.

    Raises TurbopocketError naming the first symlink, missing, extra or edited file.
    """
    on_disk = _paths_on_disk(folder)
    listed = {entry.path: entry for entry in manifest.files}
    for path in sorted(set(listed) - set(on_disk)):
        raise TurbopocketError(f"{folder}: {path} is missing ({listed[path].bytes} bytes in the manifest)")
    for path in on_disk:
        if path not in listed:
            raise TurbopocketError(f"{folder}: {path} is not in the manifest", hint="remove it, or build again")
    for path, entry in listed.items():
        _verify_content(folder, path, entry)


def sha256_of(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits; reads it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify_content(folder: Path, path: str, entry: FileEntry) -> None:
    found_bytes = (folder / path).stat().st_size
    if found_bytes != entry.bytes:
        raise TurbopocketError(f"{folder}: {path} has {found_bytes} bytes, the manifest says {entry.bytes}")
    found = sha256_of(folder / path)
    if found != entry.sha256:
        raise TurbopocketError(
            f"{folder}: {path} was changed: sha256 {found[:12]}…, the manifest says {entry.sha256[:12]}…"
        )


def _entry(folder: Path, path: str) -> FileEntry:
    file = folder / path
    return FileEntry(path=path, bytes=file.stat().st_size, sha256=sha256_of(file))


def _paths_on_disk(folder: Path) -> list[str]:
    paths = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise TurbopocketError(f"{folder}: {name} is a symlink, an artifact holds only plain files")
        if path.is_file() and name != MANIFEST_NAME:
            paths.append(name)
        elif not path.is_file() and not path.is_dir():
            raise TurbopocketError(f"{folder}: {name} is not a plain file")
    return paths
