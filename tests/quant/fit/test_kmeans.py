# SPDX-License-Identifier: Apache-2.0
"""Tables and codebooks against known optima, brute force and the formats they replace."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.fit import MSE
from turbopocket.quant.fit.kmeans import (
    MOST_COMPARED,
    SEEDS_PER_ENTRY,
    nearest_values,
    nearest_vectors,
    value_kmeans,
    vector_kmeans,
)
from turbopocket.quant.formats import LayerFormat, matrix_view, parse_format

# Mean squared error of the best 2^bits values for a standard normal variable: Max (1960), table I.
NORMAL_OPTIMUM = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def normal_values(count: int) -> Tensor:
    """[1, count] that are spread exactly like a standard normal variable."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (2**0.5 * torch.erfinv(2 * share - 1)).to(torch.float32).unsqueeze(0)


def value_loss(values_GN: Tensor, importance_K: Tensor | None, table_GP: Tensor) -> float:
    chosen_GN = table_GP.gather(1, nearest_values(values_GN, table_GP).to(torch.int64))
    error_GN = (chosen_GN - values_GN).square().to(torch.float64)
    if importance_K is not None:
        error_GN = error_GN.reshape(-1, len(importance_K)) * importance_K
    return float(error_GN.sum())


def vector_loss(points_GND: Tensor, importance_GND: Tensor, codebook_GPD: Tensor) -> float:
    codes_GN = nearest_vectors(points_GND, importance_GND, codebook_GPD).to(torch.int64)
    chosen_GND = torch.stack([codebook[codes] for codebook, codes in zip(codebook_GPD, codes_GN, strict=True)])
    return float((importance_GND * (chosen_GND - points_GND).square()).sum(dtype=torch.float64))


def weighted_error(format: LayerFormat, weight: Tensor, hessian_KK: Tensor | None, measure_K: Tensor) -> float:
    """Σ measure * error² when the format is fitted with that Hessian."""
    error = format.decompress(format.compress(weight, MSE, hessian_KK)) - weight
    return float((matrix_view(error).square() * measure_K).sum(dtype=torch.float64))


@pytest.mark.parametrize(("bits", "optimum"), NORMAL_OPTIMUM.items())
def test_values_of_a_normal_variable_reach_the_known_optimum(bits: int, optimum: float) -> None:
    values_GN = normal_values(100_000)
    assert value_loss(values_GN, None, value_kmeans(values_GN, None, 2**bits)) / 100_000 < 1.003 * optimum


def test_sixty_four_values_of_a_normal_variable_are_near_the_best_density() -> None:
    values_GN = normal_values(100_000)
    # Panter and Dite: π √3 / 2 / P² for a normal variable, which the best table undercuts slightly.
    assert value_loss(values_GN, None, value_kmeans(values_GN, None, 64)) / 100_000 < 1.02 * 2.7207 / 64**2


def best_loss(values: list[float], entries: int) -> float:
    """Least squared error of any table, by trying all ways to cut the sorted values (dynamic programming)."""
    values = sorted(values)
    cost = [[0.0] * (len(values) + 1) for _ in values]
    for first in range(len(values)):
        for last in range(first + 1, len(values) + 1):
            run = torch.tensor(values[first:last], dtype=torch.float64)
            cost[first][last] = float((run - run.mean()).square().sum())
    best = [0.0] + [float("inf")] * len(values)
    for _ in range(entries):
        best = [
            min(best[last], *(best[first] + cost[first][last] for first in range(last)), float("inf"))
            for last in range(len(values) + 1)
        ]
    return best[-1]


def test_few_values_come_near_the_best_of_all_tables() -> None:
    samples_GN = torch.randn(12, 50) ** 3
    found = [value_loss(values, None, value_kmeans(values, None, 4)) for values in samples_GN.split(1)]
    best = [best_loss(values.tolist(), 4) for values in samples_GN]
    assert all(loss >= 0.9999 * least for loss, least in zip(found, best, strict=True))
    assert sum(loss / least for loss, least in zip(found, best, strict=True)) / len(best) < 1.01


