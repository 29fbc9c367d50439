# SPDX-License-Identifier: Apache-2.0
"""Plans whose files fit: what lies beside the layers' weights depends on the formats that are chosen."""

from collections.abc import Callable, Mapping

import pytest

from turbopocket.export.build.manifest import require_budget
from turbopocket.export.build.planning import best_fitting
from turbopocket.export.target_options import OnnxOptions
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.ground.errors import OverBudget
from turbopocket.quant.plan import Candidate, LayerChoices
from turbopocket.quant.scheme import Scheme

SMALL, LARGE = Candidate("int4-row", 100, 8.0), Candidate("int8-row", 200, 1.0)
LAYERS = [LayerChoices(f"unet.{index}", (10, 20), (SMALL, LARGE)) for index in range(4)]
Schemes = Mapping[str, Scheme]


def bytes_beside(of_small: int, of_large: int, once: int = 0) -> Callable[[Schemes], int]:
    """Counts files in which every layer costs that much beside its weights, and small ones share `once`."""

    def count(schemes: Schemes) -> int:
        small = sum(str(each) == SMALL.scheme for each in schemes.values())
        large = len(schemes) - small
        return small * (SMALL.nbytes + of_small) + large * (LARGE.nbytes + of_large) + once * bool(small)

    return count


def test_all_that_the_files_have_is_counted() -> None:
    found = best_fitting(LAYERS, None, {}, 10**6, bytes_beside(5, 7))
    assert (found.fixed_bytes, found.total_bytes) == (4 * 7, 4 * 207)


def test_a_pass_uses_what_the_last_choice_left_free() -> None:
    """Counted at most, only the smallest plan fits; its files leave room for more."""
    found = best_fitting(LAYERS, 700, {}, 300, bytes_beside(0, 0))
    assert found.total_bytes == 700
    assert found.fixed_bytes == 0


def test_what_is_counted_at_most_refuses_nothing_that_fits() -> None:
    found = best_fitting(LAYERS, 400, {}, 10**6, bytes_beside(0, 0))
    assert (found.total_bytes, found.budget_bytes) == (400, 400)


def test_costs_that_come_with_the_small_format_are_seen_before_the_budget_is_spent() -> None:
    """Codebooks that all small layers share: no pass's own count is right for the formats that it then takes."""
    found = best_fitting(LAYERS, 750, {}, 0, bytes_beside(0, 0, once=100))
    assert found.total_bytes <= 750
    assert found.fixed_bytes == 100


@pytest.mark.parametrize("budget", [400, 420, 499])
def test_no_plan_that_fits_is_one_sentence_with_the_smallest(budget: int) -> None:
    """Once an empty list of plans, and a traceback."""
    with pytest.raises(OverBudget) as raised:
        best_fitting(LAYERS, budget, {}, 0, bytes_beside(0, 40, once=100))
    assert str(raised.value) == (
        "smallest plan is 500 bytes (100 of them not in compressible layers), "
        f"{500 - budget} over the budget of {budget} bytes"
    )
    assert best_fitting(LAYERS, 500, {}, 0, bytes_beside(0, 40, once=100)).total_bytes == 500


def test_files_larger_than_the_budget_are_refused_with_what_the_target_knows() -> None:
    decided = best_fitting(LAYERS, 700, {}, 300, bytes_beside(0, 0))
    require_budget(700, decided, None)
    for prepacked, hint in ((False, None), (True, "prepacked weights are not in the plan")):
        with pytest.raises(OverBudget, match="came to 701 bytes, 1 over the budget of 700 bytes") as raised:
            require_budget(701, decided, Onnx(OnnxOptions(prepacked=prepacked)).not_in_plan)
        assert (raised.value.hint or "").startswith(hint or "")
        assert (raised.value.hint is None) == (hint is None)
