# SPDX-License-Identifier: Apache-2.0
"""Candidates that round activations: what they lose, and which layers are left out."""

from dataclasses import replace

from turbopocket.export.build.candidates import exempted, narrowed, with_floats, with_schemes
from turbopocket.export.recipe import make_recipe
from turbopocket.export.targets.registry import open_target
from turbopocket.quant.plan import Candidate, LayerChoices, plan
from turbopocket.quant.scheme import parse_scheme

STATIC, DYNAMIC = "a8-static", "a8-dynamic"
SCHEMES = [parse_scheme(name) for name in ("int8-row+a8-static", "int4-row+a8-dynamic", "int8-row")]


def measured(name: str, static: float, dynamic: float) -> LayerChoices:
    weights = Candidate("int8-row", 200, 1.0), Candidate("int4-row", 100, 8.0)
    return LayerChoices(name, (10, 20), weights, {STATIC: static, DYNAMIC: dynamic})


def choices(*losses: float) -> dict[str, LayerChoices]:
    layers = {f"unet.{index}": measured(f"unet.{index}", loss, loss / 2) for index, loss in enumerate(losses)}
    return with_schemes(layers, dict.fromkeys(layers, SCHEMES))


def test_a_scheme_loses_what_its_weight_and_its_rounding_lose() -> None:
    [layer] = choices(4.0).values()
    found = {each.scheme: (each.nbytes, each.loss) for each in layer.candidates}
    assert found == {"int8-row+a8-static": (200, 5.0), "int4-row+a8-dynamic": (100, 10.0), "int8-row": (200, 1.0)}


def test_the_share_that_loses_most_keeps_floats_and_no_other() -> None:
    left = exempted(choices(1.0, 9.0, 3.0, 2.0), 0.25, {})
    floats = [name for name, each in left.items() if [c.scheme for c in each.candidates] == ["int8-row"]]
    assert floats == ["unet.1"]
    decided = plan(list(left.values()), None, 0).schemes
    assert {name for name, scheme in decided.items() if scheme.is_weight_only} == {"unet.1"}
    content = choices(1.0, 9.0, 3.0, 2.0)
    assert narrowed(content, left) == left


def test_a_pinned_layer_has_what_it_is_pinned_to() -> None:
    pins = {"unet.1": "int8-row+a8-static"}
    left = exempted(choices(1.0, 9.0, 3.0, 2.0), 0.25, pins)
    decided = plan(list(left.values()), None, 0, pins).schemes
    assert [name for name, scheme in decided.items() if scheme.is_weight_only] == ["unet.2"]
    assert str(decided["unet.1"]) == "int8-row+a8-static"


def test_a_format_that_is_never_rounded_stays_a_candidate() -> None:
    wide = Candidate("fp16", 400, 0.0)
    layers = {name: replace(each, candidates=(*each.candidates, wide)) for name, each in choices(1.0, 9.0).items()}
    for each in exempted(layers, 0.5, {}).values():
        assert wide in each.candidates


def test_without_a_share_nothing_is_decided_about_it() -> None:
    assert exempted(choices(1.0, 9.0), 0.0, {}) == choices(1.0, 9.0)


def test_of_a_share_of_no_layer_all_that_can_round_do() -> None:
    assert all("+" in c.scheme for each in exempted(choices(1.0, 9.0), 0.01, {}).values() for c in each.candidates)


def test_layers_that_have_no_choice_stay_as_they_are() -> None:
    only = {"unet.0": LayerChoices("unet.0", (10, 20), (Candidate("fp16", 400, 0.0),))}
    assert exempted(only, 0.5, {}) == only


def test_floats_are_candidates_where_the_target_runs_them() -> None:
    shapes = {"unet.linear": (32, 64)}
    asked = {"unet.linear": [parse_scheme("int8-row+a8-static")]}
    executorch = open_target(make_recipe({"target": {"name": "executorch"}}, "a test").target)
    assert with_floats(executorch, shapes, asked) == asked  # it rounds inputs to every integer weight
    onnx = open_target(make_recipe({}, "a test").target)
    assert [str(each) for each in with_floats(onnx, shapes, asked)["unet.linear"]] == ["int8-row+a8-static", "int8-row"]
