# SPDX-License-Identifier: Apache-2.0
"""Both gaps as a table for a terminal, and as the manifest's summary."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .emulated import Emulated
from .gaps import TO_DIFFUSERS_ERROR, Gaps


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
