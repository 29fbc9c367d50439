# SPDX-License-Identifier: Apache-2.0
"""A prompt and an artifact in, a PNG out; nothing here or below imports PyTorch."""

import io
import time
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from ..ground.errors import TurbopocketError
from ..runtimes.drawing.conditioning import guidance_condition
from ..runtimes.drawing.text_to_image import FirstPicture, generate, require_encoder
from ..runtimes.drawing.tokenizer import open_tokenizers
from ..runtimes.image_size import parse_size
from ..runtimes.manifest import Manifest, load_manifest, verify
from ..runtimes.open import open_runner
from .output.staging import refuse_file, settle_output, write_atomically
from .picture_file import read_picture

DEFAULT_STRENGTH = 0.6


def draw(
    artifact: Path,
    prompt: str,
    out: Path,
    seed: int,
    steps: int | None,
    guidance: float | None,
    negative_prompt: str | None = None,
    size: str | None = None,
    image: Path | None = None,
    strength: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the picture of `prompt` to `out` and returns what was done, warnings included.

    `size` is WIDTHxHEIGHT, by default the artifact's first. With an `image` drawing begins there and changes it by
    `strength`. Raises TurbopocketError for an artifact that is damaged or was edited, for an empty prompt, for a
    negative prompt that would have no effect, for a size that the artifact was not built for, for an image that is
    none, that the artifact can not begin with, or that no step would be left for, and for an `out` that is taken,
    unless by a plain file and with `overwrite`.
    """
    refuse_file(out, overwrite)
    if artifact.resolve() in out.resolve().parents:
        raise TurbopocketError(f"output {out} is in the artifact, which would not match its manifest any more")
    settle_output(artifact)
    manifest = load_manifest(artifact)
    if size is not None:
        manifest = manifest.at_size(parse_size(size))
    first = _first_picture(manifest, image, strength)
    verify(artifact, manifest)
    runner, tokenizers = open_runner(artifact, manifest), open_tokenizers(artifact, manifest)
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = generate(runner, manifest, tokenizers, prompt, seed, steps, guidance, negative_prompt, first)
    seconds = time.monotonic() - start
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="PNG")
    write_atomically(out, data.getvalue(), overwrite)
    return {
        "picture": str(out),
        "prompt": prompt,
        "seed": seed,
        "size": str(manifest.image.size),
        "steps": steps or manifest.sampler.steps,
        "guidance": manifest.sampler.guidance_scale if guidance is None else guidance,
        "seconds": round(seconds, 3),
        "negative_prompt": negative_prompt,
        "image": None if image is None else str(image),
        "strength": None if first is None else first.strength,
        "warnings": [*_unchecked(manifest, guidance), *dict.fromkeys(str(warning.message) for warning in caught)],
    }


def _first_picture(manifest: Manifest, image: Path | None, strength: float | None) -> FirstPicture | None:
    if image is None:
        if strength is not None:
            raise TurbopocketError(f"strength {strength:g} was given, and no image that it could change")
        return None
    require_encoder(manifest)
    return FirstPicture(read_picture(image, manifest.image.size), DEFAULT_STRENGTH if strength is None else strength)


def _unchecked(manifest: Manifest, guidance: float | None) -> list[str]:
    """A sentence when guidance is asked of an artifact that was calibrated, compressed and compared without it."""
    built_for = manifest.sampler.guidance_scale
    if guidance is None or guidance <= 1 or built_for > 1 or guidance_condition(manifest, guidance):
        return []
    return [
        f"{manifest.name} was built for guidance {built_for:g}, which is none; {guidance:g} was never checked with it"
    ]
