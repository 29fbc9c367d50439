# SPDX-License-Identifier: Apache-2.0
"""Statistics of a VAE's latents are used, or not looked at, just as diffusers' pipeline of the family has it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from turbopocket.export.verify.gaps import torch_runner
from turbopocket.runtimes.drawing.text_to_image import draw, seeded_noise

from .verify.test_diffusers_reference import PROMPT, Drawing

STEPS, SEED = 2, 7
PLAYGROUND = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}


def _drawn_by_diffusers(folder: Path) -> NDArray[np.float32]:
    import diffusers

    class_name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline: Any = getattr(diffusers, class_name).from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(seeded_noise(SEED)((1, 4, 16, 16)))
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": 32, "width": 32, "output_type": "np"}
    picture: NDArray[np.float32] = pipeline(PROMPT, latents=latents, **options).images[0]
    return picture


@pytest.mark.parametrize(
    ("checkpoint", "changes", "used"),
    [
        ("tiny_sdxl", {}, False),
        ("tiny_sdxl", PLAYGROUND, True),
        ("tiny_sdxl", {"latents_mean": PLAYGROUND["latents_mean"]}, False),
        ("tiny_sdxl", {"latents_std": PLAYGROUND["latents_std"]}, False),
        ("tiny_sdxl", {"shift_factor": 0.5, "force_upcast": False}, False),
        ("tiny_sd", PLAYGROUND, False),
        ("tiny_sd", {"shift_factor": 0.5}, False),
    ],
)
def test_latents_are_decoded_as_diffusers_decodes_them(
    checkpoint: str, changes: dict[str, Any], used: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(checkpoint), tmp_path / "model"))
    config = folder / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    drawing = Drawing(folder, tmp_path / "artifact", steps=STEPS, guidance=1.0)
    manifest, tokenizers = drawing.session.manifest, drawing.session.tokenizers
    found = draw(torch_runner(drawing.components), manifest, tokenizers, PROMPT, seeded_noise(SEED))
    expected = _drawn_by_diffusers(folder)
    assert expected.std() > 0.01, "a flat picture would prove nothing"
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (manifest.image.latents_mean is not None, manifest.image.latents_std is not None) == (used, used)
