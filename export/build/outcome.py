# SPDX-License-Identifier: Apache-2.0
"""What a build came to, for the person who waited."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...quant.plan import Plan
from ..units import format_bytes
from ..verify.gaps import Gaps
from ..verify.table import parity_summary, show_parity, show_remarks


@dataclass(frozen=True)
class Built:
    """Where an artifact and its report lie, and what they came to.

    Attributes:
        folder: the artifact; report: the page in the folder beside it.
        total_bytes: of all files of the artifact.
        plan: the scheme of each layer, and the bytes that were planned.
        gaps: what compression changed and what lowering did, per component and timestep.
        unverified: what only a device can tell; notes: what to know of the model and of how it ran on this machine.
        stage_seconds: how long each stage took.
    """

    folder: Path
    report: Path
    total_bytes: int
    plan: Plan
    gaps: Gaps
    unverified: tuple[str, ...]
    notes: tuple[str, ...]
    stage_seconds: dict[str, float]

    @property
    def layers_by_scheme(self) -> dict[str, int]:
        """How many layers have each scheme, most first."""
        return dict(Counter(choice.scheme for choice in self.plan.choices).most_common())

    def summary(self) -> dict[str, Any]:
        """Returns the outcome as JSON values."""
        return {
            "artifact": str(self.folder),
            "report": str(self.report),
            "budget_bytes": self.plan.budget_bytes,
            "planned_bytes": self.plan.total_bytes,
            "total_bytes": self.total_bytes,
            "schemes": self.layers_by_scheme,
            "parity": parity_summary(self.gaps),
            "not_verified_on_device": list(self.unverified),
            "notes": list(self.notes),
            "stage_seconds": {name: round(seconds, 1) for name, seconds in self.stage_seconds.items()},
        }


def show_all(made: Sequence[Built], console: Console) -> None:
    """Prints one outcome after the other."""
    for built in made:
        show_built(built, console)


def show_built(built: Built, console: Console) -> None:
    """Prints what a build came to."""
    allowed = f" of {format_bytes(built.plan.budget_bytes)} allowed" if built.plan.budget_bytes else ""
    show_parity(built.gaps, console)
    show_remarks(built.unverified, built.notes, console)
    console.print(
        f"bytes     {format_bytes(built.total_bytes)}{allowed} (plan: {format_bytes(built.plan.total_bytes)})"
    )
    told = ", ".join(f"{layers} {scheme}" for scheme, layers in built.layers_by_scheme.items())
    console.print(f"layers    {told}", highlight=False, soft_wrap=True)
    console.print(f"artifact  {built.folder}", soft_wrap=True)
    console.print(f"report    {built.report}", soft_wrap=True)
