# SPDX-License-Identifier: Apache-2.0
"""A link in a tokenizer's folder ships nothing but the model's own files."""

import os
import shutil
from pathlib import Path

import pytest

from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.targets.side_files import TOKENIZER_FILES, write_swift_files, write_tokenizers
from turbopocket.ground.errors import TurbopocketError

SECRET = "-----BEGIN PRIVATE KEY-----"


@pytest.fixture
def model(tiny_sd: Path, tmp_path: Path) -> LoadedModel:
    return load_shapes(str(shutil.copytree(tiny_sd, tmp_path / "model")))


@pytest.mark.parametrize("beside", [True, False], ids=["with tokenizer.json", "without"])
@pytest.mark.parametrize("name", [*TOKENIZER_FILES, "added_tokens.json"])
def test_a_link_to_a_file_elsewhere_is_refused(name: str, beside: bool, model: LoadedModel, tmp_path: Path) -> None:
    tokenizer, secret, out = model.tokenizers["text_encoder"], tmp_path / "private.key", tmp_path / "out"
    secret.write_text(SECRET)
    if beside:
        write_tokenizers(model, tmp_path / "whole")
        shutil.copyfile(tmp_path / "whole" / "tokenizer" / "tokenizer.json", tokenizer / "tokenizer.json")
    (tokenizer / name).unlink(missing_ok=True)
    (tokenizer / name).symlink_to(os.path.relpath(secret, tokenizer))
    for write in (lambda: write_tokenizers(model, out, TOKENIZER_FILES), lambda: write_swift_files(model, out)):
        with pytest.raises(
            TurbopocketError, match=rf"{name} is a link to {secret}, which is not in the model's folder"
        ):
            write()
    assert not list(out.rglob("*.*"))


def test_a_tokenizer_that_lies_elsewhere_altogether_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    tokenizer = model.tokenizers["text_encoder"]
    tokenizer.rename(tmp_path / "elsewhere")
    tokenizer.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TurbopocketError, match="which is not in the model's folder"):
        write_tokenizers(model, tmp_path / "out")


def test_links_within_the_model_and_into_the_hubs_blobs_are_the_models(tiny_sd: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = Path(shutil.copytree(tiny_sd, repository / "snapshots" / "0123"))
    (repository / "blobs").mkdir()
    for file in [path for path in snapshot.rglob("*") if path.is_file()]:
        blob = repository / "blobs" / str(file.stat().st_ino)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    (snapshot / "tokenizer" / "more.txt").symlink_to("merges.txt")
    model = load_shapes(str(snapshot))
    write_tokenizers(model, tmp_path / "out", TOKENIZER_FILES)
    for name in ("vocab.json", "merges.txt"):
        copied = tmp_path / "out" / "tokenizer" / name
        assert copied.read_bytes() == (tiny_sd / "tokenizer" / name).read_bytes()
        assert not copied.is_symlink()
    (repository / "private.key").write_text(SECRET)
    (snapshot / "tokenizer" / "merges.txt").unlink()
    (snapshot / "tokenizer" / "merges.txt").symlink_to(repository / "private.key")
    with pytest.raises(TurbopocketError, match="which is not in the model's folder"):
        write_tokenizers(model, tmp_path / "other", TOKENIZER_FILES)
