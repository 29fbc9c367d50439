# SPDX-License-Identifier: Apache-2.0
"""What a build came to: numbers for the manifest, the report and the person who waited."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from ..quant.calibrate import LayerStats, weight_of
from ..quant.errors import OverBudget
from ..quant.formats import CompressedTensor
from ..quant.plan import LayerChoices, Plan
from ..quant.sensitivity import hessian_loss
from ..runtimes.manifest import FileEntry, Manifest, file_entries
from .report.page import DrawnPicture, TradeoffPoint
from .units import format_bytes
from .verify.emulated import Emulated
from .verify.gaps import TO_DIFFUSERS_ERROR, Gaps, Pictures

_WORST_NUMBER = -1.2345678901234567e-100


@dataclass(frozen=True)
class Built:
    """Where an artifact and its report lie, and what they came to."""

    folder: Path
    report: Path
    total_bytes: int
    plan: Plan
    gaps: Gaps
    unverified: tuple[str, ...]
    notes: tuple[str, ...]
    stage_seconds: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """Returns the outcome as JSON values."""
        return {
            "artifact": str(self.folder),
            "report": str(self.report),
            "budget_bytes": self.plan.budget_bytes,
            "planned_bytes": self.plan.total_bytes,
            "total_bytes": self.total_bytes,
            "parity": parity_summary(self.gaps),
            "not_verified_on_device": list(self.unverified),
            "notes": list(self.notes),
            "stage_seconds": {name: round(seconds, 1) for name, seconds in self.stage_seconds.items()},
        }


def parity_table(gaps: Gaps, emulated: Mapping[str, Emulated] | None = None) -> Table:
    """Returns both gaps per component and runtime, for a terminal; emulated CPUs also against this machine's."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))  # fits a terminal of 80 columns
    for column in ("component", "runtime"):
        table.add_column(column, no_wrap=True)
    for column in ("compression", "lowering", "SNR dB", "limit", "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    compression = gaps.compression.worst_errors
    reports = list(gaps.lowering.items())
    for cpu, each in (emulated or {}).items():
        reports += [(cpu, each.to_pytorch), ("  to x86-64", each.to_native)]
    for name in next(iter(gaps.lowering.values())).worst_errors:
        for runtime, report in reports:
            error = report.worst_errors[name]
            limit = next(row.max_relative_error for row in report.rows if row.component == name)
            verdict = "passed" if error <= limit else "failed"
            snr = f"{-20 * math.log10(error):.1f}" if error > 0 else "exact"
            table.add_row(name, runtime, f"{compression[name]:.2e}", f"{error:.2e}", snr, _limit(limit), verdict)
    return table


def show_parity(gaps: Gaps, console: Console, emulated: Mapping[str, Emulated] | None = None) -> None:
    """Prints both gaps, and how far the float model's loop is from that of diffusers."""
    console.print(parity_table(gaps, emulated))
    error, limit = gaps.to_diffusers.largest_error, _limit(TO_DIFFUSERS_ERROR)
    console.print(f"float     {error:.2e} from diffusers' own pipeline at most, {limit} allowed", highlight=False)


def _limit(value: float) -> str:
    short = f"{value:.0e}"
    return short if float(short) == value else f"{value:.1e}"


def show_built(built: Built, console: Console) -> None:
    """Prints what a build came to."""
    allowed = f" of {format_bytes(built.plan.budget_bytes)} allowed" if built.plan.budget_bytes else ""
    show_parity(built.gaps, console)
    show_remarks(built.unverified, built.notes, console)
    console.print(
        f"bytes     {format_bytes(built.total_bytes)}{allowed} (plan: {format_bytes(built.plan.total_bytes)})"
    )
    console.print(f"artifact  {built.folder}", soft_wrap=True)
    console.print(f"report    {built.report}", soft_wrap=True)


def show_remarks(unverified: Sequence[str], notes: Sequence[str], console: Console) -> None:
    """Prints what only a device can tell, if anything, and a line for each note."""
    if unverified:
        console.print(f"not verified on device: {'; '.join(unverified)}", highlight=False)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def parity_summary(gaps: Gaps) -> dict[str, Any]:
    """Returns what the manifest says of parity: worst relative errors, mean picture distances, alignment.

    `to_diffusers` is of the float model: what our loop gives its networks and the screen, against diffusers' pipeline.
    """
    psnr_db = [row.psnr_db for row in gaps.total.pictures if row.psnr_db is not None]
    return {
        "passed": gaps.failure is None,
        "max_lowering_error": {name: report.limits.max_relative_error for name, report in gaps.lowering.items()},
        "lowering": {name: report.worst_errors for name, report in gaps.lowering.items()},
        "compression": gaps.compression.worst_errors,
        "to_diffusers": gaps.to_diffusers.largest_error,
        "pictures": len(gaps.total.pictures),
        "picture_psnr_db": sum(psnr_db) / len(psnr_db) if psnr_db else None,
        "picture_ssim": sum(row.ssim for row in gaps.total.pictures) / len(gaps.total.pictures),
        "alignment": gaps.alignment,
    }


def final_manifest(draft: Manifest, artifact: Path, plan: Plan, gaps: Gaps) -> Manifest:
    """Returns the draft with what is known now: the files as they lie in `artifact`, the plan and the parity."""
    values = draft.model_dump() | {
        "files": [entry.model_dump() for entry in file_entries(artifact)],
        "plan": _plan_summary(plan),
        "parity": parity_summary(gaps),
    }
    return Manifest.model_validate(values)


def expected_manifest_bytes(
    draft: Manifest,
    choices: Mapping[str, LayerChoices],
    files_to_come: Sequence[str],
    runtimes: Sequence[str],
    artifact: Path,
) -> int:
    """Returns the bytes of the finished manifest.json, at most: names as long and numbers as wide as they get."""
    formats = [candidate.format for layer in choices.values() for candidate in layer.candidates]
    files = file_entries(artifact) + [FileEntry(path=path, bytes=10**10, sha256="0" * 64) for path in files_to_come]
    numbers = dict.fromkeys(draft.components, _WORST_NUMBER)
    kinds = dict.fromkeys(("float_model", "stored", "artifact"), _WORST_NUMBER)
    values = draft.model_dump() | {
        "files": [entry.model_dump() for entry in files],
        "plan": {
            "budget_bytes": 10**10,
            "total_bytes": 10**10,
            "predicted_loss": _WORST_NUMBER,
            "formats": dict.fromkeys(choices, max(formats, key=len)),
        },
        "parity": {
            "passed": False,
            "max_lowering_error": dict.fromkeys(runtimes, _WORST_NUMBER),
            "lowering": dict.fromkeys(runtimes, numbers),
            "compression": numbers,
            "to_diffusers": _WORST_NUMBER,
            "pictures": 1000,
            "picture_psnr_db": _WORST_NUMBER,
            "picture_ssim": _WORST_NUMBER,
            "alignment": kinds,
        },
    }
    return len(Manifest.model_validate(values).model_dump_json(indent=2)) + 1


def _plan_summary(plan: Plan) -> dict[str, Any]:
    return {
        "budget_bytes": plan.budget_bytes,
        "total_bytes": plan.total_bytes,
        "predicted_loss": plan.predicted_loss,
        "formats": {choice.layer: choice.format for choice in plan.choices},
    }


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_budget(built_bytes: int, decided: Plan, prepacked: bool) -> None:
    """Raises OverBudget when the files came out larger than planned for: the budget holds on disk too."""
    if decided.budget_bytes is not None and built_bytes > decided.budget_bytes:
        raise OverBudget(
            f"the files came to {built_bytes:,} bytes, {built_bytes - decided.budget_bytes:,} over the budget of "
            f"{decided.budget_bytes:,} bytes; planned were {decided.total_bytes:,}",
            hint="prepacked weights are not in the plan: switch target.onnx.prepacked off" if prepacked else None,
        )


def layer_snr_db(
    weights: Mapping[str, CompressedTensor], layers: Mapping[str, nn.Module], stats: Mapping[str, LayerStats]
) -> dict[str, float | None]:
    """Returns 10 log10(tr[W H Wᵀ] / tr[E H Eᵀ]) of each layer's stored weight, None when it is stored without error."""
    found: dict[str, float | None] = {}
    for name, layer in layers.items():
        stored, weight = weights[name], weight_of(name, layer).detach().float()
        noise = hessian_loss(stored.format.decompress(stored) - weight, stats[name].hessian_KK)
        signal = hessian_loss(weight, stats[name].hessian_KK)
        found[name] = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None
    return found


def tradeoff_points(plans: Sequence[Plan]) -> tuple[TradeoffPoint, ...]:
    """Returns the report's curve."""
    return tuple(TradeoffPoint(plan.budget_bytes or 0, plan.total_bytes, plan.predicted_loss) for plan in plans)


def drawn_pictures(prompts: Sequence[str], pictures: Pictures) -> tuple[DrawnPicture, ...]:
    """Returns the pictures as PNG files in memory, three a prompt."""
    drawn = zip(prompts, pictures.float_model, pictures.stored, pictures.artifact, strict=True)
    return tuple(DrawnPicture(prompt, *(png_bytes(picture) for picture in three)) for prompt, *three in drawn)


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """Returns a uint8 [H, W, 3] picture as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="PNG")
    return data.getvalue()
