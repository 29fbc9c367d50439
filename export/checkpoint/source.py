# SPDX-License-Identifier: Apache-2.0
"""Turning what a user calls a model into places on this machine: a whole folder, or parts and what completes them."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ground.errors import TurbopocketError
from ...ground.reading import one_sentence
from .bundled import BUNDLED
from .folder_contents import is_unet_folder, pipeline_around, refuse_other_folders
from .header import StoredTensor
from .index import read_pipeline_index
from .json_object import read_json_object
from .single_file import MODEL_SUFFIXES, SingleFile, family_of_unet, open_single_file
from .weight_files import stored_tensors

if TYPE_CHECKING:  # a source that is refused needs no PyTorch
    from torch import nn

    from ..families.base import ModelFamily, ModuleSpec

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMPLETE = "--config FOLDER: a diffusers folder or a hub id of the same architecture, with weights"


@dataclass(frozen=True)
class Completion:
    """What completes a model that lies in a single file or a UNet's own folder: configs, tokenizers, other parts.

    `config` is what the user calls the completing folder; `assumed` says that diffusers does, and the user does not.
    """

    config: str
    assumed: bool
    own: Path
    missing: tuple[str, ...]
    unet_only: bool

    @property
    def hint(self) -> str:
        """What to do when tensors do not fit the configs."""
        return f"the configs are those of {self.config}: --config names those of a model of another shape"

    @property
    def lacking(self) -> str:
        """One sentence on what the model's own file or folder does not hold."""
        held = "holds the UNet only" if self.unet_only else "is no whole model"
        return f"{self.own} {held}: {', '.join(self.missing)} {'is' if len(self.missing) == 1 else 'are'} missing"


@dataclass(frozen=True)
class Checkpoint:
    """Where everything of one model lies.

    `folder` is a diffusers folder: index, scheduler, tokenizers, and all of each component that is not in `unet`
    (a UNet's own folder) or `file`; `completion` says why it is this folder when the model is in one of those.
    """

    name: str
    folder: Path
    unet: Path | None = None
    file: SingleFile | None = None
    completion: Completion | None = None

    def config_folder(self, component: str) -> Path:
        """Returns the folder with the component's config.json."""
        return self.unet if self.unet and component == "unet" else self.folder / component

    def weights(self, component: str) -> Path:
        """Returns the folder, or the single file, with the component's weights."""
        return self.file.path if self.file and component in self.file.parts else self.config_folder(component)

    def stored_tensors(self, component: str, module: "nn.Module", spec: "ModuleSpec") -> dict[str, StoredTensor]:
        """Returns where a component's tensors are stored, by published names, from the headers alone.

        Raises TurbopocketError when there are none, or they are pickled or broken.
        """
        if self.file and component in self.file.parts:
            return self.file.stored_tensors(component, module)
        try:
            return stored_tensors(self.config_folder(component), spec.weights_stem)
        except TurbopocketError as error:
            if self.completion is None or component not in self.completion.missing:
                raise
            raise TurbopocketError(f"{self.completion.lacking}, and {error}", error.hint) from error

    @property
    def scheduler_file(self) -> Path:
        """The folder's settings of the scheduler."""
        return self.folder / "scheduler" / "scheduler_config.json"

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's settings: what a single file states, else the folder's, if it has any."""
        stated: Mapping[str, Any] = self.file.scheduler if self.file else {}
        own = read_json_object(self.scheduler_file) if self.scheduler_file.is_file() else {}
        return {**own, **stated}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed, and what was taken from elsewhere, a sentence each."""
        if self.completion is None:
            return ()
        config, own = self.completion.config, self.completion.own.name
        origin = f"{own} has no configs, tokenizers and scheduler of its own: they are those of {config}"
        if self.completion.assumed and self.file:
            origin += f", as in diffusers for {self.file.kind.title} (--config names others)"
        notes = [origin]
        if self.completion.missing:
            notes.append(f"{own} has no {', '.join(self.completion.missing)}: the weights are those of {config}")
        if self.file:
            notes += self._notes_on_sampling(self.file, config)
        return tuple(notes)

    def _notes_on_sampling(self, file: SingleFile, config: str) -> list[str]:
        notes = []
        if file.scheduler:
            settings = " and ".join(f"{key} {value}" for key, value in file.scheduler.items())
            notes.append(f"{settings}: {file.path.name} says so ({', '.join(file.stated_by)})")
        if "prediction_type" not in file.scheduler:
            assumed = self.scheduler_config.get("prediction_type", "epsilon")
            notes.append(
                f"prediction_type {assumed} is the scheduler's of {config}: {file.path.name} says nothing of it"
            )
        return notes


