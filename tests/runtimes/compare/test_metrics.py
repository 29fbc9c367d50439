# SPDX-License-Identifier: Apache-2.0
"""Each number against its definition worked out by hand, or against an independent implementation."""

import math

import numpy as np
import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.compare.metrics import max_abs_error, psnr_db, relative_error, snr_db, ssim

REFERENCE = np.array([3.0, 4.0], dtype=np.float32)
CANDIDATE = np.array([3.0, 4.5], dtype=np.float32)


def pictures(height: int = 24, width: int = 31) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    noisy = np.clip(reference + rng.normal(0, 20, reference.shape), 0, 255).astype(np.uint8)
    return noisy, reference


def test_errors_are_those_of_a_3_4_5_triangle() -> None:
    assert max_abs_error(CANDIDATE, REFERENCE) == 0.5
    assert relative_error(CANDIDATE, REFERENCE) == pytest.approx(0.1)
    assert snr_db(CANDIDATE, REFERENCE) == pytest.approx(20)


def test_equal_arrays_have_no_error_and_infinite_snr() -> None:
    assert max_abs_error(REFERENCE, REFERENCE) == 0
    assert relative_error(REFERENCE * 0, REFERENCE * 0) == 0
    assert snr_db(REFERENCE, REFERENCE) == math.inf


def test_error_against_zero_is_infinite() -> None:
    assert relative_error(CANDIDATE, np.zeros_like(CANDIDATE)) == math.inf


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_not_finite_numbers_never_pass_as_small_errors(odd: float) -> None:
    broken = np.array([3.0, odd])
    for candidate, reference in ((broken, REFERENCE), (REFERENCE, broken)):
        assert max_abs_error(candidate, reference) == math.inf
        assert relative_error(candidate, reference) == math.inf
        assert snr_db(candidate, reference) == -math.inf
    assert max_abs_error(broken, broken) == 0


def test_float16_errors_are_summed_without_overflow() -> None:
    large = np.full(1000, 60000, dtype=np.float16)
    assert relative_error(large, -large) == pytest.approx(2)


def test_other_shapes_cannot_be_compared() -> None:
    with pytest.raises(TurbopocketError, match=r"shapes \(2,\) and \(1, 2\) cannot be compared"):
        relative_error(CANDIDATE, REFERENCE[None])


def test_psnr_of_one_grey_level_is_48_db() -> None:
    grey = np.full((16, 16, 3), 100, dtype=np.uint8)
    assert psnr_db(grey + 1, grey) == pytest.approx(20 * math.log10(255))
    assert psnr_db(grey, grey) == math.inf


def test_ssim_is_that_of_torchmetrics() -> None:
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    noisy, reference = pictures()
    as_tensor = [torch.from_numpy(p / 255.0).permute(2, 0, 1)[None] for p in (noisy, reference)]
    _, full = structural_similarity_index_measure(*as_tensor, data_range=1.0, return_full_image=True)
    expected = full[..., 5:-5, 5:-5].mean().item()  # torchmetrics also mirrors the edges
    assert 0.5 < expected < 0.99
    assert ssim(noisy, reference) == pytest.approx(expected, abs=1e-6)
    assert ssim(noisy / 255.0, reference / 255.0) == pytest.approx(expected, abs=1e-6)


def test_ssim_of_two_flat_pictures_is_the_luminance_term_alone() -> None:
    dark, bright = np.full((11, 11, 3), 51, np.uint8), np.full((11, 11, 3), 102, np.uint8)
    c1 = 0.01**2
    assert ssim(dark, bright) == pytest.approx((2 * 0.2 * 0.4 + c1) / (0.2**2 + 0.4**2 + c1))


def test_ssim_is_one_for_equal_pictures_and_the_same_both_ways() -> None:
    noisy, reference = pictures()
    assert ssim(reference, reference) == pytest.approx(1.0)
    assert ssim(noisy, reference) == pytest.approx(ssim(reference, noisy))


def test_ssim_of_a_picture_smaller_than_its_window_is_refused() -> None:
    noisy, reference = pictures(height=10)
    with pytest.raises(TurbopocketError, match=r"SSIM needs sides of 11 pixels or more, found \(10, 31\)"):
        ssim(noisy, reference)
