# SPDX-License-Identifier: Apache-2.0
"""A budget shared between layers of content and layers of quality."""

import pytest

from turbopocket.ground.errors import OverBudget, TurbopocketError
from turbopocket.quant.plan import Candidate, LayerChoices, plan
from turbopocket.quant.split import SHARES, content_of, different, split_plan

FIXED = 100


def layer(name: str, *losses: float) -> LayerChoices:
    """A layer of 10, 20, 40 bytes in int2, int4, int8, which lose so much."""
    sizes = {"lut2": 10, "int4-row": 20, "int8-row": 40}
    options = zip(sizes.items(), losses, strict=True)
    return LayerChoices(name, (2, 4), tuple(Candidate(scheme, size, loss) for (scheme, size), loss in options))


LAYERS = [layer(f"unet.{name}", 9.0, 3.0, 1.0) for name in ("a.ff.0", "b.ff.0", "c.conv", "d.conv")]
CONTENT = {"unet.a.ff.0": layer("unet.a.ff.0", 1e3, 1.0, 0.5), "unet.b.ff.0": layer("unet.b.ff.0", 2.0, 1.0, 0.5)}


def schemes(share: float, budget: int = FIXED + 80) -> list[str]:
    found = split_plan(LAYERS, CONTENT, share, budget, FIXED)
    assert found.total_bytes <= budget
    assert found.predicted_loss == sum(
        next(c.loss for c in each.candidates if c.scheme == choice.scheme)
        for each, choice in zip(LAYERS, found.choices, strict=True)
    )
    return [choice.scheme for choice in found.choices]


def test_each_kind_gets_its_share_of_what_is_left() -> None:
    assert schemes(0.0)[:2] == schemes(1.0)[2:] == ["lut2", "lut2"]
    assert sorted(schemes(0.0)[2:]) == sorted(schemes(1.0)[:2]) == ["int4-row", "int8-row"]


def test_content_layers_are_chosen_by_their_own_losses() -> None:
    # one step of ten bytes for the two content layers: by quality either will do, by content only the first
    found = split_plan(LAYERS, CONTENT, 0.5, FIXED + 60, FIXED)
    assert [choice.scheme for choice in found.choices][:2] == ["int4-row", "lut2"]
    worse = {"unet.a.ff.0": CONTENT["unet.b.ff.0"], "unet.b.ff.0": CONTENT["unet.a.ff.0"]}
    swapped = {name: LayerChoices(name, each.shape, each.candidates) for name, each in worse.items()}
    found = split_plan(LAYERS, swapped, 0.5, FIXED + 60, FIXED)
    assert [choice.scheme for choice in found.choices][:2] == ["lut2", "int4-row"]


def test_bytes_that_one_kind_can_not_use_go_to_the_other() -> None:
    everything = plan(LAYERS, None, FIXED).total_bytes
    for share in SHARES:
        assert schemes(share, everything) == ["int8-row"] * 4


def test_equal_plans_are_one() -> None:
    plans = [split_plan(LAYERS, CONTENT, share, FIXED + 60, FIXED) for share in SHARES]
    assert 1 < len(different(plans)) < len(plans)
    assert different(plans)[0] == plans[0]


def test_a_budget_below_the_smallest_plan_is_refused() -> None:
    with pytest.raises(OverBudget, match="smallest plan is 140 bytes"):
        split_plan(LAYERS, CONTENT, 0.5, FIXED + 39, FIXED)


def test_what_names_no_layer_is_refused() -> None:
    assert content_of([each.layer for each in LAYERS], ["*.ff.*"]) == set(CONTENT)
    with pytest.raises(TurbopocketError, match=r"content '\*.attn2.\*' matches no layer"):
        content_of([each.layer for each in LAYERS], ["*.attn2.*"])
    with pytest.raises(TurbopocketError, match="unet.x is not among the layers"):
        split_plan(LAYERS, {"unet.x": LAYERS[0]}, 0.5, FIXED + 60, FIXED)
