# SPDX-License-Identifier: Apache-2.0
"""What a build measured, as values and as files, so that its report can be made again."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Self, TypeVar

from annotated_types import MinLen
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...ground.errors import TurbopocketError
from ...quant.plan import Plan
from ...runtimes.compare.rows import ParityReport
from ...runtimes.manifest import Manifest
from ...runtimes.memory import MemoryFigures
from ...runtimes.schedule import validation_summary
from ..output.staging import write_atomically

PLAN, TRADEOFF, PARITY, MEASUREMENTS = "plan.json", "tradeoff.json", "parity.json", "measurements.json"
PICTURES = "pictures"
PROMPTS = "prompts.json"
_PNG_START = b"\x89PNG\r\n\x1a\n"
T = TypeVar("T")
_REPORTS = TypeAdapter(Annotated[dict[str, ParityReport], MinLen(1)])


@dataclass(frozen=True)
class TradeoffPoint:
    """One plan of the curve: what was allowed, what it takes, what it is predicted to cost."""

    budget_bytes: int
    total_bytes: int
    predicted_loss: float


@dataclass(frozen=True)
class DrawnPicture:
    """One prompt drawn three times from the same seed; PNG files as bytes.

    By float PyTorch, by PyTorch with the stored weights, and by the artifact.
    """

    prompt: str
    float_png: bytes
    stored_png: bytes
    artifact_png: bytes


class LoweringCost(BaseModel):
    """Seconds that lowering one component took, and the build's largest resident memory up to its end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float
    peak_bytes: int


class HeldOutLoss(BaseModel):
    """Relative squared error of a component's outputs on calls that fine-tuning did not train on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: float
    after: float


class CandidateLosses(BaseModel):
    """Relative squared error of a block's outputs on calls held out, while the candidates of its codes were trained: as
    stored before, right before and right after each vector was left one, and in the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: float
    soft: float
    hard: float
    after: float


class BlockError(BaseModel):
    """Squared error of a block on the calls that its rounding was learned on, a share of the power of what it gives:
    rounded to the nearest, and as learned. Where that is no less, it is not kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: float
    after: float


class FeatureRow(BaseModel):
    """A temporal feature at one step, the float model's against the shipped plan's, the worst of all calls.

    `shift` is the distance, in training timesteps, to the one whose float feature is nearest: not 0 is a mismatch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: str
    step: int
    timestep: float
    cosine: float
    relative_error: float
    shift: int


