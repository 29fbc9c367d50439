# SPDX-License-Identifier: Apache-2.0
"""An artifact is exactly what its manifest says, or it is refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.manifest import (
    Manifest,
    file_entries,
    load_manifest,
    sha256_of,
    verify,
    write_manifest,
)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_untouched_artifact_is_verified(toy_artifact: Path, toy_manifest: Manifest) -> None:
    verify(toy_artifact, toy_manifest)
    assert toy_manifest.total_bytes == sum(
        path.stat().st_size for path in toy_artifact.rglob("*") if path.is_file() and path.name != "manifest.json"
    )


def test_written_manifest_reads_back_equal_and_leaves_nothing_beside_it(
    toy_artifact: Path, toy_manifest: Manifest
) -> None:
    before = (toy_artifact / "manifest.json").read_bytes()
    write_manifest(toy_artifact, toy_manifest)
    assert (toy_artifact / "manifest.json").read_bytes() == before
    assert load_manifest(toy_artifact) == toy_manifest
    verify(toy_artifact, toy_manifest)


def test_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_missing_file_is_named(toy_artifact: Path, toy_manifest: Manifest) -> None:
    (toy_artifact / "unet" / "weights.bin").unlink()
    with pytest.raises(TurbopocketError, match=r"unet/weights.bin is missing \(\d+ bytes in the manifest\)"):
        verify(toy_artifact, toy_manifest)


def test_extra_file_is_named(toy_artifact: Path, toy_manifest: Manifest) -> None:
    (toy_artifact / "unet" / "notes.txt").touch()
    with pytest.raises(TurbopocketError, match=r"unet/notes.txt is not in the manifest"):
        verify(toy_artifact, toy_manifest)


def test_one_flipped_bit_is_found(toy_artifact: Path, toy_manifest: Manifest) -> None:
    path = toy_artifact / "unet" / "weights.bin"
    edited = bytearray(path.read_bytes())
    edited[17] ^= 1
    path.write_bytes(edited)
    with pytest.raises(TurbopocketError, match=r"unet/weights.bin was changed: sha256 \w{12}…, the manifest says"):
        verify(toy_artifact, toy_manifest)


def test_another_length_is_told_in_bytes(toy_artifact: Path, toy_manifest: Manifest) -> None:
    path = toy_artifact / "unet" / "weights.bin"
    expected = path.stat().st_size
    path.write_bytes(b"short")
    with pytest.raises(TurbopocketError, match=f"weights.bin has 5 bytes, the manifest says {expected}"):
        verify(toy_artifact, toy_manifest)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_symlinks_are_refused_even_when_the_content_is_right(
    toy_artifact: Path, toy_manifest: Manifest, what: str
) -> None:
    path = toy_artifact / ("unet/weights.bin" if what == "file" else "unet")
    outside = toy_artifact.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(TurbopocketError, match="is a symlink, an artifact holds only plain files"):
        verify(toy_artifact, toy_manifest)
    with pytest.raises(TurbopocketError, match="is a symlink"):
        file_entries(toy_artifact)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "unet/../../secret", "unet\\x", "C:x", "", ".", "a//b"])
def test_paths_that_leave_the_artifact_are_refused(toy_artifact: Path, path: str) -> None:
    rewrite(toy_artifact, lambda found: found["files"][0].update(path=path))
    with pytest.raises(TurbopocketError, match=r"files\.0\.path: path .* is not a plain relative path inside"):
        load_manifest(toy_artifact)
    with pytest.raises(ValueError, match="is not a plain relative path"):
        Manifest.model_validate_json((toy_artifact / "manifest.json").read_text())


@pytest.mark.parametrize(("version", "shown"), [(3, "3"), (0, "0"), (None, "None"), ("1", "'1'"), (True, "True")])
def test_other_schema_versions_are_refused(toy_artifact: Path, version: object, shown: str) -> None:
    rewrite(toy_artifact, lambda found: found.update(schema_version=version))
    with pytest.raises(TurbopocketError, match=f"has schema_version {shown}: this version reads 1 to 2"):
        load_manifest(toy_artifact)


def test_manifest_from_the_future_is_refused_for_its_version_not_for_its_fields(toy_artifact: Path) -> None:
    (toy_artifact / "manifest.json").write_text('{"schema_version": 7, "everything": "different"}')
    with pytest.raises(TurbopocketError, match="has schema_version 7"):
        load_manifest(toy_artifact)


def test_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(TurbopocketError, match=r"is not an artifact: it holds no manifest\.json"):
        load_manifest(tmp_path)


def test_truncated_manifest_is_refused_at_its_line(toy_artifact: Path) -> None:
    path = toy_artifact / "manifest.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(TurbopocketError, match=r"manifest.json is not JSON: .*: line \d+ column \d+") as caught:
        load_manifest(toy_artifact)
    assert caught.value.hint is not None


def test_manifest_that_is_not_text_is_refused(toy_artifact: Path) -> None:
    (toy_artifact / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TurbopocketError, match="is not UTF-8 text"):
        load_manifest(toy_artifact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda m: m.pop("sampler"), "sampler: Field required"),
        (lambda m: m["files"][0].update(bytes="12"), r"files\.0\.bytes: Input should be a valid integer"),
        (lambda m: m["files"][0].update(sha256="0"), r"files\.0\.sha256: String should match pattern"),
        (lambda m: m["files"].append(m["files"][0]), "files lists .* more than once"),
        (lambda m: m["files"].pop(0), "text_encoder/model.onnx is used but not in files"),
        (
            lambda m: m["tokenizers"].update(clip="tokenizer"),
            "tokenizers names clip, which is not a component",
        ),
        (lambda m: m["sampler"].update(timesteps=[1.0, 2.0]), r"sampler: timesteps are \[1.0, 2.0\], but"),
        (
            lambda m: m["components"]["unet"].update(file="unet/gone.onnx"),
            "unet/gone.onnx is used but not in files",
        ),
        (lambda m: m["image"].update(height=0), "image.height: Input should be greater than or equal to 1"),
    ],
)
def test_wrong_fields_are_refused_by_name(toy_artifact: Path, change: Any, message: str) -> None:
    rewrite(toy_artifact, change)
    with pytest.raises(TurbopocketError, match=message):
        load_manifest(toy_artifact)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema_version": ' + "1" * 5000 + "}", "", "nul"])
def test_absurd_json_is_refused_without_a_traceback(toy_artifact: Path, text: str) -> None:
    (toy_artifact / "manifest.json").write_text(text)
    with pytest.raises(TurbopocketError, match=r"manifest.json is not JSON: "):
        load_manifest(toy_artifact)


def test_list_instead_of_an_object_is_refused(toy_artifact: Path) -> None:
    (toy_artifact / "manifest.json").write_text("[]")
    with pytest.raises(TurbopocketError, match="has schema_version None"):
        load_manifest(toy_artifact)
