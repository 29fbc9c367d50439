# SPDX-License-Identifier: Apache-2.0
"""A pipeline as data: which graph is the denoiser, what feeds its inputs, and how a sampler steps, in numbers.

A model's family writes it, the loop reads it: whoever repeats the loop needs to know no family and no scheduler.
"""

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .ceilings import MOST_LETTERS

MOST_NUMBERS = 16_384
"""Told to a denoiser at once: published models have at most 256 for the guidance, and 6 for the picture."""
Name = Annotated[str, Field(min_length=1)]


def _inside(path: str) -> str:
    """`path` itself, when it is relative, normal and cannot leave the folder; else ValueError."""
    pure = PurePosixPath(path)
    escapes = pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or "\0" in path
    if escapes or path in ("", ".") or str(pure) != path:
        raise ValueError(f"path {path!r} is not a plain relative path inside the artifact")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]


class Record(BaseModel):
    """Base of everything in a manifest: unknown fields are refused, nothing changes, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextEncoder(Record):
    """Names of a text encoder's inputs, each [1, T]: `ids` of the tokens, and 1 for a token, 0 for padding."""

    ids: Name = "input_ids"
    attention_mask: Name | None = None


class Output(Record):
    """One output of one component."""

    component: Name
    output: Name


class TextFeed(Record):
    """Outputs of text encoders that read the prompt, joined in this order along the last dimension."""

    kind: Literal["text"] = "text"
    join: list[Output] = Field(min_length=1)


class MaskFeed(Record):
    """Of the ids that a text encoder read, 1 for a token and 0 for padding, [1, T]."""

    kind: Literal["attention_mask"] = "attention_mask"
    component: Name


class NumbersFeed(Record):
    """Numbers [1, n]; words stand for the picture's: its sides in pixels, and height over width."""

    kind: Literal["numbers"] = "numbers"
    values: list[float | Literal["height", "width", "aspect_ratio"]] = Field(min_length=1, max_length=MOST_NUMBERS)


class GuidanceFeed(Record):
    """The guidance scale as sines and cosines, [1, width]: see `runtimes.drawing.conditioning.guidance_embedding`.

    A denoiser that is told the guidance is asked once a step, others twice when the scale is above 1.
    """

    kind: Literal["guidance"] = "guidance"
    width: int = Field(ge=4, le=MOST_NUMBERS)


Feed = Annotated[TextFeed | MaskFeed | NumbersFeed | GuidanceFeed, Field(discriminator="kind")]


class Denoiser(Record):
    """The component that is asked at every step. `inputs` says what feeds those beside `latents` and `timestep`.

    `latents` are [1, C, h, w] multiplied by the row's `input_scale`, `timestep` is a scalar or [1], as the tensor has
    it. Of `output` all channels are the prediction, or the first half of them where the rest is a variance.
    """

    component: Name
    latents: Name
    timestep: Name
    inputs: dict[Name, Feed]
    output: Name
    channels: Literal["all", "first half"] = "all"


class Decoder(Record):
    """From `latents`, which are z of the manifest's `image`, to `output`, a picture [1, 3, H, W] in -1..1."""

    component: Name
    latents: Name
    output: Name


class Encoder(Record):
    """From `picture` [1, 3, H, W] in -1..1 to `output`: z, or its means and then logarithms of variances."""

    component: Name
    picture: Name
    output: Name
    gives: Literal["latents", "means and log variances"]


