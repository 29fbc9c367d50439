# SPDX-License-Identifier: Apache-2.0
"""The page that shows a person what a build cost: one HTML file that needs no network and no script."""

import base64
import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..output.staging import write_atomically
from ..units import format_bytes
from .data import (
    BlockError,
    CandidateLosses,
    DrawnPicture,
    FeatureRow,
    HeldOutLoss,
    LoweringCost,
    Measurements,
    ReportData,
    TemporalFigures,
    TradeoffPoint,
)
from .svg import scientific
from .view import page_view

__all__ = [
    "REPORT_NAME",
    "BlockError",
    "CandidateLosses",
    "DrawnPicture",
    "FeatureRow",
    "HeldOutLoss",
    "LoweringCost",
    "Measurements",
    "ReportData",
    "TemporalFigures",
    "TradeoffPoint",
    "write_report",
]

REPORT_NAME = "report.html"
_TEMPLATE = "page.html.jinja"


def write_report(folder: Path, data: ReportData) -> Path:
    """Returns the path of the page, now complete in `folder`; the same data gives the same bytes."""
    page = _environment().get_template(_TEMPLATE).render(page=page_view(data), data=data)
    path = folder / REPORT_NAME
    write_atomically(path, page.encode())
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "scientific": scientific,
        "png_uri": _png_uri,
        "db": _decibels,
        "mb": _megabytes,
        "mib": _mebibytes,
    }
    return environment


def _png_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _decibels(value: float | None) -> str:
    return "∞" if value is None or value == math.inf else f"{value:.1f}"


def _megabytes(count: int) -> str:
    return f"{count / 10**6:,.2f}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f}"
