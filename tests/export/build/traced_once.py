# SPDX-License-Identifier: Apache-2.0
"""Builds that trace nothing that was traced before: most of the time of so short ones, in which nothing is written."""

import pickle
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turbopocket.export.families.graphs import Component
from turbopocket.export.recipe import Recipe
from turbopocket.export.targets.base import Target
from turbopocket.export.targets.registry import open_target
from turbopocket.ground.files import write_whole
from turbopocket.runtimes.coreml.file.package import coremltools_module


def remember_traces(recipe: Recipe, folder: Path) -> None:
    """From now on the recipe's targets trace a component once for the values that it holds; it is then read from
    `folder`, by other processes as well."""
    for each in recipe.per_target().values():
        made = folder / each.target.name
        made.mkdir(parents=True, exist_ok=True)
        if each.target.name == "coreml":  # whose messages say that they are of this module
            sys.modules["MIL_pb2"] = coremltools_module("proto.MIL_pb2")
        _remember(type(open_target(each.target)), made)


def _remember(target: type[Target], folder: Path) -> None:
    honest = target.trace

    def trace(self: Target, component: Component) -> Any:
        file = folder / f"{component.name}-{_fingerprint(component.module)}"
        if not file.is_file():
            made: Any = honest(self, component)
            apart = replace(made, source=None) if hasattr(made, "source") else made
            with write_whole(file) as partial:
                partial.write_bytes(pickle.dumps(apart))
            return made
        found = pickle.loads(file.read_bytes())
        return replace(found, source=component) if hasattr(found, "source") else found

    target.trace = trace  # type: ignore[method-assign]


def _fingerprint(module: nn.Module) -> str:
    told = sha256()
    for name, tensor in sorted([*module.named_parameters(remove_duplicate=False), *module.named_buffers()]):
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            told.update(tensor.detach().flatten().clone().view(torch.uint8).numpy())
    return told.hexdigest()[:16]
