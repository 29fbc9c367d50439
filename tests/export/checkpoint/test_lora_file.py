# SPDX-License-Identifier: Apache-2.0
"""FILE or FILE:STRENGTH, on the command line and in recipes: what is understood, refused, and kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from turbopocket.export.checkpoint.lora.file import LoraFile
from turbopocket.export.recipe import Recipe, load_recipe, make_recipe, parse_recipe
from turbopocket.export.settings import with_values
from turbopocket.ground.errors import TurbopocketError


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-.5", "style.safetensors", -0.5),
        ("style.safetensors:1e-1", "style.safetensors", 0.1),
        ("style.safetensors:0", "style.safetensors", 0.0),
        ("C:/mine/style.safetensors", "C:/mine/style.safetensors", 1.0),
        ("a:b/style v1:2.safetensors:0.5", "a:b/style v1:2.safetensors", 0.5),
        ("a:2:1", "a:2", 1.0),
        ("größe:0.5", "größe", 0.5),
        ("folder:nan", "folder:nan", 1.0),
    ],
)
def test_last_colon_parts_a_strength_only_where_a_number_follows(text: str, file: str, strength: float) -> None:
    asked = LoraFile.parse(text)
    assert asked == LoraFile(Path(file), strength)
    assert LoraFile.parse(str(asked)) == asked


@pytest.mark.parametrize("strength", ["abc", "nan", "inf", "-inf", "1e999", "", "0.8.1", "1_0", "0,8", " 1", "٣"])
def test_strength_that_is_no_finite_number_is_refused(strength: str) -> None:
    with pytest.raises(TurbopocketError, match="asks for strength .*; allowed: a finite number, like 0.8"):
        LoraFile.parse(f"style.safetensors:{strength}")


@pytest.mark.parametrize("value", ["", ":0.8", "a\0b.safetensors", 5, None, ["style.safetensors"]])
def test_text_that_names_no_file_is_refused(value: object) -> None:
    with pytest.raises(TurbopocketError, match="; allowed: .*FILE or FILE:STRENGTH$"):
        make_recipe({"model": {"lora": [value]}}, "recipe.toml")


def test_recipe_keeps_strengths_when_it_is_printed_and_overridden() -> None:
    recipe = parse_recipe('[model]\nlora = ["a.safetensors:0.30000000000000004", "b.safetensors"]\n', "test")
    assert recipe.model.lora == (LoraFile(Path("a.safetensors"), 0.1 + 0.2), LoraFile(Path("b.safetensors")))
    assert parse_recipe(recipe.to_toml(), "printed") == recipe
    assert with_values(recipe, {"seed": 3}).model == recipe.model
    assert with_values(Recipe(), {"model.lora": ["c.safetensors:2"]}).model.lora[0].strength == 2


def test_build_says_how_to_give_a_strength(turbopocket: Callable[..., Any]) -> None:
    assert "FILE:0.8" in turbopocket("build", "--help").out


def test_build_refuses_a_bad_strength_before_anything_else(turbopocket: Callable[..., Any], tmp_path: Path) -> None:
    ran = turbopocket("build", "--lora", "style.safetensors:abc", "--out", tmp_path / "out")
    assert ran.code == 1
    assert "error: command line: LoRA 'style.safetensors:abc' asks for strength 'abc'" in ran.err


def test_check_merges_at_the_strength_of_the_build(
    turbopocket: Callable[..., Any], tiny_sd: Path, tmp_path: Path
) -> None:
    """Its LoRA gives a bias to a layer that had none, which `check` takes from the model that it loads again."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4), "lora_B.bias": (32,)}
    tensors = {f"{layer}.{part}": torch.ones(shape) for part, shape in factors.items()}
    save_file(tensors, tmp_path / "style:v1.safetensors")
    (tmp_path / "quick.toml").write_text(
        "[calibrate]\npictures = 1\n[parity]\npictures = 1\n[compress]\nformats = ['fp16']\nfit = 'absmax'\n"
    )
    lora = f"{tmp_path / 'style:v1.safetensors'}:0.5"
    request = ("--recipe", tmp_path / "quick.toml", "--steps", 1, "--lora", lora, "--out", tmp_path / "art")
    built = turbopocket("build", tiny_sd, *request, "--json")
    assert built.code == 0, built.err
    manifest = json.loads((tmp_path / "art" / "manifest.json").read_text())
    assert parse_recipe(manifest["recipe"], "manifest").model.lora == (LoraFile.parse("style:v1.safetensors:0.5"),)
    assert load_recipe(tmp_path / "art.report" / "recipe.toml").model.lora == (LoraFile.parse(lora),)
    assert turbopocket("check", tmp_path / "art", "--json").code == 0
    save_file({**tensors, f"{layer}.lora_B.bias": torch.full((32,), 9.0)}, tmp_path / "style:v1.safetensors")
    other = turbopocket("check", tmp_path / "art", "--json")
    assert other.code == 1, other.err + other.out
    assert "is not the model that" in other.err
