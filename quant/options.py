# SPDX-License-Identifier: Apache-2.0
"""How stages that train what is stored do it; these are sections of a recipe as well. Nothing here needs PyTorch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..ground.errors import TurbopocketError

Start = Literal["equal", "distance"]
Schedule = Literal["joint", "freeze"]
Temporal = Literal["tiar", "inside", "frozen"]


@dataclass(frozen=True)
class CandidateOptions:
    """Training of codes, codebooks and biases by block; these are the keys of a recipe's `[candidates]`.

    Attributes:
        count: n, the candidates of each vector, 1 to 4; 0 leaves the stage out, 1 trains codebooks and biases alone.
        start: ratios that are all 1/n, as in the paper, or nearer entries larger, as in its released code.
        schedule: `joint` trains ratios and codebooks together, as in the paper; `freeze` trains ratios first, each
            frozen when it is nearly 1, and then the codebook, as released.
        iterations: of each block, one call of it in each. Ratios have half of them at most, then the largest stays.
        pictures: drawn by the float model; its calls are what is trained on, every eighth held out.
        ratio_weight: of what drives ratios to 0 and 1, beside the block's error relative to that before training.
        ratio_learning_rate: of logits, by RMSprop.
        learning_rate: of codebooks, scales and biases in units of their root mean square, by RMSprop; it falls to zero.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    count: int = 0
    start: Start = "distance"
    schedule: Schedule = "joint"
    iterations: int = 400
    pictures: int = 16
    ratio_weight: float = 0.3
    ratio_learning_rate: float = 5e-2
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        for name, least, most in (("count", 0, 4), ("iterations", 1, 10**9), ("pictures", 1, 16384)):
            if not least <= getattr(self, name) <= most:
                raise TurbopocketError(f"candidates: {name} = {getattr(self, name)}: allowed are {least:,} to {most:,}")
        for name in ("ratio_learning_rate", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TurbopocketError(f"candidates: {name} = {getattr(self, name)}: more than 0 is needed")
        if not 0 <= self.ratio_weight < float("inf"):
            raise TurbopocketError(f"candidates: ratio_weight = {self.ratio_weight}: 0 or more is needed")


@dataclass(frozen=True)
class FineTuneOptions:
    """Training of what lies around the codes, by Adam; these are the keys of a recipe's `[finetune]`.

    Attributes:
        iterations: of each component; 0 leaves it out.
        pictures: drawn by the float model; its calls are what is trained on, every eighth held out.
        batch: calls at a time.
        learning_rate: falls to zero over the iterations; one is for all, as each tensor is measured in its own root
            mean square.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    iterations: int = 0
    pictures: int = 256
    batch: int = 16
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        for name, least, most in (("iterations", 0, 10**9), ("pictures", 1, 16384), ("batch", 1, 1024)):
            if not least <= getattr(self, name) <= most:
                raise TurbopocketError(
                    f"fine-tuning: {name} = {getattr(self, name)}: allowed are {least:,} to {most:,}"
                )
        if not 0 < self.learning_rate < float("inf"):
            raise TurbopocketError(f"fine-tuning: learning_rate = {self.learning_rate}: more than 0 is needed")


@dataclass(frozen=True)
class ReconstructOptions:
    """Learned rounding, by Adam; these are the keys of a recipe's `[reconstruct]`.

    Attributes:
        iterations: of each block. The papers take 20,000, batches of 32.
        batch: calls at a time, all of one step of the walk.
        learning_rate: of V, throughout.
        regularization: what undecided weights cost, their mean of 1 - |2 h(V) - 1|^β, beside the block's error in
            units of that of rounding to the nearest. (AdaRound adds 0.01 times their sum to the error itself, which
            means another thing in each block.)
        warm_up: share of the iterations before undecided weights cost anything.
        beta_start, beta_end: β falls linearly from one to the other after that.
        temporal: what is done about the temporal information block (TFMQ-DM). `tiar` reconstructs it by itself, against
            temporal features; `inside` has its layers learned in the blocks that they lie in, as BRECQ does; `frozen`
            rounds them to the nearest.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    iterations: int = 2000
    batch: int = 8
    learning_rate: float = 1e-2
    regularization: float = 10.0
    warm_up: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    temporal: Temporal = "tiar"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("iterations", 1, 10**7),
            ("batch", 1, 1024),
            ("learning_rate", 1e-9, 1e3),
            ("regularization", 0, 1e9),
            ("warm_up", 0, 1),
            ("beta_end", 1, 1000),
            ("beta_start", self.beta_end, 1000),
        ):
            if not least <= getattr(self, name) <= most:
                raise TurbopocketError(
                    f"reconstruct: {name} = {getattr(self, name)}: allowed are {least:g} to {most:,}"
                )

    def beta(self, iteration: int) -> float | None:
        """β in an iteration, None during the warm-up."""
        first = self.warm_up * self.iterations
        if iteration < first:
            return None
        share = (iteration - first) / max(1.0, self.iterations - first)
        return self.beta_start + (self.beta_end - self.beta_start) * share
