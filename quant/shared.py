# SPDX-License-Identifier: Apache-2.0
"""A model that several processes of this machine run: each has its modules, and all of them map one set of tensors.

What is sent is the modules without tensors. Weights of layers stay in the checkpoint's files; everything else that is a
tensor goes into one file beside the results, once. So a process that takes part holds what it computes, no copies.
"""

import gc
import pickle
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..ground.files import write_whole
from ..ground.heap import give_back_freed
from .layers import StoredIn, TensorSource

ALIGNMENT = 64
"""Of what PyTorch allocates, in bytes: of vectors that begin elsewhere, products have other last digits."""

Value = TypeVar("Value")
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _File:
    """One file, told from any other that may lie in the same place on another machine."""

    path: Path
    inode: int
    nbytes: int
    changed_ns: int

    @classmethod
    def at(cls, path: Path) -> "_File":
        """Raises OSError where there is none."""
        found = path.stat()
        return cls(path, found.st_ino, found.st_size, found.st_mtime_ns)

    @property
    def is_here(self) -> bool:
        try:
            return _File.at(self.path) == self
        except OSError:
            return False


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: `stored` in a checkpoint, or a view of the bytes from `begin` to `end` of the shared file."""

    stored: StoredIn | None
    begin: int
    end: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_parameter: bool


@dataclass(frozen=True)
class Shared(Generic[Value]):
    """A value of which any process that reaches its files can have a twin. `name` is told apart from all others."""

    name: str
    packed: bytes
    places: tuple[_Place, ...]
    file: _File
    others: tuple[_File, ...]

    def opened(self) -> Value | None:
        """The twin, the same one each time until `keep_only` is told otherwise; None where not all files are here."""
        if _OPEN.name != self.name:
            _OPEN.keep(None)
            if not all(each.is_here for each in (self.file, *self.others)):
                return None
            _OPEN.name, _OPEN.value = self.name, _Unpacker(self).load()
        value: Value = _OPEN.value
        return value


class _Open:
    """What this process has opened."""

    name: str | None = None
    value: Any = None

    def keep(self, name: str | None) -> None:
        if self.name not in (None, name):
            self.name = self.value = None
            gc.collect()
            give_back_freed()


_OPEN = _Open()


@dataclass(frozen=True)
class SharedWork(Generic[Value, Job, Result]):
    """`work` of each job with a value that all of them share; None where that can not be opened."""

    shared: Shared[Value]
    work: Callable[[Value, Job], Result]

    def __call__(self, job: Job) -> Result | None:
        value = self.shared.opened()
        return None if value is None else self.work(value, job)


def keep_only(work: object) -> None:
    """Lets go of what this process has opened, unless it is for this work."""
    _OPEN.keep(work.shared.name if isinstance(work, SharedWork) else None)


def share(value: Value, path: Path) -> Shared[Value]:
    """The value for other processes, whose tensors that no checkpoint holds are written to `path`, whole or not at all.

    It must pickle but for tensors. Nothing may write into its tensors while others use it.
    """
    path = path.absolute()
    packed = BytesIO()
    packer = _Packer(packed)
    packer.dump(value)
    with write_whole(path) as partial, partial.open("wb") as stream:
        for begin, storage in packer.storages.values():
            stream.seek(begin)
            stream.write(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)
    others = tuple(_File.at(each) for each in sorted(packer.files))
    return Shared(secrets.token_hex(8), packed.getvalue(), tuple(packer.places), _File.at(path), others)


_HOOKS = tuple(name for name in nn.Module().__dict__ if "_hooks" in name)
"""Attributes of a module that say who is told when it runs: somebody of this process, such as transformers."""


def _constructed(module_class: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """A model of transformers, which is made and not only filled: its class then knows what models of it record."""
    with torch.device("meta"):
        return module_class(config)


class _Packer(pickle.Pickler):
    """Pickles everything but tensors, which get numbers, and paths, which get whole; modules without hooks."""

    def __init__(self, stream: BytesIO) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self.places: list[_Place] = []
        self.storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self.files: set[Path] = set()
        self._numbers: dict[int, tuple[int, Tensor]] = {}
        self._stored: dict[int, StoredIn] = {}
        self._end = 0

    def persistent_id(self, value: object) -> Any:
        if isinstance(value, TensorSource) and value.stored is not None:
            self._stored[id(value.values)] = StoredIn(value.stored.file.absolute(), value.stored.name)
            self.files.add(value.stored.file.absolute())
        if isinstance(value, Path):
            return str(value.absolute())
        if not isinstance(value, Tensor) or value.is_meta:
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.places), value
            self.places.append(self._place(value))
        return self._numbers[id(value)][0]

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, nn.Module):
            return NotImplemented
        if isinstance(getattr(value, "config", None), getattr(type(value), "config_class", None) or ()):
            held = {name: value.__dict__[name] for name in ("_parameters", "_buffers", "_modules", "training")}
            return _constructed, (type(value), value.config), held
        reduced: Any = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        make, arguments, state = reduced[:3]
        return make, arguments, {**state, **{name: OrderedDict() for name in _HOOKS}}

    def _place(self, value: Tensor) -> _Place:
        stored = self._stored.get(id(value))
        begin, end = (0, 0) if stored else self._written(value.untyped_storage())
        view = tuple(value.size()), tuple(value.stride()), int(value.storage_offset())
        return _Place(stored, begin, end, value.dtype, *view, isinstance(value, nn.Parameter))

    def _written(self, storage: torch.UntypedStorage) -> tuple[int, int]:
        """From where to where it will be in the file; once where several tensors are views of it."""
        begin, _ = self.storages.setdefault(storage._cdata, (self._end, storage))
        end = begin + storage.nbytes()
        self._end = max(self._end, -(-end // ALIGNMENT) * ALIGNMENT)
        return begin, end


class _Unpacker(pickle.Unpickler):
    def __init__(self, shared: Shared[Any]) -> None:
        super().__init__(BytesIO(shared.packed))
        self._places = shared.places
        self._bytes = _mapped(shared.file)
        self._files: dict[Path, Any] = {}
        self._tensors: dict[int, Tensor] = {}

    def persistent_load(self, number: Any) -> Any:
        if isinstance(number, str):
            return Path(number)
        if number not in self._tensors:
            self._tensors[number] = self._tensor(self._places[number])
        return self._tensors[number]

    def _tensor(self, place: _Place) -> Tensor:
        if place.stored is not None:
            values = self._stored(place.stored)
        else:
            values = torch.empty(0, dtype=place.dtype)
            values.set_(self._bytes[place.begin : place.end], place.offset, place.size, place.stride)
        return nn.Parameter(values, requires_grad=False) if place.is_parameter else values

    def _stored(self, stored: StoredIn) -> Tensor:
        if stored.file not in self._files:
            self._files[stored.file] = safe_open(stored.file, framework="pt")
        values: Tensor = self._files[stored.file].get_tensor(stored.name)
        return values


def _mapped(file: _File) -> torch.UntypedStorage:
    if not file.nbytes:
        return torch.UntypedStorage(0)
    mapped: Any = torch.UntypedStorage.from_file(str(file.path), False, file.nbytes)
    return mapped  # type: ignore[no-any-return]
