# SPDX-License-Identifier: Apache-2.0
"""Recipes: what is filled in, what is refused, and that what is printed reads back the same."""

from pathlib import Path

import pytest

from turbopocket.export.recipe import Recipe, load_recipe, make_recipe, parse_recipe, shipped_recipes, with_overrides
from turbopocket.export.units import format_bytes, parse_bytes
from turbopocket.ground.errors import TurbopocketError


def test_printed_recipe_reads_back_the_same() -> None:
    recipe = make_recipe({"compress": {"budget": "8MB", "pin": {'unet."odd" name': "fp16"}}, "seed": 3}, "test")
    assert parse_recipe(recipe.to_toml(), "printed") == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_loads(name: str) -> None:
    assert isinstance(load_recipe(name), Recipe)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compress": {"budgt": "8MB"}}, r"unknown key `budgt` in \[compress\]: known are `budget`, `formats`"),
        ({"modle": {}}, "unknown key `modle`: known are `model`, `target`"),
        ({"compress": {"formats": ["int5"]}}, "`int5` is not a weight format: known are fp16"),
        ({"compress": {"pin": {"*": "int9"}}}, "`int9` is not a weight format"),
        ({"compress": {"fit": "best"}}, "`best` is not a fit: known are absmax, mse, gptq"),
        ({"compress": {"budget": "8"}}, "'8' is not a number with a unit"),
        ({"target": {"name": "tflite"}}, "target.name = 'tflite'.*'onnx'"),
        ({"sampler": {"steps": 0}}, "sampler.steps = 0: .*greater than or equal to 1"),
        ({"parity": {"max_lowering_error": "small"}}, "parity.max_lowering_error = 'small'"),
    ],
)
def test_wrong_recipe_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(TurbopocketError, match=message):
        make_recipe(values, "recipe.toml")


def test_missing_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(TurbopocketError, match="neither a .toml file nor a shipped recipe; shipped are .*demo"):
        load_recipe("nonesuch")


def test_unreadable_recipes_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(TurbopocketError, match="broken.toml is not TOML"):
        load_recipe(broken)
    with pytest.raises(TurbopocketError, match="none.toml can not be read: No such file"):
        load_recipe(tmp_path / "none.toml")


def test_override_replaces_one_value_and_none_leaves_it() -> None:
    base = make_recipe({"compress": {"budget": "8MB", "fit": "mse"}, "seed": 5}, "test")
    wanted = {"compress.budget": "7MB", "compress.fit": None, "target.coreml.deployment": "iOS17"}
    changed = with_overrides(base, wanted)
    assert changed.target.coreml.deployment == "iOS17"
    assert (changed.compress.budget_bytes, changed.compress.fit, changed.seed) == (7_000_000, "mse", 5)


@pytest.mark.parametrize(
    ("text", "count"), [("8MB", 8_000_000), ("1.3 GB", 1_300_000_000), ("512kib", 524_288), ("12B", 12)]
)
def test_budget_units_are_decimal_unless_binary(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "8", "MB", "8 Mo", "-3MB", "1e3MB", "0MB"])
def test_bad_budget_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(TurbopocketError, match=f"budget {text!r}"):
        parse_bytes(text)


def test_byte_counts_are_printed_in_decimal_units() -> None:
    assert [format_bytes(count) for count in (999, 1_500, 8_000_000, 5_132_000_000)] == [
        "999 B",
        "1.50 kB",
        "8.00 MB",
        "5.132 GB",
    ]
