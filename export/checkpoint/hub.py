# SPDX-License-Identifier: Apache-2.0
"""Fetching a checkpoint from the Hugging Face hub: text and safetensors only, one set of weights."""

from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ...ground.errors import TurbopocketError
from .card import CARD
from .weight_files import SHARD, choose_weight_file

ANSWER_TIMEOUT_S = 20
FILES_SHOWN = 5
STEMS = ("diffusion_pytorch_model", "model")


def download(repo_id: str, folders: Collection[str], weights_of: Collection[str]) -> Path:
    """Returns the local folder of a hub model, fetched now or, when the hub cannot be reached, before.

    Of each of `folders` come the configs, and of those in `weights_of` one set of weights. Raises TurbopocketError
    when the hub does not know the model, the model is no diffusers pipeline, or the hub cannot be reached and no
    earlier copy exists.
    """
    try:
        info = HfApi().model_info(repo_id, timeout=ANSWER_TIMEOUT_S)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        if "model_index.json" not in names:
            raise _no_pipeline(repo_id, names)
        return Path(snapshot_download(repo_id, allow_patterns=wanted_files(names, folders, weights_of)))
    except RepositoryNotFoundError:
        raise TurbopocketError(
            f"{repo_id}: no such folder here, and no such model on the hub that is open to you",
            hint="check the spelling; for a gated model accept its terms and run `hf auth login`",
        ) from None
    except (HTTPError, OSError) as error:
        return _downloaded_before(repo_id, error)


def _downloaded_before(repo_id: str, reason: Exception) -> Path:
    try:
        return Path(snapshot_download(repo_id, local_files_only=True))
    except IncompleteSnapshotError as incomplete:  # we never fetch a whole repository; what lacks is named later
        return Path(incomplete.snapshot_path)
    except LocalEntryNotFoundError:
        raise TurbopocketError(
            f"{repo_id}: no such folder here, and the hub is not reachable ({type(reason).__name__})",
            hint="give a local diffusers folder",
        ) from None


def _no_pipeline(repo_id: str, names: Collection[str]) -> TurbopocketError:
    files = sorted(name for name in names if name.endswith(".safetensors"))
    shown = ", ".join(files[:FILES_SHOWN]) + (" ..." if len(files) > FILES_SHOWN else "")
    needed = " ".join([*(name for name in ("config.json",) if name in names), *files[:1]])
    return TurbopocketError(
        f"{repo_id} has no model_index.json, so it is not a diffusers pipeline; "
        f"of safetensors it holds {shown or 'nothing'}",
        hint=f"hf download {repo_id} {needed} --local-dir {repo_id.split('/')[1]} fetches what can be given"
        if files
        else None,
    )


def wanted_files(names: Iterable[str], folders: Collection[str], weights_of: Collection[str]) -> list[str]:
    """Returns which files of a repository to fetch: the index, the card, configs, and one set of weights a folder."""
    by_folder: dict[str, set[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        by_folder.setdefault(str(path.parent), set()).add(path.name)
    wanted = ["model_index.json", *by_folder.get(".", set()) & {CARD}]
    for folder in sorted(set(folders) & by_folder.keys()):
        present = by_folder[folder]
        chosen = {name for name in present if name.endswith((".json", ".txt", "spiece.model"))}
        if folder in weights_of:
            chosen |= {file for stem in STEMS for file in _one_set_of_weights(present, stem)}
        wanted += [f"{folder}/{name}" for name in sorted(chosen)]
    return wanted


def _one_set_of_weights(present: Collection[str], stem: str) -> set[str]:
    chosen = choose_weight_file(present, stem)
    if chosen is None:
        return set()
    if chosen.endswith(".safetensors"):
        return {chosen}
    return {name for name in present if name.startswith(stem) and SHARD.search(name)}
