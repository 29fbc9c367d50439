# SPDX-License-Identifier: Apache-2.0
"""VQDM's search in C++ against the one in PyTorch, path by path; without compiler or CMake these tests are skipped."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.fit import VQDM, AdditiveGrid
from turbopocket.quant.fit.beam import torch_best_codes
from turbopocket.quant.fit.grids import summed_vectors
from turbopocket.quant.fit.kmeans import _Cloud
from turbopocket.quant.fit.native import SearchLibrary, searched_with
from turbopocket.quant.fit.vqdm import damped_in_place, lower_factor

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "quant" / "fit" / "native"
BUILD = ROOT / "build" / "vqdm" / "tests"


@pytest.fixture(scope="module")
def library() -> SearchLibrary:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no CMake or no C++ compiler: the search cannot be built here")
    subprocess.run(["cmake", "-S", str(SOURCES), "-B", str(BUILD)], check=True, capture_output=True)
    done = subprocess.run(["cmake", "--build", str(BUILD)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    return SearchLibrary(BUILD / "libvqdm.so")


def losses(target_OK: Tensor, codebooks_MPD: Tensor, codes_MOJ: Tensor, hessian_KK: Tensor) -> Tensor:
    error_OK = (target_OK - summed_vectors(codebooks_MPD, codes_MOJ)).double()
    return ((error_OK @ hessian_KK.double()) * error_OK).sum(1)


def layer(outputs: int, columns: int, books: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Target, codebooks and Hessian of correlated inputs."""
    x_NK = torch.randn(400, columns) @ (torch.randn(columns, columns) * torch.logspace(0, -1.5, columns).unsqueeze(1))
    return torch.randn(outputs, columns), 0.7 * torch.randn(*books), damped_in_place(x_NK.T @ x_NK / 400)


@pytest.mark.parametrize(
    ("outputs", "columns", "books", "beam"),
    [
        (70, 512, (2, 256, 8), 8),
        (13, 264, (3, 256, 8), 2),
        (64, 96, (2, 256, 2), 8),
        (50, 84, (2, 16, 4), 4),
        (30, 64, (3, 5, 8), 3),
        (25, 200, (2, 256, 8), 1),
        (20, 48, (2, 64, 4), 100),
        (1, 8, (2, 1, 8), 8),
    ],
    ids=str,
)
def test_every_path_finds_what_pytorch_finds(
    library: SearchLibrary, outputs: int, columns: int, books: tuple[int, int, int], beam: int
) -> None:
    target_OK, codebooks_MPD, hessian_KK = layer(outputs, columns, books)
    lower_KK = lower_factor(hessian_KK).float()
    wanted_MOJ = torch_best_codes(target_OK, codebooks_MPD, lower_KK, beam)
    wanted = losses(target_OK, codebooks_MPD, wanted_MOJ, hessian_KK)
    for path in library.paths():
        found_MOJ = library.best_codes(target_OK, codebooks_MPD, lower_KK, beam, path)
        found = losses(target_OK, codebooks_MPD, found_MOJ, hessian_KK)
        assert (found_MOJ == wanted_MOJ).all(0).all(1).float().mean() >= 0.98, path
        assert float(found.sum()) == pytest.approx(float(wanted.sum()), rel=1e-6), path


def test_threads_share_rows_without_changing_them(library: SearchLibrary) -> None:
    target_OK, codebooks_MPD, hessian_KK = layer(100, 128, (2, 256, 8))
    lower_KK = lower_factor(hessian_KK).float()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(library.best_codes(target_OK, codebooks_MPD, lower_KK, 8))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(("entries", "length"), [(256, 8), (256, 2), (17, 4), (1, 8)])
def test_nearest_entries_are_those_of_a_full_look(library: SearchLibrary, entries: int, length: int) -> None:
    points_ND, importance_ND, codebook_PD = (
        torch.randn(333, length),
        torch.rand(333, length),
        torch.randn(entries, length),
    )
    cloud = _Cloud(points_ND, importance_ND)
    away_NP = (importance_ND.unsqueeze(1) * (points_ND.unsqueeze(1) - codebook_PD).square()).sum(2)
    features_2DP = torch.cat([codebook_PD.square(), -2 * codebook_PD], dim=1).T
    for path in library.paths():
        codes_N = library.nearest(cloud.pulls_N2D, features_2DP, path).to(torch.int64)
        found_N = away_NP.gather(1, codes_N.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(found_N, away_NP.amin(1), rtol=1e-4, atol=1e-5)


def test_equal_entries_give_the_first(library: SearchLibrary) -> None:
    features_FP = torch.ones(4, 100)
    for path in library.paths():
        assert not library.nearest(torch.rand(10, 4), features_FP, path).any()


@pytest.mark.parametrize(
    ("shapes", "beam", "message"),
    [
        (((4, 16), (2, 4, 8), (15, 15)), 8, r"a factor of shape \[15, 15\] for a weight of 16 columns"),
        (((4, 16), (2, 4, 3), (16, 16)), 8, "vectors have 2, 4 or 8 columns"),
        (((4, 12), (2, 4, 8), (12, 12)), 8, "columns are whole vectors"),
        (((4, 16), (2, 300, 8), (16, 16)), 8, "a codebook has 1 to 256 entries"),
        (((4, 16), (17, 4, 8), (16, 16)), 8, "there are 1 to 16 codebooks"),
        (((0, 16), (2, 4, 8), (16, 16)), 8, "outputs"),
        (((4, 16), (2, 4, 8), (16, 16)), 0, "a beam keeps 1 to 4096 hypotheses"),
    ],
    ids=lambda value: str(value) if isinstance(value, int | str) else None,
)
def test_shapes_that_do_not_fit_are_refused(
    library: SearchLibrary, shapes: tuple[tuple[int, ...], ...], beam: int, message: str
) -> None:
    target_OK, codebooks_MPD, lower_KK = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(TurbopocketError, match=message):
        library.best_codes(target_OK, codebooks_MPD, lower_KK, beam)


def test_a_path_that_is_not_there_is_refused(library: SearchLibrary) -> None:
    with pytest.raises(TurbopocketError, match="no such path"):
        library.best_codes(torch.zeros(4, 16), torch.zeros(2, 4, 8), torch.eye(16), 8, path="sse9")


def test_a_whole_fit_loses_nothing_to_the_one_in_pytorch(library: SearchLibrary) -> None:
    weight_OK, _, hessian_KK = layer(96, 128, (2, 256, 8))
    grid, found = AdditiveGrid(2, 8, 8), []
    for each in (None, library):
        with searched_with(each):
            error_OK = (VQDM.choose(weight_OK, grid, hessian_KK).values() - weight_OK).double()
            found.append(float(((error_OK @ hessian_KK.double()) * error_OK).sum()))
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_hostile_searches_are_refused_or_right_under_sanitizers(library: SearchLibrary) -> None:
    folder = BUILD.parent / "sanitized"
    configure = ["cmake", "-S", str(SOURCES), "-B", str(folder), "-DVQDM_SANITIZE=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    built = subprocess.run(
        ["cmake", "--build", str(folder), "--target", "fuzz"], capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("this compiler comes without AddressSanitizer")
    assert built.returncode == 0, built.stdout + built.stderr
    ran = subprocess.run([str(folder / "fuzz"), "1000"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert 100 < int(ran.stdout.split()[2]) < 900  # some of both
