# SPDX-License-Identifier: Apache-2.0
"""Which formats each layer may have, and what is said when none is left."""

import pytest

from turbopocket.export.budget import candidate_formats, plan_source
from turbopocket.export.recipe import make_recipe
from turbopocket.export.target_onnx import Onnx
from turbopocket.runtimes.errors import TurbopocketError

SHAPES = {"unet.conv_in": (64, 4, 3, 3), "unet.mid.to_q": (64, 64), "unet.mid.to_k": (64, 96)}


def test_pin_widens_only_the_layers_it_matches() -> None:
    found = candidate_formats(Onnx(), SHAPES, ["int8-g32"], {"unet.conv_*": "fp16"})
    assert {name: [str(each) for each in formats] for name, formats in found.items()} == {
        "unet.conv_in": ["fp16"],
        "unet.mid.to_q": ["int8-g32"],
        "unet.mid.to_k": ["int8-g32"],
    }


def test_layer_without_any_format_is_named_with_every_reason() -> None:
    with pytest.raises(TurbopocketError, match=r"unet.conv_in: no format left .*multiple of .*32"):
        candidate_formats(Onnx(), SHAPES, ["int8-g32"], {})


def test_parts_of_a_plan_and_its_fixed_bytes_are_its_total() -> None:
    recipe = make_recipe({"compress": {"formats": ["int4-g32", "fp16"], "pin": {"unet.conv_in": "fp16"}}}, "test")
    summary = plan_source(recipe, None)
    assert summary["fixed_bytes"] + sum(summary["parts"].values()) == summary["total_bytes"]
    weights = sum(entry["weights"] for entry in summary["formats"].values())
    assert summary["average_bits"] == pytest.approx(8 * sum(summary["parts"].values()) / weights)
    assert "unet.conv_in" in summary["kept"]
