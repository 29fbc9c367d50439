# SPDX-License-Identifier: Apache-2.0
"""Mixtures of candidates: which entries they are of, how they start, and what is left when they are hardened."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.candidates import FROZEN_RATIO, SoftWeight, has_candidates
from turbopocket.quant.fit import MSE
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.options import CandidateOptions

FORMATS = ["vq4-d4", "vq3-d2", "vq4-d2-out", "vq3-d4-r8", "avq2x3-d4", "avq2x8-d8-shared"]
SHAPES = [(16, 32), (16, 16, 3, 3)]


def weight_of(shape: tuple[int, ...]) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return weight * torch.linspace(0.5, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


def stored(text: str, shape: tuple[int, ...] = (16, 32)) -> tuple[Tensor, CompressedTensor]:
    weight = weight_of(shape)
    return weight, parse_format(text).compress(weight, MSE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("count", [1, 3])
def test_hardened_at_once_it_is_what_was_stored(text: str, shape: tuple[int, ...], count: int) -> None:
    """The first candidate is the stored code, so with its logit the largest nothing changes, not by a bit."""
    weight, compressed = stored(text, shape)
    soft = SoftWeight(weight, compressed, count, "equal")
    for logits in soft.logits:
        logits.data[0] = 1.0
    soft.harden()
    assert soft.is_hard
    again = soft.compressed()
    assert again.parts.keys() == compressed.parts.keys()
    assert all(torch.equal(again.parts[name], compressed.parts[name]) for name in compressed.parts)
    decoded = compressed.format.decompress(compressed)
    torch.testing.assert_close(soft().detach(), decoded, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("text", FORMATS)
def test_what_is_exported_is_what_ran_hard(text: str) -> None:
    weight, compressed = stored(text)
    soft = SoftWeight(weight, compressed, 3, "distance")
    random = torch.Generator().manual_seed(0)
    for parameter in (*soft.logits, *soft.values):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    for logits in soft.logits:
        logits.data = torch.randn(logits.shape, generator=random)
    soft.harden()
    exported = soft.compressed()
    changed = exported.parts["codes"] != compressed.parts["codes"]
    assert changed.any()
    decoded = exported.format.decompress(exported)
    # Of what ran, codebooks and scales have been rounded to fp16.
    torch.testing.assert_close(soft().detach(), decoded, atol=5e-3, rtol=2e-3)
    assert exported.nbytes == compressed.nbytes


def test_candidates_are_the_nearest_entries_and_the_mixture_is_their_sum() -> None:
    weight, compressed = stored("vq4-d4")
    soft = SoftWeight(weight, compressed, 3, "equal")
    (codes,) = compressed.format.vector_codes(compressed)
    (plane,) = soft.planes
    points = weight.reshape(-1, 4)
    scales = codes.scale_O.float().repeat_interleave(8).unsqueeze(1)
    distances = torch.cdist(points.unsqueeze(1), scales.unsqueeze(1) * codes.codebook_GPD[0].float()).squeeze(1)
    stored_code = codes.codes_RC.flatten().long()
    assert torch.equal(plane.candidates_nGN[0, 0], stored_code)
    others = distances.scatter(1, stored_code.unsqueeze(1), torch.inf).topk(2, largest=False).indices
    assert torch.equal(plane.candidates_nGN[1:, 0].T, others)
    mixed = scales * codes.codebook_GPD[0].float()[plane.candidates_nGN[:, 0]].mean(0)
    torch.testing.assert_close(soft().detach().reshape(-1, 4), mixed, atol=1e-6, rtol=1e-5)


def test_candidates_of_a_sum_fit_what_the_other_codebooks_leave() -> None:
    weight, compressed = stored("avq2x3-d4")
    soft = SoftWeight(weight, compressed, 2, "equal")
    first, second = compressed.format.vector_codes(compressed)
    scales = first.scale_O.float().repeat_interleave(8).unsqueeze(1)
    left = weight.reshape(-1, 4) - scales * second.codebook_GPD[0].float()[second.codes_RC.flatten().long()]
    distances = torch.cdist(left.unsqueeze(1), scales.unsqueeze(1) * first.codebook_GPD[0].float()).squeeze(1)
    stored_code = first.codes_RC.flatten().long().unsqueeze(1)
    nearest_other = distances.scatter(1, stored_code, torch.inf).argmin(1)
    assert torch.equal(soft.planes[0].candidates_nGN[1, 0], nearest_other)


def test_ratios_start_equal_or_by_distance() -> None:
    weight, compressed = stored("vq4-d4")
    equal = SoftWeight(weight, compressed, 3, "equal").planes[0].ratios()
    assert torch.allclose(equal, torch.full_like(equal, 1 / 3))
    plane = SoftWeight(weight, compressed, 3, "distance").planes[0]
    ratios = plane.ratios()
    # k-means stores the nearest entry, and candidates come in order of distance.
    assert (ratios[0] >= ratios[1]).float().mean() > 0.99
    assert (ratios[1] >= ratios[2]).all()
    torch.testing.assert_close(ratios.sum(0), torch.ones(ratios.shape[1:]))


@pytest.mark.parametrize("text", ["vq4-d4", "vq3-d4-r8", "avq2x3-d4"])
def test_gradients_are_those_of_the_sum_as_it_is_written(text: str) -> None:
    weight, compressed = stored(text)
    soft = SoftWeight(weight, compressed, 3, "distance")
    given = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    soft().backward(given)  # type: ignore[no-untyped-call]
    found = [(each.logits.grad, each.codebook.parameter.grad) for each in soft.planes if each.logits is not None]
    written = []
    for plane in soft.planes:
        books, ratios = plane.codebook(), torch.softmax(plane.logits, 0)  # type: ignore[arg-type]
        rows = [
            (ratios[:, group].unsqueeze(-1) * book[plane.candidates_nGN[:, group]]).sum(0)
            for group, book in enumerate(books)
        ]
        written.append(torch.cat(rows).reshape(weight.shape))
    again = (torch.stack(written).sum(0) * soft.scale().unsqueeze(1) * given).sum()
    leaves = [leaf for plane in soft.planes for leaf in (plane.logits, plane.codebook.parameter)]
    wanted = torch.autograd.grad(again, leaves)  # type: ignore[arg-type]
    for one, other in zip([each for pair in found for each in pair], wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_what_is_frozen_has_no_gradient_and_one_candidate() -> None:
    weight, compressed = stored("vq4-d4")
    soft = SoftWeight(weight, compressed, 2, "equal")
    (logits,) = soft.logits
    logits.data[1, 0, :10] = 5.0
    assert soft.freeze() == pytest.approx(10 / logits.shape[2])
    ratios = soft.planes[0].ratios()
    assert ratios[1, 0, :10].eq(1).all()
    assert ratios[:, 0, 10:].lt(FROZEN_RATIO).all()
    soft().square().sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[:, 0, :10].eq(0).all()
    assert logits.grad[:, 0, 10:].abs().sum() > 0


@torch.no_grad()
def test_indecision_is_none_at_zero_and_one() -> None:
    weight, compressed = stored("vq4-d4")
    soft = SoftWeight(weight, compressed, 2, "equal")
    assert float(soft.indecision("joint")) == pytest.approx(1.0)
    assert float(soft.indecision("freeze")) == pytest.approx(0.5)
    soft.logits[0].data[1] = 50.0
    assert float(soft.indecision("joint")) == pytest.approx(0.0, abs=1e-6)
    assert float(soft.indecision("freeze")) == pytest.approx(0.0, abs=1e-6)


def test_shared_codebooks_are_not_a_layer_s_to_train() -> None:
    weight, compressed = stored("avq2x8-d8-shared")
    soft = SoftWeight(weight, compressed, 2, "equal")
    assert [each.shape for each in soft.values] == [(16,)]
    assert not has_candidates(parse_format("int4-g32").compress(weight, MSE))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"count": 5}, "count = 5: allowed are 0 to 4"),
        ({"iterations": 0}, "iterations = 0: allowed are 1 to"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0: more than 0"),
        ({"ratio_weight": float("nan")}, "ratio_weight = nan: 0 or more"),
    ],
)
def test_impossible_options_are_refused(values: dict[str, float], told: str) -> None:
    with pytest.raises(TurbopocketError, match=told):
        replace(CandidateOptions(), **values)  # type: ignore[arg-type]
