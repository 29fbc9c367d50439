# SPDX-License-Identifier: Apache-2.0
"""Whoever changed an artifact may have written its limits too: those above the target's own do not count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def with_recipe(artifact: Path, old: str, new: str) -> None:
    path = artifact / "manifest.json"
    values = json.loads(path.read_text())
    assert old in values["recipe"]
    values["recipe"] = values["recipe"].replace(old, new)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("limit", "options", "code"), [("inf", [], 3), ("inf", ["--accept-limit"], 0), ("0.00009", [], 0)]
)
def test_a_limit_above_the_targets_own_fails_unless_it_is_accepted(
    turbopocket: Run, artifact: Path, limit: str, options: list[str], code: int
) -> None:
    with_recipe(artifact, "[parity]\n", f"[parity]\nmax_lowering_error = {limit}\n")
    ran = turbopocket("check", artifact, *options)
    assert ran.code == code, ran.err
    assert ("its recipe allows a lowering error of inf, where onnx allows 0.0001" in ran.err) == (code == 3)


def test_the_recipes_target_has_to_be_the_artifacts(turbopocket: Run, artifact: Path) -> None:
    with_recipe(artifact, 'name = "onnx"', 'name = "coreml"')
    ran = turbopocket("check", artifact)
    assert ran.code == 1
    assert "is for onnx, and the recipe in its manifest for coreml" in ran.err
