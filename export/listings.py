# SPDX-License-Identifier: Apache-2.0
"""What can be asked for: weight formats on each target, and models."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from ..quant.formats import FORMATS, parse_format
from .budget import parameter_count
from .components import components_of
from .families import FAMILIES, load_shapes
from .families.source import BUNDLED
from .target import Kind
from .targets import TARGETS
from .units import format_bytes

SAMPLE_FORMATS = (
    *("fp32", "fp16", "int8-row", "int8-g32"),
    *("int4-row", "int4-g32", "int4-g32-asym", "int4-g64", "int4-g128"),
    *("lut4", "lut4-r16", "vq8-d4", "vq8-d4-out", "avq2x8-d8"),
)
SAMPLE_LAYERS: tuple[tuple[str, Kind, tuple[int, ...]], ...] = (
    ("Linear, 640 inputs", "linear", (640, 640)),
    ("Linear, 20 inputs", "linear", (80, 20)),
    ("Conv2d, 320 channels", "conv2d", (320, 320, 3, 3)),
    ("Conv2d, 4 channels", "conv2d", (320, 4, 3, 3)),
)
"""Layers as SDXL has them, and narrow ones that many formats do not fit."""


def format_rows() -> list[dict[str, Any]]:
    """Returns one row per format, target and sample layer: how it is stored, or the reason why it can not be."""
    rows = []
    for name in SAMPLE_FORMATS:
        form = parse_format(name)
        for target, (layer, kind, shape) in product(TARGETS, SAMPLE_LAYERS):
            reason = target.storable(form, kind, shape)
            stored_as = target.stored_as(form, kind) if reason is None else None
            rows.append(
                {
                    "format": name,
                    "target": target.name,
                    "layer": layer,
                    "shape": list(shape),
                    "bytes": None if reason else form.nbytes(shape),
                    "stored_as": stored_as,
                    "reason": reason,
                }
            )
    return rows


def show_formats(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints formats down and sample layers across: the operators that read the weight, or why it can not be."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    table = Table(header_style="bold")
    table.add_column("format")
    table.add_column("target")
    for layer in layers:
        table.add_column(layer)
    cells = {(row["format"], row["target"], row["layer"]): row for row in rows}
    for name, target in dict.fromkeys((row["format"], row["target"]) for row in rows):
        answers = [cells[name, target, layer] for layer in layers]
        table.add_row(name, target, *(_answer(cell) for cell in answers))
    console.print(table)
    for summary in dict.fromkeys(row["stored_as"] for row in rows if row["stored_as"] and ":" in row["stored_as"]):
        console.print(summary, highlight=False)
    console.print(f"every format: {', '.join(kind.syntax for kind in FORMATS)}", highlight=False)


def _answer(row: Mapping[str, Any]) -> str:
    """The operators alone: what a summary says after them is printed below the table."""
    return f"no: {row['reason']}" if row["stored_as"] is None else row["stored_as"].split(":")[0]


def model_rows() -> dict[str, list[dict[str, Any]]]:
    """Returns the bundled models, with what they weigh in fp16, and the pipeline classes that load."""
    pipelines = [
        {"pipeline_class": family.pipeline_class, "family": family.name, "modules": list(family.modules)}
        for family in FAMILIES
    ]
    return {"bundled": [_bundled_row(name) for name in BUNDLED], "pipelines": pipelines}


def _bundled_row(name: str) -> dict[str, Any]:
    if not BUNDLED[name].is_dir():
        return {"name": name, "installed": False, "family": None, "fp16_bytes": None, "image_size_px": None}
    model = load_shapes(name)
    return {
        "name": name,
        "installed": True,
        "family": model.family,
        "fp16_bytes": sum(2 * parameter_count(component) for component in components_of(model)),
        "image_size_px": model.image_size_px,
    }


def show_models(rows: Mapping[str, Sequence[Mapping[str, Any]]], console: Console) -> None:
    """Prints both lists for a person."""
    bundled = Table("bundled model", "family", "fp16", "picture", header_style="bold")
    for row in rows["bundled"]:
        if row["installed"]:
            side = row["image_size_px"]
            bundled.add_row(row["name"], row["family"], format_bytes(row["fp16_bytes"]), f"{side} x {side} px")
        else:
            bundled.add_row(row["name"], "", "", "its weights are not in this installation")
    pipelines = Table("pipeline class that loads", "family", "modules", header_style="bold")
    for row in rows["pipelines"]:
        pipelines.add_row(row["pipeline_class"], row["family"], ", ".join(row["modules"]))
    console.print(bundled)
    console.print(pipelines)