class Pipeline(Record):
    """What a loop has to know of a model beside its sampler; every name is one of `components` and their tensors.

    `without_prompt` is what guidance steers away from when there is no negative prompt: zeros for what text encoders
    give (everything else stays), or the empty prompt. `encoder` is there when drawing can begin with a picture.
    """

    text_encoders: dict[Name, TextEncoder]
    denoiser: Denoiser
    without_prompt: Literal["zeros", "empty prompt"]
    decoder: Decoder
    encoder: Encoder | None = None

    @property
    def guidance_inputs(self) -> dict[str, int]:
        """Width by name of the denoiser's inputs that are told the guidance."""
        return {name: feed.width for name, feed in self.denoiser.inputs.items() if isinstance(feed, GuidanceFeed)}

    @property
    def drawn_with(self) -> tuple[str, ...]:
        """Components that read and give latents, in the order in which drawing runs them."""
        encoder = () if self.encoder is None else (self.encoder.component,)
        return (*encoder, self.denoiser.component, self.decoder.component)

    def uses(self) -> list[tuple[str, Literal["input", "output"], str]]:
        """Every tensor that is named here: its component, on which side it is, its name."""
        used: list[tuple[str, Literal["input", "output"], str]] = []
        for component, encoder in self.text_encoders.items():
            names = [encoder.ids, *([encoder.attention_mask] if encoder.attention_mask else [])]
            used += [(component, "input", name) for name in names]
        asked = self.denoiser
        used += [(asked.component, "input", name) for name in (asked.latents, asked.timestep, *asked.inputs)]
        used.append((asked.component, "output", asked.output))
        for feed in asked.inputs.values():
            joined = feed.join if isinstance(feed, TextFeed) else []
            used += [(each.component, "output", each.output) for each in joined]
        used += [(self.decoder.component, "input", self.decoder.latents)]
        used += [(self.decoder.component, "output", self.decoder.output)]
        if self.encoder is not None:
            used += [(self.encoder.component, "input", self.encoder.picture)]
            used += [(self.encoder.component, "output", self.encoder.output)]
        return used


Operand = Literal["x", "output", "estimate", "noise", "first", "remembered_1", "remembered_2", "remembered_3"]
"""What a step adds up: latents of this call, the prediction, the bounded estimate, fresh noise, latents of the walk's
first call, and what steps before remembered, the newest first."""

Sum = dict[Operand, float]
"""A sum of operands, each times its number; those that are not there count for nothing."""


class SamplerStep(Record):
    """One step: `next` are the latents after it; `remember`, if any, is from now on `remembered_1`."""

    next: Sum
    remember: Sum | None = None


class SamplerRow(Record):
    """One call of the denoiser.

    Latents at this call are signal * (clean latents) + noise * (standard normal numbers); the denoiser is given them
    times `input_scale`. Where there is an `estimate`, it is bounded to the table's `bound` on both sides. Of `steps`
    number k is for a walk that made k calls before this one, the last for all longer ones.
    """

    timestep: float
    signal: float
    noise: float
    input_scale: float
    estimate: Sum | None = None
    steps: list[SamplerStep] = Field(min_length=1)


class SamplerTable(Record):
    """The sampler's walk at the manifest's number of steps. Without a first picture it begins at row 0, with standard
    normal numbers times `init_scale`."""

    init_scale: float
    bound: float | None = None
    rows: list[SamplerRow] = Field(min_length=1)


class RuntimeSpec(Record):
    """What opens the files of an artifact, and what a session of it has to be told.

    `oldest` is the oldest version that opened and ran such files when it was tried, `format` what the files say of
    themselves, `providers` what ran them when the artifact was built; `session` has options by the runtime's own names.
    """

    name: Name
    oldest: Name
    format: dict[Name, int] = Field(default_factory=dict)
    providers: list[Name] = Field(default_factory=list)
    session: dict[Name, bool | int | str] = Field(default_factory=dict)


class RewriteSpec(Record):
    """A change of the denoiser that was made before it was lowered, and computes the same.

    It holds constants of `text_encoders`, each with the hash of its weights and config: with another one the denoiser
    would draw something else. `facts` are for people.
    """

    name: Name
    text_encoders: dict[Name, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    facts: dict[str, float]


class ExpectedOutput(Record):
    """What a device has to compute: the file that holds it, and the least signal over difference, in dB."""

    file: RelativePath
    snr_floor_db: float


class SelfCheck(Record):
    """One walk that a device repeats before it draws: of this prompt and seed, at the artifact's first size and own
    guidance, up to the row `step` of the sampler's table.

    `latents`: those after that row, float32, little-endian, [1, C, h, w]. `picture`: what the decoder makes of them,
    uint8 [H, W, 3]. Whose own have less signal over difference than a floor computes wrong; what the signals are says
    `runtimes.compare.self_check`.
    """

    prompt: str = Field(min_length=1, max_length=MOST_LETTERS)
    seed: int = Field(ge=0)
    step: int = Field(ge=0)
    latents: ExpectedOutput
    picture: ExpectedOutput

    @property
    def outputs(self) -> dict[str, ExpectedOutput]:
        """Both by name."""
        return {"latents": self.latents, "picture": self.picture}
