# SPDX-License-Identifier: Apache-2.0
"""Between the sampler's latents and the VAE's: there and back, and what a manifest may say about it."""

import json
from typing import Any

import numpy as np
import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.latents import from_vae, to_vae
from turbopocket.runtimes.manifest import ImageSpec, Manifest, load_manifest

SIZES = {"height": 8, "width": 8, "latent_channels": 4, "latent_height": 4, "latent_width": 4}
STATISTICS: dict[str, Any] = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.5, 5.9, 6.5, 5.2]}


@pytest.mark.parametrize("statistics", [{}, STATISTICS])
def test_there_and_back_is_the_same(statistics: dict[str, Any]) -> None:
    image = ImageSpec(**SIZES, vae_scaling_factor=0.5, **statistics)
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 4), dtype=np.float32)
    z = to_vae(image, latents)
    assert z.dtype == np.float32
    assert np.abs(z - latents).max() > 1
    np.testing.assert_allclose(from_vae(image, z), latents, atol=1e-6)


def test_each_channel_has_its_own_mean_and_deviation() -> None:
    image = ImageSpec(**SIZES, vae_scaling_factor=0.5, latents_mean=[0, 1, 2, 3], latents_std=[1, 2, 3, 4])
    ones = np.ones((1, 4, 1, 1), dtype=np.float32)
    assert to_vae(image, ones).ravel().tolist() == [2, 5, 8, 11]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "latents_mean has 3 numbers for 4 latent channels"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 5}, "latents_std has 5 numbers for 4 latent channels"),
        ({"latents_mean": [0.0] * 4}, "latents_mean and latents_std belong together"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "greater than 0"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, float("inf"), 1.0]}, "finite"),
    ],
)
def test_a_manifest_with_statistics_that_do_not_fit_is_refused(
    toy_artifact: Any, toy_manifest: Manifest, changes: dict[str, Any], said: str
) -> None:
    content = toy_manifest.model_dump()
    content["image"] |= {"latent_channels": 4} | changes
    (toy_artifact / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(TurbopocketError, match=said):
        load_manifest(toy_artifact)
