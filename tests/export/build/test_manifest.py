# SPDX-License-Identifier: Apache-2.0
"""What a manifest and a report say of bytes."""

import random
import zlib
from pathlib import Path

import pytest

from turbopocket.export.build import manifest
from turbopocket.export.build.manifest import zipped_bytes


def test_what_is_zipped_in_parts_comes_to_what_whole_files_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unet").mkdir()
    letters = bytes(random.Random(0).choices(b"abcdefgh", k=300_000))
    contents = {"unet/weights": letters + bytes(300_000), "tokenizer": letters[:10], "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    whole = sum(len(zlib.compress(content)) for content in contents.values())
    assert zipped_bytes(tmp_path) == whole
    monkeypatch.setattr(manifest, "READ_AT_ONCE", 1000)
    assert zipped_bytes(tmp_path) == whole
    monkeypatch.setattr(manifest, "DEFLATED_AT_ONCE", 100_000)
    assert 0 < zipped_bytes(tmp_path) - whole < whole / 20