def resolve(source: str, config: str | None, folders: Collection[str], with_weights: bool) -> Checkpoint:
    """Returns where a model lies: a bundled name, else a local file or folder, else a hub id.

    `config` names the folder or hub id that completes a single file or a UNet's own folder; of a hub id `folders`
    are fetched. Raises TurbopocketError when `source` is none of them, a bundled model was not installed, or what
    is there is neither a model nor a part of one.
    """
    asked = _request(source, config)
    if asked.whole:
        name, folder = _fetched(asked.whole, folders, folders if with_weights else ())
        return Checkpoint(name, folder)
    if asked.file:
        family, parts, configs = asked.file.kind.family, tuple(asked.file.parts), config or asked.file.kind.configs
    else:
        family, parts, configs = _family_of_unet(asked.own), ("unet",), config or ""
    completion = _completion(asked.own, family, parts, configs, config is None)
    folder = _completing_folder(completion, family, folders, with_weights)
    if asked.file:
        return Checkpoint(asked.own.stem, folder, file=asked.file, completion=completion)
    return Checkpoint(asked.own.resolve().name, folder, unet=asked.own, completion=completion)


def require_source(source: str, config: str | None) -> None:
    """Raises what `resolve` raises, as far as this machine tells: nothing is fetched."""
    _request(source, config)


@dataclass(frozen=True)
class _Whole:
    """A whole model by its name: a folder of this machine, or what the hub has under an id."""

    name: str
    folder: Path | None
    hub_id: str


@dataclass(frozen=True)
class _Request:
    """What `source` and `config` ask for: a whole model, or a UNet's `own` folder, or an `own` single file."""

    own: Path
    whole: _Whole | None = None
    file: SingleFile | None = None


def _request(source: str, config: str | None) -> _Request:
    path = _path(source)
    is_file = source not in BUNDLED and path.is_file()
    if is_file or (source not in BUNDLED and is_unet_folder(path)):
        if config is not None:
            _config(config)
        return _Request(path, file=open_single_file(path, config) if is_file else None)
    whole = _whole(source)
    if config is not None:
        raise TurbopocketError(
            f"config {config!r} was given for {source}, which has configs of its own; it is allowed for a single file "
            "and for a UNet's own folder"
        )
    return _Request(path, whole)


def _path(source: str) -> Path:
    """The path that a user wrote. TurbopocketError for one that no file can have, or the home of nobody."""
    with one_sentence(f"{source!r} is no path"):
        path = Path(source).expanduser()
        path.exists()
        return path


def _family_of_unet(folder: Path) -> "ModelFamily":
    is_xl = read_json_object(folder / "config.json").get("addition_embed_type") == "text_time"
    return family_of_unet(is_xl)


def _completion(own: Path, family: "ModelFamily", parts: tuple[str, ...], config: str, assumed: bool) -> Completion:
    missing = tuple(name for name in family.modules if name not in parts)
    completion = Completion(config, assumed, own, missing, parts == ("unet",))
    if missing and assumed:
        around = pipeline_around(own)
        raise TurbopocketError(completion.lacking, hint=f"give the whole model: {around}" if around else COMPLETE)
    return completion


def _completing_folder(
    completion: Completion, family: "ModelFamily", folders: Collection[str], with_weights: bool
) -> Path:
    """The folder that completes a model. Raises TurbopocketError when it is not there, or of another family."""
    own, config = completion.own, completion.config
    try:
        _, folder = _fetched(_whole(config), folders, completion.missing if with_weights else ())
    except TurbopocketError as error:
        if not completion.assumed:
            raise _of_config(error) from error
        raise TurbopocketError(
            f"{own} has no configs and tokenizers of its own, and diffusers' choice is not to be had: {error}",
            hint="--config FOLDER: a diffusers folder of the same architecture; its configs and tokenizers are enough",
        ) from error
    if (found := read_pipeline_index(folder).get("_class_name")) not in family.pipeline_classes:
        raise TurbopocketError(f"{own} is for a {family.pipeline_class}, config {config} is of a {found}")
    return folder


def _config(config: str) -> _Whole:
    """What completes a model. Raises TurbopocketError when it is no model here, and can be none of the hub."""
    try:
        return _whole(config)
    except TurbopocketError as error:
        raise _of_config(error) from error


def _of_config(error: TurbopocketError) -> TurbopocketError:
    return TurbopocketError(f"config: {error}", error.hint)


def _whole(source: str) -> _Whole:
    """A model that is a diffusers folder. Raises TurbopocketError when it is none here, and can be none of the hub."""
    if source in BUNDLED:
        if not BUNDLED[source].is_dir():
            raise TurbopocketError(f"the bundled model {source!r} has no weights in this installation")
        return _Whole(source, BUNDLED[source], source)
    path = _path(source)
    if path.is_dir():
        refuse_other_folders(path)
        return _Whole(path.resolve().name, path, source)
    if path.is_file():
        raise TurbopocketError(f"{source} is a file; a diffusers folder or a hub id is needed")
    if path.suffix in MODEL_SUFFIXES:
        raise TurbopocketError(f"{source} does not exist")
    if REPO_ID.fullmatch(source):
        return _Whole(source.split("/")[1], None, source)
    raise TurbopocketError(
        f"{source!r} is neither a bundled model ({', '.join(BUNDLED)}), nor a folder, nor a single file, "
        "nor a hub id (owner/name)"
    )


def _fetched(whole: _Whole, folders: Collection[str], weights_of: Collection[str]) -> tuple[str, Path]:
    """(name, folder) of a whole model; of a hub id only these folders and weights are fetched."""
    if whole.folder is not None:
        return whole.name, whole.folder
    from .hub import download

    return whole.name, download(whole.hub_id, folders, weights_of)
