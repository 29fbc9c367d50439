# SPDX-License-Identifier: Apache-2.0
"""Building a family's modules from their configs, and filling them strictly from safetensors."""

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...ground.errors import TurbopocketError
from ...ground.reading import one_sentence
from ...quant.layers import StoredIn, TensorSource, is_compressible, set_source
from ..families.base import ModuleSpec
from ..families.keys import check_config, constructor_defaults, given_to_class, shown
from .header import FLOAT_DTYPES, StoredTensor
from .json_object import read_json_object
from .weight_files import known_tensors

MAPPED_DTYPES = ("F32", "F16", "BF16")
"""Those that fp32 holds exactly."""
# transformers saved this constant buffer in older files; the module computes it.
HARMLESS_EXTRA = re.compile(r"(.*\.)?embeddings\.position_ids")
ROWS_COMPARED = 1024
NAMES_SHOWN = 5
ABOUT_FILE = ("_class_name", "_diffusers_version")
"""What a diffusers config keeps beside the constructor's parameters."""


def empty_module(folder: Path, spec: ModuleSpec) -> nn.Module:
    """Returns the module that `config.json` describes, its parameters on the meta device, its buffers real.

    Raises TurbopocketError when the config is absent, of another class, or asks for what our graphs lack.
    """
    path = folder / "config.json"
    config = _own_part(read_json_object(path))
    if config.get("_class_name", spec.class_name) not in spec.class_names:
        raise TurbopocketError(f"{path} is of class {shown(config['_class_name'])}; supported: {spec.class_name!r}")
    module_class: Any = getattr(importlib.import_module(spec.library), spec.class_name)
    config_class = getattr(module_class, "config_class", None)  # transformers: a typed config object
    defaults = constructor_defaults(config_class or module_class)
    check_config(config, spec.keys, defaults, path, spec.titled)
    given = given_to_class(config, spec.keys, defaults)
    with one_sentence(f"{path} does not describe {spec.titled}"), init_empty_weights(include_buffers=False):
        if config_class is not None:
            module = module_class(config_class(**given))
        else:
            own = config | dict.fromkeys(config.keys() & {"_class_name"}, spec.class_name)
            about = {key: own[key] for key in ABOUT_FILE if key in own}
            module = module_class.from_config(about | given)
    empty: nn.Module = module.eval().requires_grad_(False)
    return empty


def _own_part(config: dict[str, Any]) -> dict[str, Any]:
    """The text encoder's part of a config that was copied from a whole CLIP, as transformers reads it; else all."""
    part = config.get("text_config")
    return part if config.get("model_type") == "clip" and isinstance(part, dict) else config


def checked_tensors(
    module: nn.Module, found: Mapping[str, StoredTensor], where: Path, spec: ModuleSpec, hint: str | None = None
) -> dict[str, StoredTensor]:
    """Returns where each of the module's tensors is stored, by the module's names, of those `found` in `where`.

    Raises TurbopocketError when a tensor is missing, unexpected, of another shape (then with `hint`) or dtype.
    """
    stored = _with_tied(_renamed(found, spec), spec)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check_names_and_shapes(expected, stored, where, hint)
    for tensor in stored.values():
        if tensor.dtype not in FLOAT_DTYPES:
            allowed = ", ".join(FLOAT_DTYPES)
            raise TurbopocketError(f"{tensor.file}: {tensor.name} is {tensor.dtype}; allowed: {allowed}")
    return stored


def check_known_tensors(module: nn.Module, folder: Path, spec: ModuleSpec) -> None:
    """Returns when what a component's folder says of its tensors, if anything, is true of the module's.

    Raises TurbopocketError when one is missing, unexpected or of another shape.
    """
    if (known := known_tensors(folder, spec.weights_stem)) is None:
        return
    twice = {alias for alias, owner in spec.tied.items() if owner in known.tensors and alias not in known.tensors}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in twice}
    _check_names_and_shapes(expected, known.tensors, known.where, None)


