# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from turbopocket.ground.files import write_whole


def test_file_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with write_whole(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def write_half(path: Path) -> None:
    with write_whole(path) as partial:
        partial.write_text("half")
        raise KeyError


def test_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("earlier")
    with pytest.raises(KeyError):
        write_half(path)
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
