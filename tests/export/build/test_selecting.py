# SPDX-License-Identifier: Apache-2.0
"""Builds whose layers of content have a metric of their own, and builds to a number of bits."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.build.build import build
from turbopocket.export.plan import plan
from turbopocket.export.recipe import make_recipe
from turbopocket.ground.errors import TurbopocketError

VALUES: dict[str, Any] = {
    "compress": {
        "formats": ["int8-row", "int4-row", "fp16"],
        "fit": "absmax",
        "average_bits": 6.0,
        "content": ["unet.*.ff.*", "unet.*.attn2.*"],
    },
    "sampler": {"steps": 2, "guidance": 0.0},
    "calibrate": {"pictures": 1},
    "parity": {"pictures": 1},
}


def test_of_several_divisions_the_best_drawn_is_taken(tiny_sd: Path, tmp_path: Path) -> None:
    values = {**VALUES, "model": {"source": str(tiny_sd)}}
    built = build(make_recipe(values, "a test"), tmp_path / "art", keep=True)
    assert built.gaps.failure is None
    [folder] = (tmp_path / "art.run").glob("select-*")
    scores = json.loads((folder / "scores.json").read_text())
    plans = json.loads((folder / "key.json").read_text())["plans"]
    assert len(plans) == len(scores) > 1
    assert {choice.layer: choice.scheme for choice in built.plan.choices} == plans[scores.index(min(scores))]
    [measured] = (tmp_path / "art.run").glob("measure-*")
    content = json.loads((measured / "content.json").read_text())["layers"]
    assert {".ff." in each["layer"] or ".attn2." in each["layer"] for each in content} == {True}


def test_average_bits_are_those_of_the_layers(tiny_sd: Path, tmp_path: Path) -> None:
    values = {**VALUES, "model": {"source": str(tiny_sd)}}
    values["compress"] = {**VALUES["compress"], "content": []}
    decided = build(make_recipe(values, "a test"), tmp_path / "art", keep=False).plan
    bits = 8 * sum(each.nbytes for each in decided.choices) / sum(math.prod(each.shape) for each in decided.choices)
    assert 5.9 < bits <= 6.0
    assert decided.budget_bytes is None
    assert 5.8 < plan(make_recipe(values, "a test")).average_bits <= 6.0


def test_content_that_names_no_layer_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    values = {**VALUES, "model": {"source": str(tiny_sd)}}
    values["compress"] = values["compress"] | {"content": ["*.attn3.*"]}
    with pytest.raises(TurbopocketError, match=r"content '\*.attn3.\*' matches no layer"):
        build(make_recipe(values, "a test"), tmp_path / "art")


def test_the_layers_whose_rounding_loses_most_keep_floats(tiny_sd: Path, tmp_path: Path) -> None:
    values = {**VALUES, "model": {"source": str(tiny_sd)}}
    formats = ["int8-row+a8-static", "int8-row+a8-static+float", "fp16"]
    values["compress"] = {"formats": formats, "fit": "absmax", "exempt": 0.1, "rewrites": ["bos-aware"]}
    values["compress"] |= {"average_bits": 8.5}
    built = build(make_recipe(values, "a test"), tmp_path / "art", keep=False)
    assert built.gaps.failure is None
    schemes = built.plan.schemes
    floats = {name for name, each in schemes.items() if str(each) == "int8-row"}
    assert 0 < len(floats) <= round(0.1 * len(schemes))
    rounded = {str(each) for each in schemes.values() if each.is_static}
    assert rounded == {"int8-row+a8-static", "int8-row+a8-static+float"}
    losses = {each["layer"]: each for each in json.loads((built.report.parent / "choices.json").read_text())["layers"]}
    worst_rounded = max(min(losses[name]["roundings"].values()) for name, each in schemes.items() if each.is_static)
    assert all(min(losses[name]["roundings"].values()) >= worst_rounded for name in floats)