def fill_weights(module: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Afterwards the module's parameters are the stored ones in fp32; raises as `read_tensors` does.

    Weights of Linear and Conv2d stay in the mapped file, in the type they have there, until a layer runs. So does what
    only a slice or a transposition of the stored values is; fp64 does not, nor what has two names in the module.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in stored.items():
        names.setdefault(id(tensor), []).append(name)
    layers = {
        f"{path}.weight": layer
        for path, layer in module.named_modules()
        if is_compressible(layer) and stored[f"{path}.weight"].dtype in MAPPED_DTYPES
    }
    mapped = {name: stored[name] for name in layers if len(names[id(stored[name])]) == 1}
    small = {name: tensor for name, tensor in stored.items() if name not in mapped}
    module.load_state_dict(read_tensors(small), strict=False, assign=True)
    module.requires_grad_(False)
    for name, values in _read(mapped, torch.Tensor.detach).items():
        tensor = mapped[name]
        set_source(layers[name], TensorSource(values, None if tensor.steps else StoredIn(tensor.file, tensor.name)))


def _renamed(stored: Mapping[str, StoredTensor], spec: ModuleSpec) -> dict[str, StoredTensor]:
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if HARMLESS_EXTRA.fullmatch(name):
            continue
        for pattern, replacement in spec.renames:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise TurbopocketError(f"{tensor.file}: {renamed[name].name} and {tensor.name} are one parameter")
        renamed[name] = tensor
    return renamed


def _with_tied(stored: dict[str, StoredTensor], spec: ModuleSpec) -> dict[str, StoredTensor]:
    """The tensors under both names of those that have two; raises TurbopocketError where two different ones are stored,
    of which a class reads either."""
    for alias, owner in spec.tied.items():
        if owner in stored and alias in stored and not _equal(stored[owner], stored[alias]):
            raise TurbopocketError(
                f"{stored[alias].file}: {owner} and {alias} are one table, and two different ones are stored"
            )
        if (tensor := stored.get(owner, stored.get(alias))) is not None:
            stored[owner] = stored[alias] = tensor
    return stored


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether both have the same values; read in parts, since such tables are large."""
    if one.shape != other.shape:
        return False
    found = _read({"one": one, "other": other}, torch.Tensor.detach)
    parts = zip(found["one"].split(ROWS_COMPARED), found["other"].split(ROWS_COMPARED), strict=True)
    return all(torch.equal(a.float(), b.float()) for a, b in parts)


def _check_names_and_shapes(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor | None], where: Path, hint: str | None
) -> None:
    if missing := expected.keys() - stored.keys():
        raise TurbopocketError(f"{where}: {len(missing)} tensors are missing: {_shown(missing)}", hint)
    if unexpected := stored.keys() - expected.keys():
        raise TurbopocketError(
            f"{where}: {len(unexpected)} tensors are not in the model of config.json: {_shown(unexpected)}", hint
        )
    for name, tensor in stored.items():
        if tensor is not None and tensor.shape != expected[name]:
            raise TurbopocketError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(expected[name])}",
                hint,
            )


def _shown(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:NAMES_SHOWN]) + (" ..." if len(ordered) > NAMES_SHOWN else "")


def read_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Returns the values of stored tensors in fp32; raises TurbopocketError when any is NaN or infinite.

    Names of one and the same `StoredTensor` get one tensor.
    """
    return _read(stored, torch.Tensor.float)


def _read(stored: Mapping[str, StoredTensor], typed: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The values, each `typed` and found finite; they stay mapped where nothing changes them."""
    with ExitStack() as stack:
        files = {file: stack.enter_context(_opened(file)) for file in {t.file for t in stored.values()}}
        read: dict[int, Tensor] = {}  # what has two names is read, and kept, once
        for tensor in stored.values():
            if id(tensor) not in read:
                read[id(tensor)] = _finite(typed(_taken(files[tensor.file].get_tensor(tensor.name), tensor)), tensor)
        return {name: read[id(tensor)] for name, tensor in stored.items()}


def _taken(values: Tensor, tensor: StoredTensor) -> Tensor:
    for step in tensor.steps:
        values = step(values)
    return values


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise TurbopocketError(f"{file} is not a safetensors file: {error}") from None


def _finite(values: Tensor, tensor: StoredTensor) -> Tensor:
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():  # no temporary of the same size
        bad = int((~values.isfinite()).sum())
        raise TurbopocketError(
            f"{tensor.file}: {tensor.name} has {bad} of {values.numel()} values that are NaN or infinite"
        )
    return values
