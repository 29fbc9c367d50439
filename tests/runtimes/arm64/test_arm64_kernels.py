# SPDX-License-Identifier: Apache-2.0
"""Instruction words, as GNU as 2.40 assembles them, are counted for the kernels they belong to."""

from pathlib import Path

import pytest

from turbopocket.runtimes.arm64.kernels import FAMILIES, kernels_in

WORDS = {
    "dot product": {"sdot": 0x4E829420, "udot": 0x6E829420, "sdot by element": 0x4FA2E020, "udot .2s": 0x2FA2E820},
    "i8mm": {"smmla": 0x4E82A420, "ummla": 0x6E82A420, "usmmla": 0x4E82AC20, "usdot": 0x4E829C20},
    "bf16": {"bfmmla": 0x6E42EC20, "bfdot": 0x6E42FC20},
    "fp32": {"fmla .4s": 0x4E22CC20, "fmla .4s by element": 0x4FA21020},
    "fp16": {"fmla .8h": 0x4E420C20, "fmla .8h by element": 0x4F121020},
    "widening multiply": {"smlal .8h": 0x0E228020, "umlal2 .8h": 0x6E228020, "smull .8h": 0x0E22C020},
}
OTHERS = {
    "fmla .2d": 0x4E62CC20, "fmla .2d by element": 0x4FC21820, "smlal .4s": 0x0E628020, "add": 0x4EA28420,
    "mla": 0x4E629420, "sqdmulh": 0x4E62B420, "mul": 0x4EA29C20, "fmls": 0x4EA2CC20, "nop": 0xD503201F,
}  # fmt: skip


def write_log(path: Path, words: list[int], start: int = 0x1000) -> Path:
    lines = [f"0x{start + 4 * index:x}:  {word:08x}  whatever x0, x1" for index, word in enumerate(words)]
    path.write_text("\n".join(["----------------", "IN: ", *lines, "", ""]))
    return path


@pytest.mark.parametrize("kind", WORDS)
def test_instruction_counts_for_its_kernel_and_no_other(kind: str, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", list(WORDS[kind].values()))
    counts = kernels_in(log, [(0, 1 << 40)])
    assert counts == {family.name: len(WORDS[kind]) if family.name == kind else 0 for family in FAMILIES}


def test_other_instructions_count_for_nothing(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", list(OTHERS.values()))
    assert not any(kernels_in(log, [(0, 1 << 40)]).values())


def test_instruction_outside_the_library_or_translated_twice_is_not_counted(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", [0x4E829420] * 4)
    log.write_text(log.read_text() * 2)
    assert kernels_in(log, [(0x1004, 0x100C)])["dot product"] == 2
