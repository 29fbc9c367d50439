# SPDX-License-Identifier: Apache-2.0
"""What a user may call a model: a bundled name, a folder, or a hub id; nothing here touches the network."""

from pathlib import Path
from typing import Any, NoReturn

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

from turbopocket.export.checkpoint import hub, source
from turbopocket.export.checkpoint.hub import wanted_files
from turbopocket.export.checkpoint.load import load
from turbopocket.export.checkpoint.source import resolve
from turbopocket.ground.errors import TurbopocketError

REPOSITORY = [
    "README.md",
    "model_index.json",
    "sd_xl_base_1.0.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
    "vae/diffusion_pytorch_model.safetensors.index.json",
    "vae_1_0/diffusion_pytorch_model.safetensors",
]
FOLDERS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "unet", "vae")
CONFIGS = [
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors.index.json",
]


def test_only_text_and_one_set_of_safetensors_are_fetched() -> None:
    assert sorted(wanted_files(REPOSITORY, FOLDERS, weights_of=FOLDERS)) == sorted(
        [
            *CONFIGS,
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
            "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        ]
    )


def test_for_shapes_only_text_is_fetched() -> None:
    assert sorted(wanted_files(REPOSITORY, FOLDERS, weights_of=())) == CONFIGS


def test_source_that_is_nothing_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(TurbopocketError) as caught:
        load("no such model")
    assert str(caught.value) == (
        "'no such model' is neither a bundled model (pocket-turbo, pocket, pocket-dit), nor a folder, nor a "
        "single file, nor a hub id (owner/name)"
    )


def test_bundled_model_is_found_by_name_even_beside_a_folder_of_that_name(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pocket").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(source.BUNDLED, "pocket", tiny_sd)
    model = load("pocket")
    assert (model.name, model.folder) == ("pocket", tiny_sd)


def test_bundled_model_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(source.BUNDLED, "pocket", tmp_path / "weights")
    with pytest.raises(TurbopocketError, match="'pocket' has no weights in this installation"):
        load("pocket")


def test_local_folder_is_preferred_to_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = resolve("owner/name", None, FOLDERS, with_weights=True)
    assert (found.name, found.folder) == ("name", Path("owner/name"))


class _Hub:
    """Stands in for the hub: answers with `siblings`, or raises."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.fetched: list[str] = []

    def model_info(self, repo_id: str, timeout: float) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        siblings = [type("Sibling", (), {"rfilename": name}) for name in self.answer]
        return type("Info", (), {"siblings": siblings})

    def snapshot_download(self, repo_id: str, allow_patterns: list[str]) -> str:
        self.fetched = allow_patterns
        return f"cache/{repo_id}"


def test_hub_id_is_fetched_without_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = _Hub(REPOSITORY)
    monkeypatch.setattr(hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(hub, "snapshot_download", stand_in.snapshot_download)
    found = resolve("owner/sdxl", None, FOLDERS, with_weights=True)
    assert (found.name, found.folder) == ("sdxl", Path("cache/owner/sdxl"))
    assert {Path(name).suffix for name in stand_in.fetched} == {".json", ".md", ".txt", ".safetensors"}


def _never_downloaded(repo_id: str, **_: object) -> NoReturn:
    raise LocalEntryNotFoundError("nothing in the cache")


def test_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", lambda: _Hub(OfflineModeIsEnabled("offline")))
    monkeypatch.setattr(hub, "snapshot_download", _never_downloaded)
    with pytest.raises(TurbopocketError, match="no such folder here, and the hub is not reachable") as caught:
        load("owner/name")
    assert caught.value.hint == "give a local diffusers folder"


def test_model_fetched_before_is_used_when_the_hub_is_unreachable(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HfApi", lambda: _Hub(OfflineModeIsEnabled("offline")))
    monkeypatch.setattr(hub, "snapshot_download", lambda repo_id, local_files_only: str(tiny_sd))
    assert load("owner/name").folder == tiny_sd


def test_model_that_the_hub_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    monkeypatch.setattr(hub, "HfApi", lambda: _Hub(unknown))
    with pytest.raises(TurbopocketError, match="owner/name: no such folder here, and no such model on the hub"):
        load("owner/name")
