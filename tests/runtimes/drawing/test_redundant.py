# SPDX-License-Identifier: Apache-2.0
"""What a manifest says twice must be said alike: one changed number is found, and named by its place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.redundant import require_agreement
from turbopocket.runtimes.manifest import Manifest

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("manifest-2-*.json"))


def manifest(path: Path, change: Callable[[dict[str, Any]], None] = lambda values: None) -> Manifest:
    values = json.loads(path.read_text("utf-8"))
    change(values)
    return Manifest.model_validate_json(json.dumps(values), strict=True)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_what_a_build_wrote_agrees(path: Path) -> None:
    assert manifest(path).sampler_table is not None
    require_agreement(manifest(path))


def rows(values: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = values["sampler_table"]["rows"]
    return found


def scaled(values: dict[str, Any], name: str, by: float) -> None:
    values[name] *= by


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a coefficient": (lambda v: scaled(rows(v)[0]["steps"][-1]["next"], "x", 1.00001), r"for step 0: next\.x"),
    "a column": (lambda v: scaled(rows(v)[-1], "input_scale", 1.001), r"for step \d+: input_scale"),
    "a timestep": (lambda v: scaled(rows(v)[0], "timestep", 0.999), r"for step 0: timestep"),
    "a term too many": (
        lambda v: rows(v)[0]["steps"][-1]["next"].update(first=1e-3),
        r"for step 0: next\.first",
    ),
    "a term too few": (lambda v: rows(v)[0]["steps"][-1]["next"].pop("output"), r"nothing for step 0: next\.output"),
    "a row too few": (lambda v: rows(v).pop(), r"nothing for step \d+: timestep"),
    "the first noise": (lambda v: scaled(v["sampler_table"], "init_scale", 1.01), "for init_scale"),
    "another sampler": (lambda v: scaled(v["sampler"], "beta_end", 1.01), "sampler_table has"),
    "the latents": (lambda v: scaled(v["image"], "latent_channels", 2), "input .* by `image` dimension 1 has"),
}


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_one_changed_number_is_found(path: Path, changed: str) -> None:
    change, message = CHANGES[changed]
    with pytest.raises(TurbopocketError, match=message):
        require_agreement(manifest(path, change))
