# SPDX-License-Identifier: Apache-2.0
"""The walk that an artifact's build recorded, repeated: does this device compute what the build's reference did?

Drivers and chips that compute wrong give wrong pictures, not errors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.errors import TurbopocketError
from ..drawing.text_to_image import decode, seeded_noise, walk
from ..drawing.tokenizer import Tokenizer
from ..manifest import ImageSpec, Manifest
from ..pipeline import SelfCheck
from ..runner import Runner
from .metrics import snr_db


@dataclass(frozen=True)
class Outputs:
    """What a self-check compares: latents float32 [1, C, h, w], and their picture uint8 [H, W, 3].

    The signal of latents is what the walk changed in them: of a few steps of many, most of them is still noise. That
    of a picture is what it has beside mid-gray, which the decoder has as 0.
    """

    latents: NDArray[np.float32]
    picture: NDArray[np.uint8] | None
    """None where the decoder gave numbers that are not finite."""

    def snr_db(self, expected: "Outputs", first: NDArray[np.float32]) -> dict[str, float]:
        """Signal over difference of each output, in dB: inf when equal, -inf for what is not finite.

        `first` are the latents that the walk begins with.
        """
        mine, theirs = (None if each.picture is None else each.picture / 127.5 - 1 for each in (self, expected))
        picture = -math.inf if mine is None or theirs is None else snr_db(mine, theirs)
        return {"latents": snr_db(self.latents - first, expected.latents - first), "picture": picture}

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.latents.nbytes + (0 if self.picture is None else self.picture.nbytes)

    def write(self, folder: Path, spec: SelfCheck) -> None:
        """Writes the files that the spec names. The picture must be there."""
        assert self.picture is not None
        for expected, values in ((spec.latents, self.latents.astype("<f4")), (spec.picture, self.picture)):
            (folder / expected.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / expected.file).write_bytes(values.tobytes())

    @classmethod
    def blank(cls, image: ImageSpec) -> "Outputs":
        """Zeros of the shapes of an artifact's outputs."""
        latents = np.zeros((1, image.latent_channels, image.latent_height, image.latent_width), np.float32)
        return cls(latents, np.zeros((image.height, image.width, 3), np.uint8))

    @classmethod
    def read(cls, folder: Path, manifest: Manifest, spec: SelfCheck) -> "Outputs":
        """What the artifact's files hold, which `verify` found to be the manifest's.

        Raises TurbopocketError for a file of another length than `image` says.
        """
        like = cls.blank(manifest.image)
        assert like.picture is not None
        latents = _values(folder, spec.latents.file, like.latents.astype("<f4"))
        return cls(latents.astype(np.float32), _values(folder, spec.picture.file, like.picture))


@dataclass(frozen=True)
class SelfTest:
    """What a self-check came to, by output: the signal over difference, and the floor that is asked, in dB."""

    snr_db: Mapping[str, float]
    floors_db: Mapping[str, float]

    def __str__(self) -> str:
        told = (f"{name} {self.snr_db[name]:.1f} dB (floor {floor:.1f})" for name, floor in self.floors_db.items())
        return f"self-test: {', '.join(told)}"

    def summary(self) -> dict[str, Any]:
        """Returns the outcome as JSON values; an infinite ratio, of equal numbers or of none, is null."""
        found = {name: value if math.isfinite(value) else None for name, value in self.snr_db.items()}
        return {"passed": self.failure is None, "snr_db": found, "snr_floor_db": dict(self.floors_db)}

    @property
    def failure(self) -> str | None:
        """One sentence on the first output below its floor, None when there is none."""
        for name, floor in self.floors_db.items():
            if not self.snr_db[name] >= floor:
                return (
                    f"this device computes wrong: {name} of the self-check have {self.snr_db[name]:.1f} dB of signal "
                    f"over difference, {floor:.1f} dB are needed"
                )
        return None


def outputs_of(runner: Runner, manifest: Manifest, tokenizers: Mapping[str, Tokenizer], spec: SelfCheck) -> Outputs:
    """What a runner computes for a self-check. Raises TurbopocketError for a step that the sampler does not have."""
    rows = 0 if manifest.sampler_table is None else len(manifest.sampler_table.rows)
    if spec.step >= rows:
        raise TurbopocketError(f"the self-check of {manifest.name} is of step {spec.step}; the sampler has {rows}")
    asked = tokenizers, [spec.prompt], [seeded_noise(spec.seed)]
    latents = walk(runner, manifest, *asked, end=spec.step + 1)
    picture = decode(runner, manifest, latents)[0]
    finite = bool(np.isfinite(picture).all())
    return Outputs(latents, np.round(picture * 255).astype(np.uint8) if finite else None)


def first_latents(manifest: Manifest, spec: SelfCheck) -> NDArray[np.float32]:
    """What the walk of a self-check begins with, [1, C, h, w]."""
    image, table = manifest.image, manifest.sampler_table
    noise = seeded_noise(spec.seed)((1, image.latent_channels, image.latent_height, image.latent_width))
    return noise * np.float32(1 if table is None else table.init_scale)


def self_test(folder: Path, manifest: Manifest, tokenizers: Mapping[str, Tokenizer], runner: Runner) -> SelfTest:
    """The self-check of a verified artifact, run. Raises TurbopocketError for an artifact that has none."""
    spec = manifest.self_check
    if spec is None:
        raise TurbopocketError(f"{folder} has no self-check: it was built before artifacts had one", "build it again")
    expected = Outputs.read(folder, manifest, spec)
    found = outputs_of(runner, manifest, tokenizers, spec)
    ratios = found.snr_db(expected, first_latents(manifest, spec))
    return SelfTest(ratios, {name: each.snr_floor_db for name, each in spec.outputs.items()})


def _values(folder: Path, file: str, like: NDArray[Any]) -> NDArray[Any]:
    data = (folder / file).read_bytes()
    if len(data) != like.nbytes:
        raise TurbopocketError(f"{folder}: {file} has {len(data)} bytes, {list(like.shape)} of them {like.nbytes}")
    return np.frombuffer(data, like.dtype).reshape(like.shape)
