# SPDX-License-Identifier: Apache-2.0
"""An artifact as its user has it: a prompt in, a picture out; nothing here or below imports PyTorch."""

import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from PIL import Image

from ..ground.errors import TurbopocketError
from ..runtimes.drawing.conditioning import guidance_condition
from ..runtimes.drawing.text_to_image import FirstPicture, generate, require_encoder
from ..runtimes.drawing.tokenizer import Tokenizer, open_tokenizers
from ..runtimes.image_size import ImageSize, parse_size
from ..runtimes.manifest import Manifest, load_manifest, verify
from ..runtimes.open import open_runner
from ..runtimes.runner import Runner
from .output.staging import settle_output
from .picture_file import read_picture

DEFAULT_STRENGTH = 0.6


class NeverChecked(UserWarning):
    """Something is asked of an artifact that its build did not compare with PyTorch."""


class Artifact:
    """A folder that `build` made, whose files are as its manifest says. Made by `open`.

    Attributes:
        folder: where it lies.
        manifest: what it says of itself: files, components, sampler, sizes of pictures, recipe.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: Path | str) -> "Artifact":
        """The artifact in a folder, once every file's SHA-256 was found to be the manifest's.

        Raises TurbopocketError for a folder that holds none, and for one that is damaged or was edited.
        """
        path = Path(folder)
        settle_output(path)
        manifest = load_manifest(path)
        verify(path, manifest)
        return cls(path, manifest)

    def generate(
        self,
        prompt: str,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        size: str | ImageSize | None = None,
        image: Path | str | None = None,
        strength: float | None = None,
    ) -> Image.Image:
        """Draws the picture of `prompt`: RGB, of 8 bits, the same on every runtime that computes right.

        Components are opened by the first call and stay open. Warns `PromptCut` for a prompt that is too long, and
        `NeverChecked` for guidance that was not among what the build compared.

        Args:
            seed: of the first noise, and of all later: numpy's PCG64, 0 or more.
            steps: of sampling; guidance: classifier-free, none at 1 or less. Both are the manifest's by default.
            negative_prompt: what guidance steers away from, by default what the model was trained with.
            size: WIDTHxHEIGHT in pixels, or (height, width); by default the artifact's first.
            image: a picture file to begin with, whose middle is scaled to fill the size; strength: the share of the
                steps that change it, in (0, 1], by default 0.6.

        Raises TurbopocketError for an empty prompt, a negative prompt that would have no effect, steps or a size that
        the artifact was not built for, an image that is none, that the artifact can not begin with, or that no step
        would be left for; `NotFinite` when the runtime computes nonsense.
        """
        manifest = self.manifest
        if size is not None:
            manifest = manifest.at_size(parse_size(size) if isinstance(size, str) else ImageSize(*size))
        first = _first_picture(manifest, image, strength)
        self._warn_of_guidance(guidance)
        asked = prompt, seed, steps, guidance, negative_prompt, first
        return Image.fromarray(generate(self._runner, manifest, self._tokenizers, *asked))

    @cached_property
    def _runner(self) -> Runner:
        return open_runner(self.folder, self.manifest)

    @cached_property
    def _tokenizers(self) -> Mapping[str, Tokenizer]:
        return open_tokenizers(self.folder, self.manifest)

    def _warn_of_guidance(self, guidance: float | None) -> None:
        """Where guidance is asked of an artifact that was calibrated, compressed and compared without it."""
        built_for = self.manifest.sampler.guidance_scale
        if guidance is None or guidance <= 1 or built_for > 1 or guidance_condition(self.manifest, guidance):
            return
        warnings.warn(
            f"{self.manifest.name} was built for guidance {built_for:g}, which is none; {guidance:g} was never checked "
            "with it",
            NeverChecked,
            stacklevel=3,
        )


def _first_picture(manifest: Manifest, image: Path | str | None, strength: float | None) -> FirstPicture | None:
    if image is None:
        if strength is not None:
            raise TurbopocketError(f"strength {strength:g} was given, and no image that it could change")
        return None
    require_encoder(manifest)
    pixels = read_picture(Path(image), manifest.image.size)
    return FirstPicture(pixels, DEFAULT_STRENGTH if strength is None else strength)
