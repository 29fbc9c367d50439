# SPDX-License-Identifier: Apache-2.0
"""Recipes: what is filled in, what is refused, and that what is printed reads back the same."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from turbopocket.export.distill.recipe import DistillRecipe, load_distill_recipe
from turbopocket.export.plan import plan
from turbopocket.export.recipe import Recipe, load_recipe, make_recipe, parse_recipe
from turbopocket.export.settings import Section, shipped_recipes, with_values
from turbopocket.export.units import format_bytes, parse_bytes
from turbopocket.ground.errors import TurbopocketError


def test_printed_recipe_reads_back_the_same() -> None:
    recipe = make_recipe({"compress": {"budget": "8MB", "pin": {'unet."odd" name': "fp16"}}, "seed": 3}, "test")
    assert parse_recipe(recipe.to_toml(), "printed") == recipe


@pytest.mark.parametrize("name", shipped_recipes(Recipe))
def test_shipped_recipe_loads(name: str) -> None:
    assert isinstance(load_recipe(name), Recipe)


def test_two_bits_are_those_of_the_transformer_s_blocks() -> None:
    """Codes, scales and codebooks counted; no layer of another part has less than eight."""
    choices = plan(load_recipe("two-bits")).plan.choices
    blocks = [choice for choice in choices if choice.layer.startswith("transformer.transformer_blocks.")]
    weights = sum(prod(choice.shape) for choice in blocks)
    assert weights > 0.75 * sum(prod(choice.shape) for choice in choices)
    assert 8 * sum(choice.nbytes for choice in blocks) / weights < 2.25
    assert {choice.scheme.partition("+")[0] for choice in choices if choice not in blocks} == {"int8-row"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compress": {"budgt": "8MB"}}, r"unknown key `budgt` in \[compress\]: known are `budget`, `formats`"),
        ({"modle": {}}, "unknown key `modle`: known are `model`, `target`"),
        ({"compress": {"formats": ["int5"]}}, "`int5` is not a weight format: known are fp16"),
        ({"compress": {"pin": {"*": "int9"}}}, "`int9` is not a weight format"),
        (
            {"compress": {"formats": ["int8-row+a8"]}},
            "`a8` is no format of activations: known are a8-dyn",
        ),
        ({"compress": {"pin": {"*": "fp32+a9-static"}}}, "`a9-static` is no format of activations"),
        (
            {"compress": {"budget": "1MB", "average_bits": 5}},
            "budget = 1MB and average_bits = 5: one is enough",
        ),
        ({"compress": {"rewrites": ["bos"]}}, "bos is no rewrite, known are bos-aware, time-cache"),
        ({"compress": {"fit": "best"}}, "`best` is not a fit: known are absmax, mse, gptq"),
        ({"compress": {"budget": "8"}}, "'8' is not a number with a unit"),
        ({"target": {"name": "tflite"}}, "`tflite` is not a target: known are onnx, coreml, executorch"),
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
    with pytest.raises(TurbopocketError, match="none.toml does not exist"):
        load_recipe(tmp_path / "none.toml")


def test_override_replaces_one_value_and_none_leaves_it() -> None:
    base = make_recipe({"compress": {"budget": "8MB", "fit": "mse"}, "seed": 5}, "test")
    wanted = {"compress.budget": "7MB", "compress.fit": None, "target.coreml.deployment": "iOS17"}
    changed = with_values(base, wanted)
    assert changed.target.coreml.deployment == "iOS17"
    assert (changed.compress.budget_bytes, changed.compress.fit, changed.seed) == (7_000_000, "mse", 5)


@pytest.mark.parametrize(
    ("assigned", "section", "value"),
    [
        ("compress.budget=8MB", "compress.budget", "8MB"),
        ('compress.budget = "7MB"', "compress.budget", "7MB"),
        ("compress.sequential=true", "compress.sequential", True),
        ("finetune.iterations=400", "finetune.iterations", 400),
        ("finetune.learning_rate=1e-3", "finetune.learning_rate", 1e-3),
        ('compress.formats=["int8-row", "fp16"]', "compress.formats", ("int8-row", "fp16")),
        ('compress.pin."unet.conv_out"=fp16', "compress.pin", {"unet.conv_out": "fp16"}),
        ("target.coreml.deployment=iOS17", "target.coreml.deployment", "iOS17"),
        ("target.executorch.activations=static", "target.executorch.activations", "static"),
        ("model.source=a=b", "model.source", "a=b"),
        ("seed=3", "seed", 3),
    ],
)
def test_every_key_can_be_set_by_its_dotted_name(assigned: str, section: str, value: object) -> None:
    found: object = with_values(Recipe(), {}, [assigned])
    for part in section.split("."):
        found = getattr(found, part)
    assert found == value


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


@pytest.mark.parametrize("kind", [Recipe, DistillRecipe])
def test_no_key_is_out_of_reach(kind: type[Section]) -> None:
    """Each default, said as `KEY=VALUE` in TOML, is understood and changes nothing."""
    for key, value in leaves(kind().model_dump(mode="json")):
        if value is not None:
            written = tomli_w.dumps({"x": value}).partition("=")[2].strip().replace("\n", "") if value != {} else "{}"
            assert with_values(kind(), {}, [f"{key}={written}"]) == kind(), key


@pytest.mark.parametrize(
    ("assigned", "message"),
    [
        (["budget"], r"--set 'budget' is not KEY=VALUE"),
        (["=8MB"], r"--set '=8MB' is not KEY=VALUE"),
        (["compress.budget="], r"is not KEY=VALUE"),
        (["compress..budget=8MB"], r"is not KEY=VALUE"),
        (["compress.budgt=8MB"], r"command line: unknown key `budgt` in \[compress\]: known are `budget`, `formats`"),
        (["compres.budget=8MB"], r"unknown key `compres`: known are `model`, `target`"),
        (["compress=8MB"], r"compress = '8MB': it is a section, with `budget`, `formats`"),
        (["target.coreml=5"], r"target.coreml = 5: it is a section, with `deployment`, `max_package`"),
        (["seed.x=1"], r"seed.x is no key, since seed is a value, not a section"),
        (["target.coreml.deployment=iOS9"], r"target.coreml.deployment = 'iOS9': input should be 'iOS17', 'iOS18' or"),
        (["finetune.batch=0"], r"batch"),
        (["seed=1", "seed=2"], r"--set seed=2: seed is given more than once"),
        (["compress.fit=best"], r"command line: `best` is not a fit: known are absmax"),
    ],
)
def test_what_can_not_be_set_is_one_sentence_with_what_can(assigned: list[str], message: str) -> None:
    with pytest.raises(TurbopocketError, match=message) as refused:
        with_values(Recipe(), {}, assigned)
    assert "\n" not in str(refused.value)


def test_an_option_and_a_set_of_the_same_key_are_refused() -> None:
    with pytest.raises(TurbopocketError, match="compress.budget is given more than once"):
        with_values(Recipe(), {"compress.budget": "8MB"}, ["compress.budget=9MB"])


@pytest.mark.parametrize("name", shipped_recipes(DistillRecipe))
def test_shipped_distillation_loads(name: str) -> None:
    assert load_distill_recipe(name).teacher.guidance == 2.0


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
