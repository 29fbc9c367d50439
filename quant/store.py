# SPDX-License-Identifier: Apache-2.0
"""Statistics and stored weights as files: mappings by layer that read what is asked for, when it is asked for.

Tensors are views of mapped files: memory that the system may take back.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..ground.errors import TurbopocketError, of_layer
from ..ground.files import write_whole
from ..ground.reading import parse_json
from .formats import CompressedTensor, LayerFormat, parse_format
from .observe import OBSERVATIONS, InputIdentity, LayerStats, Observation

OBSERVED_FILE = "observed.safetensors"

Kind = type[Observation[Any]]


class StatsStore(Mapping[str, LayerStats]):
    """What was observed of every layer, in the order in which layers first ran.

    What is small is in one file, which `save_observed` writes. Values of a large observation are functions of a layer's
    inputs, and have a file each, one for all layers that were fed the same.
    """

    def __init__(self, folder: Path) -> None:
        """Raises TurbopocketError when there are no statistics, or damaged ones."""
        self.folder = folder
        self._small = _load_observed(folder / OBSERVED_FILE)

    def __getitem__(self, layer: str) -> LayerStats:
        return LayerStats(_Values(self.folder, self._small[layer]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._small)

    def __len__(self) -> int:
        return len(self._small)

    def large_file(self, layer: str, kind: Kind) -> Path:
        """Where the value of a large observation of a layer is, or would be."""
        return _large_file(self.folder, self._small[layer], kind)

    def save_large(self, layer: str, kind: Kind, value: Any) -> None:
        """Writes the value, for all layers that were fed the same."""
        save_tensors(self.large_file(layer, kind), kind.packed(value))


class _Values(Mapping[Kind, Any]):
    """The observations of one layer; a large one is read each time that it is asked for, also where this was sent to
    another process."""

    def __init__(self, folder: Path, small: Mapping[Kind, Any]) -> None:
        self._folder, self._small = folder, small

    def __getitem__(self, kind: Kind) -> Any:
        if not kind.large:
            return self._small[kind]
        with _opened(_large_file(self._folder, self._small, kind), "statistics") as file:
            return kind.unpacked({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def __iter__(self) -> Iterator[Kind]:
        return iter(self._small)

    def __len__(self) -> int:
        return len(self._small)


def _large_file(folder: Path, small: Mapping[Kind, Any], kind: Kind) -> Path:
    return folder / f"{_name_of(kind)}-{small[InputIdentity]}.safetensors"


def save_observed(folder: Path, stats: Mapping[str, LayerStats]) -> None:
    """Writes all observations that are not large, for a `StatsStore`: whole or not at all."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, dict[str, list[str]]] = {}
    for layer, values in stats.items():
        names[layer] = {}
        for name, kind in OBSERVATIONS.items():
            if not kind.large:
                parts = kind.packed(values[kind])
                names[layer][name] = list(parts)
                tensors |= {f"{layer}/{name}/{part}": tensor for part, tensor in parts.items()}
    save_tensors(folder / OBSERVED_FILE, tensors, {"observed": json.dumps(names)})


def _load_observed(path: Path) -> dict[str, dict[Kind, Any]]:
    with _opened(path, "statistics") as file:
        names = parse_json(file.metadata()["observed"], "observed")
        return {
            layer: {
                OBSERVATIONS[name]: OBSERVATIONS[name].unpacked(
                    {part: file.get_tensor(f"{layer}/{name}/{part}") for part in parts}
                )
                for name, parts in kinds.items()
                if name in OBSERVATIONS
            }
            for layer, kinds in names.items()
        }


def _name_of(kind: Kind) -> str:
    return next(name for name, each in OBSERVATIONS.items() if each is kind)


class WeightStore(Mapping[str, CompressedTensor]):
    """Stored weights of layers, a file each, read when they are asked for.

    A file is named by layer and format, so that one folder holds a layer in several.
    """

    def __init__(self, folder: Path, formats: Mapping[str, LayerFormat]) -> None:
        self.folder, self._formats = folder, formats

    def file(self, layer: str) -> Path:
        """Where a layer's weight is, or would be."""
        return _weight_file(self.folder, layer, self._formats[layer])

    def __getitem__(self, layer: str) -> CompressedTensor:
        return load_weights(self.file(layer))[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._formats

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)


class OverlaidStore(Mapping[str, CompressedTensor]):
    """Stored weights of layers, some of which another store has anew."""

    def __init__(self, below: Mapping[str, CompressedTensor], above: Mapping[str, CompressedTensor]) -> None:
        self._below, self._above = below, above

    def __getitem__(self, layer: str) -> CompressedTensor:
        return self._above[layer] if layer in self._above else self._below[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._below

    def __iter__(self) -> Iterator[str]:
        return iter(self._below)

    def __len__(self) -> int:
        return len(self._below)


class CandidateStore(Mapping[str, Sequence[CompressedTensor]]):
    """Layers as each of their formats stores them, a file each, named as in a `WeightStore`."""

    def __init__(self, folder: Path, formats: Mapping[str, Sequence[LayerFormat]]) -> None:
        self.folder, self._formats = folder, formats

    def file(self, layer: str, format: LayerFormat) -> Path:
        """Where a layer's weight in a format is, or would be."""
        return _weight_file(self.folder, layer, format)

    def has(self, layer: str) -> bool:
        """Whether a layer is there in all its formats; one of which none is kept is."""
        return all(self.file(layer, each).is_file() for each in self._formats.get(layer, ()))

    def __getitem__(self, layer: str) -> Sequence[CompressedTensor]:
        return [load_weights(self.file(layer, each))[layer] for each in self._formats[layer]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)


def _weight_file(folder: Path, layer: str, format: LayerFormat) -> Path:
    return folder / f"{layer}@{format}.safetensors"


def save_weights(path: Path, weights: Mapping[str, CompressedTensor]) -> None:
    """Writes the parts as safetensors tensors `<layer>.<part>`, formats and shapes in the metadata."""
    layers: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, stored in weights.items():
        layers[name] = {"format": str(stored.format), "shape": stored.shape}
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.parts.items()}
    save_tensors(path, tensors, {"compressed": json.dumps(layers)})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all; TurbopocketError when the disk does not take it.

    At most one metadata entry: safetensors writes several in no fixed order, and the bytes must not vary.
    """
    try:
        with write_whole(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:  # its I/O errors are of this class as well
        raise TurbopocketError(f"can not write {path}: {error}") from error


def load_weights(path: Path) -> dict[str, CompressedTensor]:
    """The weights saved at `path`; TurbopocketError naming the file, and the layer whose parts are wrong."""
    with _opened(path, "compressed weights") as file:
        layers = parse_json((file.metadata() or {})["compressed"], "compressed")
        return {name: _load_layer(file, name, **entry) for name, entry in layers.items()}


def _load_layer(file: safe_open, name: str, format: str, shape: list[int]) -> CompressedTensor:
    layer_format = parse_format(format)
    promised = layer_format.part_specs(tuple(shape))
    parts = {part: file.get_tensor(f"{name}.{part}") for part in promised}
    stored = CompressedTensor(layer_format, tuple(shape), parts)
    with of_layer(name):
        stored.require_promised_parts()
    return stored


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    """The safetensors file while the block reads it; whatever is wrong with it is one TurbopocketError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, TurbopocketError) as error:
        raise TurbopocketError(f"{path}: not a file of {what}: {error}") from error