class TemporalFigures(BaseModel):
    """The layers of the denoiser's temporal information block, the inputs that it reads, its share of the denoiser's
    weights, and its features step by step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    share: float
    features: tuple[FeatureRow, ...]


class Measurements(BaseModel):
    """Numbers of a build that no other file holds.

    `artifact_bytes` counts every shipped file, manifest.json too; `parameters` are those of the shipped
    components before compression. `layer_snr_db` is 10 log10(Σ ||W x||² / Σ ||(Ŵ - W) x||²) of each layer's
    stored weight Ŵ, over its inputs x in the first picture of the parity check (of the float model), None where it is
    stored without error. `compression` compares float PyTorch with
    PyTorch that has the stored weights, `total` the pictures of float PyTorch with the artifact's. `alignment` is
    the share of pictures that show all their prompt says, for `float_model`, `stored` (weights, in PyTorch) and
    `artifact`; None where nobody can tell, and `misread` what of its prompt each picture does not show. `call_seconds`
    is the median of a component's calls, on `machine`, in the runtime that drew. `zipped_bytes` are those of a download
    in which every file is deflated. `to_diffusers` is the float model's largest relative error while it is drawn
    here, against diffusers' own pipeline. `temporal` is None where nothing depends on the timestep alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    artifact_bytes: int = Field(gt=0)
    parameters: int = Field(gt=0)
    layer_snr_db: dict[str, float | None]
    compression: ParityReport
    total: ParityReport
    alignment: dict[str, float | None]
    to_diffusers: float
    misread: dict[str, list[list[str]]] = Field(default_factory=dict)
    memory: dict[str, MemoryFigures]
    call_seconds: dict[str, float] = Field(default_factory=dict)
    machine: str = ""
    zipped_bytes: int | None = None
    stage_seconds: dict[str, float]
    lowering: dict[str, LoweringCost] = Field(default_factory=dict)
    fine_tuning: dict[str, HeldOutLoss] = Field(default_factory=dict)
    candidates: dict[str, CandidateLosses] = Field(default_factory=dict)
    reconstruction: dict[str, BlockError] = Field(default_factory=dict)
    temporal: TemporalFigures | None = None


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows.

    `parity` is the lowering gap by runtime, the one that drew the pictures first: stored weights in PyTorch against
    the artifact.
    """

    manifest: Manifest
    plan: Plan
    tradeoff: tuple[TradeoffPoint, ...]
    parity: dict[str, ParityReport]
    measurements: Measurements
    pictures: tuple[DrawnPicture, ...]

    def save(self, folder: Path) -> None:
        """Writes all but the manifest, which lies in the artifact, to `folder`."""
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        texts = {
            TRADEOFF: json.dumps([asdict(point) for point in self.tradeoff], indent=1),
            PARITY: _REPORTS.dump_json(self.parity, indent=1).decode(),
            MEASUREMENTS: self.measurements.model_dump_json(indent=1),
            f"{PICTURES}/{PROMPTS}": json.dumps([drawn.prompt for drawn in self.pictures], indent=1),
        }
        self.plan.save(folder / PLAN)
        for name, text in texts.items():
            write_atomically(folder / name, (text + "\n").encode())
        for index, drawn in enumerate(self.pictures):
            for kind in ("float", "stored", "artifact"):
                write_atomically(_picture_path(folder, index, kind), getattr(drawn, f"{kind}_png"))

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> Self:
        """Returns what `save` wrote. Raises TurbopocketError naming the first missing or damaged file."""
        prompts = _parsed(folder / PICTURES / PROMPTS, TypeAdapter(list[str]))
        data = cls(
            manifest=manifest,
            plan=_load_plan(folder / PLAN),
            tradeoff=_parsed(folder / TRADEOFF, TypeAdapter(tuple[TradeoffPoint, ...])),
            parity=_parsed(folder / PARITY, _REPORTS),
            measurements=_parsed(folder / MEASUREMENTS, TypeAdapter(Measurements)),
            pictures=tuple(_load_picture(folder, index, prompt) for index, prompt in enumerate(prompts)),
        )
        data._require_one_build(folder)
        return data

    def _require_one_build(self, folder: Path) -> None:
        """Raises TurbopocketError when the files in `folder` tell of different builds."""
        planned = {choice.layer for choice in self.plan.choices}
        if strangers := sorted(set(self.measurements.layer_snr_db) ^ planned):
            raise TurbopocketError(
                f"{folder / MEASUREMENTS} and {PLAN} differ in {len(strangers)} layers, {strangers[0]} first",
                hint="build again",
            )
        judged = len(self.measurements.total.pictures)
        if judged != len(self.pictures):
            raise TurbopocketError(
                f"{folder / MEASUREMENTS} judges {judged} pictures, {PICTURES}/{PROMPTS} lists {len(self.pictures)}",
                hint="build again",
            )


def _picture_path(folder: Path, index: int, kind: str) -> Path:
    return folder / PICTURES / f"{index:02d}.{kind}.png"


def _load_picture(folder: Path, index: int, prompt: str) -> DrawnPicture:
    float_png, stored_png, artifact_png = (
        _read_png(_picture_path(folder, index, kind)) for kind in ("float", "stored", "artifact")
    )
    return DrawnPicture(prompt, float_png, stored_png, artifact_png)


def _load_plan(path: Path) -> Plan:
    _read(path)
    try:
        plan = Plan.load(path)
    except TurbopocketError as error:
        raise TurbopocketError(str(error), hint="build again") from error
    except UnicodeDecodeError:
        raise TurbopocketError(f"{path} is damaged: it is not text", hint="build again") from None
    if not math.isfinite(plan.predicted_loss):
        raise TurbopocketError(f"{path} is damaged: its predicted loss is {plan.predicted_loss}", hint="build again")
    return plan


def _parsed(path: Path, adapter: TypeAdapter[T]) -> T:
    try:
        return adapter.validate_json(_read(path))
    except ValidationError as error:
        raise TurbopocketError(f"{path} is damaged: {validation_summary(error)}", hint="build again") from error


def _read_png(path: Path) -> bytes:
    content = _read(path)
    if not content.startswith(_PNG_START):
        raise TurbopocketError(f"{path} is damaged: it is not a PNG file", hint="build again")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise TurbopocketError(f"{path} can not be read: {reason}", hint="build again") from error