@pytest.mark.parametrize("weighted", [False, True])
def test_no_round_of_values_raises_the_loss(weighted: bool) -> None:
    values_GN = torch.randn(3, 480) ** 3
    values_GN[1, 5:] = 0.25  # fewer values than entries
    importance_K = torch.rand(48) + 0.01 if weighted else None
    tables = [value_kmeans(values_GN, importance_K, 16, rounds) for rounds in range(12)]
    losses = [value_loss(values_GN, importance_K, table_GP) for table_GP in tables]
    assert all(after <= before * 1.00001 for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


def test_no_round_of_vectors_raises_the_loss() -> None:
    points_GND, importance_GND = torch.randn(2, 1000, 4) ** 3, torch.rand(2, 1000, 4) + 0.01
    books = [vector_kmeans(points_GND, importance_GND, 16, rounds) for rounds in range(8)]
    losses = [vector_loss(points_GND, importance_GND, codebook_GPD) for codebook_GPD in books]
    assert all(after <= before * 1.00001 for before, after in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("entries", [2, 16, MOST_COMPARED + 1, 2 * MOST_COMPARED + 2, 256])
def test_nearest_value_is_the_nearest(entries: int) -> None:
    values_GN, table_GP = torch.randn(3, 200), torch.randn(3, entries).sort(dim=1).values
    distance_GNP = (values_GN.unsqueeze(2) - table_GP.unsqueeze(1)).abs()
    chosen_GN = nearest_values(values_GN, table_GP).to(torch.int64)
    torch.testing.assert_close(distance_GNP.gather(2, chosen_GN.unsqueeze(2)).squeeze(2), distance_GNP.amin(2))


def test_nearest_vector_counts_every_coordinate_by_its_importance() -> None:
    points_GND, importance_GND, codebook_GPD = torch.randn(2, 300, 4), torch.rand(2, 300, 4), torch.randn(2, 8, 4)
    away_GNPD = points_GND.unsqueeze(2) - codebook_GPD.unsqueeze(1)
    distance_GNP = (importance_GND.unsqueeze(2) * away_GNPD.square()).sum(-1)
    assert torch.equal(
        nearest_vectors(points_GND, importance_GND, codebook_GPD).to(torch.int64), distance_GNP.argmin(2)
    )


def test_importance_three_is_the_same_as_the_column_three_times() -> None:
    weight_OK = torch.randn(40, 6)
    weighted = value_kmeans(weight_OK.reshape(1, -1), torch.tensor([1.0, 1, 1, 3, 1, 1]), 8)
    repeated = value_kmeans(weight_OK[:, [0, 1, 2, 3, 3, 3, 4, 5]].reshape(1, -1), None, 8)
    torch.testing.assert_close(weighted, repeated)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("rare", [False, True])
def test_as_many_values_as_entries_are_found_exactly(bits: int, rare: bool) -> None:
    legal = (torch.randperm(2000)[: 2**bits] - 1000) / 16.0
    codes = torch.cat([torch.arange(2**bits), torch.randint(0, 2**bits, (4096 - 2**bits,))])
    if rare:  # every value but one occurs once among thousands
        codes[2**bits :] = 0
    weight = legal[codes[torch.randperm(4096)]].reshape(32, 128)
    stored = parse_format(f"lut{bits}")
    assert torch.equal(stored.decompress(stored.compress(weight, MSE)), weight)


def test_many_entries_without_values_are_placed_in_one_round() -> None:
    legal = torch.cat([torch.arange(15) / 1024, torch.tensor([1000.0])])
    table_GP = value_kmeans(legal.repeat(1, 50), None, 16, rounds=4)
    torch.testing.assert_close(table_GP, legal.unsqueeze(0))


@pytest.mark.parametrize("name", ["vq1-d2", "vq4-d4", "vq8-d2", "vq8-d8", "vq6-d4-out", "vq3-d8-out-r16"])
def test_as_many_vectors_as_entries_are_found_exactly(name: str) -> None:
    """± 1 makes all rows of one root mean square, so that scaling them keeps the vectors few."""
    stored = parse_format(name)
    length, entries = int(name.split("-d")[1][0]), 2 ** int(name[2])
    legal = torch.randint(0, 2, (entries, length)) * 2.0 - 1
    vectors = legal[torch.randint(0, entries, (64 * 64 // length,))]
    weight = vectors.reshape(64, 64).T.contiguous() if "-out" in name else vectors.reshape(64, 64)
    assert torch.equal(stored.decompress(stored.compress(weight, MSE)), weight)


def test_vectors_that_no_sample_holds_still_get_the_entries_that_are_left() -> None:
    points_GND = torch.ones(1, 5000, 4)
    sampled = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[: 4 * SEEDS_PER_ENTRY]
    missed = sorted(set(range(5000)) - set(sampled.tolist()))[:2]
    points_GND[0, missed] = torch.tensor([[-3.0], [5.0]]).expand(2, 4)
    codebook_PD = vector_kmeans(points_GND, torch.ones(1, 5000, 4), 4)[0]
    assert {-3.0, 1.0, 5.0} <= set(codebook_PD[:, 0].tolist())


def test_rows_of_zeros_take_no_entries_from_the_others() -> None:
    stored, weight = parse_format("vq2-d2"), 0.01 * torch.randn(64, 32)
    with_zeros = torch.cat([weight, torch.zeros(64, 32)])
    alone, beside = (weighted_error(stored, each, None, torch.ones(32)) for each in (weight, with_zeros))
    assert beside < 1.05 * alone


@pytest.mark.parametrize("name", ["lut4-r16", "vq8-d4", "vq8-d4-r32"])
def test_same_bits_beat_evenly_spaced_values_on_normal_weights(name: str) -> None:
    weight, ones_K = 0.02 * torch.randn(256, 256), torch.ones(256)
    rival = parse_format("int4-row" if name == "lut4-r16" else "lut2-r1")
    assert parse_format(name).weight_bits == rival.weight_bits
    error, rival_error = (weighted_error(each, weight, None, ones_K) for each in (parse_format(name), rival))
    assert error < 0.95 * rival_error


@pytest.mark.parametrize("name", ["lut3", "lut4-r8", "vq4-d2", "vq8-d4-r32", "vq4-d4-out"])
def test_columns_that_are_driven_hard_are_kept_better_with_a_hessian(name: str) -> None:
    # Strong columns hold large weights: without a Hessian they would get too few of the entries.
    measure_K = torch.logspace(0, -2, 64)
    weight = torch.randn(128, 64) * (1 + 4 * measure_K)
    blind = weighted_error(parse_format(name), weight, None, measure_K)
    assert weighted_error(parse_format(name), weight, torch.diag(measure_K), measure_K) < 0.97 * blind


@pytest.mark.parametrize("name", ["lut4", "lut4-r8", "vq4-d2", "vq8-d4-r32", "vq4-d4-out"])
def test_same_input_gives_the_same_bytes_and_leaves_the_random_state_alone(name: str) -> None:
    weight, hessian_KK = torch.randn(64, 48, 3, 3), torch.diag(torch.rand(432))
    parts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        parts.append(parse_format(name).compress(weight.clone(), MSE, hessian_KK).parts)
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
    assert all(torch.equal(parts[0][part], parts[1][part]) for part in parts[0])


@pytest.mark.parametrize("name", ["lut4-r8", "vq4-d2-r8", "vq4-d4-out-r8"])
def test_a_group_of_rows_is_stored_as_if_it_were_alone(name: str) -> None:
    stored, weight = parse_format(name), torch.randn(32, 16)
    whole, alone = stored.compress(weight, MSE), stored.compress(weight[8:16], MSE)
    assert torch.equal(stored.decompress(whole)[8:16], stored.decompress(alone))


@pytest.mark.parametrize("name", ["lut1", "lut8", "lut4-r4", "vq8-d8", "vq1-d2", "vq4-d4-out"])
def test_equal_weights_come_back_equal(name: str) -> None:
    stored = parse_format(name)
    weight = stored.decompress(stored.compress(torch.full((8, 16), 0.3), MSE))
    assert (weight == weight[0, 0]).all()
    assert float(weight[0, 0]) == pytest.approx(0.3, rel=2e-3)


@pytest.mark.parametrize("name", ["lut8", "lut6-r2", "vq8-d2", "vq6-d4", "vq8-d2-out"])
def test_fewer_weights_than_entries_keep_all_their_values(name: str) -> None:
    stored, weight = parse_format(name), torch.randn(4, 4)
    compressed = stored.compress(weight, MSE)
    assert all(torch.isfinite(part).all() for part in compressed.parts.values())
    torch.testing.assert_close(stored.decompress(compressed), weight, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["lut4", "vq8-d2"])
def test_a_hessian_of_another_size_is_refused(name: str) -> None:
    with pytest.raises(TurbopocketError, match=r"Hessian of shape \[8, 8\] for a weight of 16 columns"):
        parse_format(name).compress(torch.randn(4, 16), MSE, torch.eye(8))


@pytest.mark.parametrize("name", ["lut4", "vq4-d2"])
def test_a_hessian_that_is_all_zeros_counts_all_weights_alike(name: str) -> None:
    stored, weight = parse_format(name), torch.randn(16, 16)
    found, expected = stored.compress(weight, MSE, torch.zeros(16, 16)), stored.compress(weight, MSE)
    assert torch.equal(stored.decompress(found), stored.decompress(expected))
