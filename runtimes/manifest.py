# SPDX-License-Identifier: Apache-2.0
"""The contract between whoever builds an artifact and whoever reads it, phones included: `manifest.json`."""

import hashlib
import json
import tempfile
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..ground.errors import TurbopocketError
from .image_size import ImageSize
from .schedule import SamplerSpec, validation_summary

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "ComponentSpec",
    "FileEntry",
    "ImageSpec",
    "Manifest",
    "SamplerSpec",
    "TensorSpec",
    "file_entries",
    "load_manifest",
    "sha256_of",
    "verify",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION: Literal[1] = 1


def _inside(path: str) -> str:
    """`path` itself, when it is relative, normal and cannot leave the folder; else ValueError."""
    pure = PurePosixPath(path)
    escapes = pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or "\0" in path
    if escapes or path in ("", ".") or str(pure) != path:
        raise ValueError(f"path {path!r} is not a plain relative path inside the artifact")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
PositiveInt = Annotated[int, Field(ge=1)]
Token = Annotated[str, Field(min_length=1)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(_Record):
    """One stored file: its path inside the artifact, its length and its hash."""

    path: RelativePath
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TensorSpec(_Record):
    """A named tensor; a dimension is a number, or a name when it may vary from call to call."""

    name: str = Field(min_length=1)
    dtype: Literal["float32", "float16", "int64", "int32", "uint8", "int8", "bool"]
    shape: list[PositiveInt | str]


class ComponentSpec(_Record):
    """One graph the phone runs: its main file, and its tensors in the graph's order.

    `data` is an ExecuTorch program's .ptd file, which a program whose weights lie apart must be opened with.
    """

    file: RelativePath
    data: RelativePath | None = None
    inputs: list[TensorSpec] = Field(min_length=1)
    outputs: list[TensorSpec] = Field(min_length=1)


class ImageSpec(_Record):
    """The picture in pixels, and its latents, which the VAE has as z: `runtimes.latents` turns one into the other.

    latents = (z - latents_mean) * vae_scaling_factor / latents_std, by channel; a model may have no mean and deviation.
    Dimensions of an artifact for several sizes have the names of these fields where a graph leaves them free.
    """

    height: PositiveInt
    width: PositiveInt
    latent_channels: PositiveInt
    latent_height: PositiveInt
    latent_width: PositiveInt
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


class Manifest(_Record):
    """Everything a reader of an artifact may rely on; `files` lists all its files but `manifest.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(min_length=1)
    family: Literal["sdxl", "sd"]
    target: Literal["onnx", "coreml", "executorch"]
    files: list[FileEntry]
    components: dict[str, ComponentSpec]
    tokenizers: dict[str, RelativePath]
    prompt_replacements: dict[str, dict[Token, str]] = {}
    """For a text encoder: tokens in a prompt that stand for several vectors, and what to write in their place."""
    sampler: SamplerSpec
    only_these_steps: bool = False
    """Whether the weights are those of a student for exactly the sampler's steps."""
    image: ImageSpec
    """What it draws when no size is asked for."""
    sizes: list[ImageSize] = Field(min_length=1)
    """[height, width] in pixels of all pictures that it draws; the first is that of `image`."""
    force_zeros_for_empty_prompt: bool
    tools: dict[str, str]
    recipe: str
    notes: list[str] = []
    """What the build assumed where neither the recipe nor the model said it, a sentence each."""
    plan: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None

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

    @model_validator(mode="before")
    @classmethod
    def _draws_its_image(cls, values: Any) -> Any:
        """An artifact from before there were several sizes draws that of `image`."""
        if not isinstance(values, dict) or "sizes" in values:
            return values
        image = values.get("image")
        size = (image.get("height"), image.get("width")) if isinstance(image, dict) else getattr(image, "size", None)
        return values | {"sizes": [size]}

    @model_validator(mode="after")
    def _sizes_are_whole(self) -> "Manifest":
        image = self.image
        if self.sizes[0] != image.size:
            raise ValueError(f"sizes begins with {self.sizes[0]}, image is {image.size}")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes lists {', '.join(map(str, self.sizes))}: one of them twice")
        for size in self.sizes:
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
        needed |= {f"{folder}/tokenizer.json" for folder in self.tokenizers.values()}
        if missing := needed - set(paths):
            raise ValueError(f"{', '.join(sorted(missing))} is used but not in files")
        if strangers := set(self.tokenizers) - set(self.components):
            raise ValueError(f"tokenizers names {', '.join(sorted(strangers))}, which is not a component")
        if strangers := set(self.prompt_replacements) - set(self.tokenizers):
            raise ValueError(f"prompt_replacements names {', '.join(sorted(strangers))}, which has no tokenizer")
        return self


def load_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`, true to the schema; `verify` compares it with the files.

    Raises TurbopocketError for a missing or unreadable file, broken JSON, another schema version or a wrong
    field, of which it names the first.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except FileNotFoundError:
        raise TurbopocketError(f"{folder} is not an artifact: it holds no {MANIFEST_NAME}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TurbopocketError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # broken syntax, absurd numbers, absurd nesting
        raise TurbopocketError(f"{path} is not JSON: {error}", hint="the file may be cut off: build again") from error
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise TurbopocketError(f"{path} has schema_version {version!r}: this version reads {SCHEMA_VERSION}")
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
