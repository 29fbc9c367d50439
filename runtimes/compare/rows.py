# SPDX-License-Identifier: Apache-2.0
"""What a comparison with PyTorch found, as values that are stored in `parity.json` and in the manifest."""

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Limits(_Record):
    """What must hold for every call of every component.

    With `by_layer` the error of a call is that of its worst layer or output, each from equal inputs. It is for runtimes
    that round inside: where layers round their inputs to integers, a difference of 1e-6 flips some roundings, those
    flip others, and after a few layers two right programs are as far apart as rounding is coarse.
    """

    max_relative_error: float = Field(default=1e-4, gt=0)
    by_layer: bool = False


class ParityRow(_Record):
    """One call of one component; the numbers are those of the output with the largest relative error.

    `timestep` is None for components that have none; `snr_db` is None when the outputs are equal.
    """

    picture: int
    component: str
    timestep: float | None
    output: str
    max_abs_error: float
    relative_error: float
    snr_db: float | None
    max_relative_error: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.relative_error <= self.max_relative_error


class PictureRow(_Record):
    """One whole picture from the same prompt and seed; `psnr_db` is None when the pictures are equal.

    A picture that is not finite has -inf dB, an SSIM of 0 and no feature distance.
    """

    picture: int
    prompt: str
    seed: int
    psnr_db: float | None
    ssim: float
    feature_distance: float | None = None


class Divergence(_Record):
    """The first layer, in execution order, whose output is too far from the reference's."""

    component: str
    timestep: float | None
    layer: str
    relative_error: float
    max_abs_error: float


class ParityReport(_Record):
    """All rows of a comparison; `first_divergence` is looked for only in a call that failed."""

    limits: Limits
    rows: list[ParityRow]
    pictures: list[PictureRow]
    first_divergence: Divergence | None = None

    @property
    def passed(self) -> bool:
        """Whether every call is within its limit."""
        return all(row.passed for row in self.rows)

    @property
    def worst(self) -> ParityRow | None:
        """The call with the largest relative error, None when nothing was compared."""
        return max(self.rows, key=lambda row: row.relative_error, default=None)

    @property
    def worst_errors(self) -> dict[str, float]:
        """The largest relative error of each component over all its calls."""
        worst: dict[str, float] = {}
        for row in self.rows:
            worst[row.component] = max(worst.get(row.component, 0.0), row.relative_error)
        return worst

    @property
    def failure(self) -> str | None:
        """One sentence naming the worst call and the guilty layer; None when everything passed."""
        if self.passed:
            return None
        # What is over its own limit by most: components may have different ones.
        worst = max(self.rows, key=lambda row: row.relative_error / row.max_relative_error)
        when = "" if worst.timestep is None else f" at timestep {worst.timestep:g}"
        found = f"relative error {worst.relative_error:.3g} is over {worst.max_relative_error:.3g}"
        return f"{worst.component}{when}: {found} in output {worst.output}{self._blame()}"

    def _blame(self) -> str:
        first = self.first_divergence
        if first is None:
            return ""
        return f"; the first layer to diverge is {first.component}.{first.layer} ({first.relative_error:.3g})"
