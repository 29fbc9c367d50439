# SPDX-License-Identifier: Apache-2.0
"""What can be asked for: schemes on each target, and models."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count, product
from string import ascii_lowercase
from typing import Any

from rich.console import Console
from rich.table import Table

from ..quant.activations import ActivationFormat
from ..quant.formats import FORMATS
from ..quant.scheme import parse_scheme
from .checkpoint.bundled import BUNDLED
from .checkpoint.load import load_shapes
from .families.components import components_of, parameter_count
from .families.registry import FAMILIES
from .targets.layer import Kind
from .targets.registry import default_targets
from .units import format_bytes

SAMPLE_SCHEMES = (
    *("fp32", "fp16", "int8-row", "int8-row+a8-dynamic", "int8-row+a8-static"),
    *("int8-row+a8-step", "int8-g32"),
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
    """Returns one row per scheme, target and sample layer: how it is stored, or the reason why it can not be.

    `scheme` is the one in which the target runs the format that the row is of.
    """
    rows = []
    for name in SAMPLE_SCHEMES:
        asked = parse_scheme(name)
        for target, (layer, kind, shape) in product(default_targets(), SAMPLE_LAYERS):
            reason = target.storable(asked, kind, shape)
            stored_as = target.stored_as(asked, kind) if reason is None else None
            rows.append(
                {
                    "format": name,
                    "target": target.name,
                    "layer": layer,
                    "shape": list(shape),
                    "scheme": None if reason else str(target.resolved(layer, asked, kind)),
                    "bytes": None if reason else asked.nbytes(shape),
                    "stored_as": stored_as,
                    "reason": reason,
                }
            )
    return rows


def show_formats(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints formats down and sample layers across: yes or no with a mark, and below what reads the weight, or why not.

    It fits 80 columns.
    """
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    operators = _marked((row["stored_as"] for row in rows if row["stored_as"]), ascii_lowercase)
    reasons = _marked((_reason(row) for row in rows if row["reason"]), map(str, count(1)))
    table = Table(header_style="bold", box=None, padding=(0, 1, 0, 0))
    table.add_column("format", no_wrap=True)
    table.add_column("target", no_wrap=True)
    for layer in layers:
        table.add_column(layer.replace(", ", ",\n"), no_wrap=True)
    cells = {(row["format"], row["target"], row["layer"]): row for row in rows}
    for name, target in dict.fromkeys((row["format"], row["target"]) for row in rows):
        answers = [cells[name, target, layer] for layer in layers]
        marks = [operators.get(answer["stored_as"]) or reasons[_reason(answer)] for answer in answers]
        table.add_row(
            name,
            target,
            *(f"{'no' if each['reason'] else 'yes'} {mark}" for each, mark in zip(answers, marks, strict=True)),
        )
    console.print(table)
    for title, notes in (("yes, read by", operators), ("no, because", reasons)):
        console.print(f"\n{title}", style="bold")
        listed = Table.grid(padding=(0, 1))
        for text, mark in notes.items():
            listed.add_row(mark, text)
        console.print(listed)
    console.print(f"\nevery format: {', '.join(kind.syntax for kind in FORMATS)}", highlight=False)
    console.print(f"with + behind it, of activations: {ActivationFormat.syntax}", highlight=False)


def _marked(notes: Iterable[str], marks: Iterable[str]) -> dict[str, str]:
    """One mark for each different note, in order."""
    return dict(zip(dict.fromkeys(notes), marks, strict=False))


def _reason(row: Mapping[str, Any]) -> str:
    """Without the format's name, which its line says: so one note serves many."""
    return str(row["reason"]).removesuffix(f" in {row['format']}").removesuffix(f" for {row['format']}")


def model_rows() -> dict[str, list[dict[str, Any]]]:
    """Returns the bundled models, with what they weigh in fp16, and the pipeline classes that load.

    `only_planned` says what a build lacks of those that `plan` alone takes.
    """
    pipelines = [
        {
            "pipeline_class": name,
            "family": family.name,
            "modules": list(family.modules),
            "only_planned": family.only_planned,
        }
        for family in FAMILIES.values()
        for name in family.pipeline_classes
    ]
    return {"bundled": [_bundled_row(name) for name in BUNDLED], "pipelines": pipelines}


def _bundled_row(name: str) -> dict[str, Any]:
    if not BUNDLED[name].is_dir():
        return {"name": name, "installed": False, "family": None, "fp16_bytes": None, "image_size": None}
    model = load_shapes(name)
    return {
        "name": name,
        "installed": True,
        "family": model.family.name,
        "fp16_bytes": sum(2 * parameter_count(component) for component in components_of(model)),
        "image_size": str(model.image_size),
    }


def show_models(rows: Mapping[str, Sequence[Mapping[str, Any]]], console: Console) -> None:
    """Prints both lists for a person."""
    bundled = Table("bundled model", "family", "fp16", "picture", header_style="bold")
    for row in rows["bundled"]:
        if row["installed"]:
            picture = f"{row['image_size']} px"
            bundled.add_row(row["name"], row["family"], format_bytes(row["fp16_bytes"]), picture)
        else:
            bundled.add_row(row["name"], "", "", "its weights are not in this installation")
    pipelines = Table("pipeline class that loads", "family", "modules", header_style="bold")
    for row in rows["pipelines"]:
        verbs = " (plan only)" if row["only_planned"] else ""
        pipelines.add_row(row["pipeline_class"] + verbs, row["family"], ", ".join(row["modules"]))
    console.print(bundled)
    console.print(pipelines)
