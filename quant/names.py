# SPDX-License-Identifier: Apache-2.0
"""What recipes call formats, schemes and fits: legal names, and what they stand for.

Nothing here needs PyTorch, so that a wrong name is refused before it is imported.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self, TypeVar

from ..ground.errors import TurbopocketError
from .activations import ActivationFormat

WIDTHS = (1, 2, 3, 4, 6, 8)
"""Legal code widths: a whole number of these codes fills at most 3 bytes."""
SHARED_BITS = 8
SHARED_LENGTHS = (4, 8)
"""Lengths of vectors for which there are codebooks that all layers of a component share."""
_VECTOR_LENGTHS = (2, 4, 8)
_MOST_CODEBOOKS = 4
_DENSE_BITS = (16, 32)
_FLOAT = "float"


class FormatName(ABC):
    """The name of a weight format as its parts; `str` is the name."""

    syntax: ClassVar[str]
    """How the names of this class are spelled, for error messages."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self | None:
        """The format of that name, or None when the name belongs to another class; inverse of `str`."""


@dataclass(frozen=True)
class DenseName(FormatName):
    """`fp16`, `fp32`."""

    bits: int

    syntax: ClassVar[str] = "fp16, fp32"

    def __post_init__(self) -> None:
        if self.bits not in _DENSE_BITS:
            raise TurbopocketError(f"a dense weight has 16 or 32 bits, not {self.bits}")

    def __str__(self) -> str:
        return f"fp{self.bits}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        return {"fp16": cls(16), "fp32": cls(32)}.get(text)


@dataclass(frozen=True)
class AffineName(FormatName):
    """`int8-row`, `int4-g32`, `int4-g32-asym` …: `group` columns share a scale, a whole row does when it is None."""

    bits: int
    group: int | None = None
    symmetric: bool = True

    syntax: ClassVar[str] = "int4-row, int8-row, int4-g<N>, int8-g<N>, each also with -asym"
    _name: ClassVar = re.compile(r"int(4|8)-(?:row|g([1-9][0-9]*))(-asym)?")

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise TurbopocketError(f"an integer weight has 4 or 8 bits, not {self.bits}")
        if self.group is not None and self.group < 1:
            raise TurbopocketError(f"a group has at least 1 column, not {self.group}")

    def __str__(self) -> str:
        spread = "row" if self.group is None else f"g{self.group}"
        return f"int{self.bits}-{spread}" + ("" if self.symmetric else "-asym")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = cls._name.fullmatch(text)
        if match is None:
            return None
        bits, group, asymmetric = match.groups()
        return cls(int(bits), int(group) if group else None, asymmetric is None)


@dataclass(frozen=True)
class PaletteName(FormatName):
    """`lut4`, `lut4-r16` …: `rows` neighbouring outputs share a table, the whole weight does when it is None."""

    bits: int
    rows: int | None = None

    syntax: ClassVar[str] = "lut<1|2|3|4|6|8>, each also with -r<N>"
    _name: ClassVar = re.compile(r"lut([123468])(?:-r([1-9][0-9]*))?")

    def __post_init__(self) -> None:
        require_codes(self.bits, self.rows)

    def __str__(self) -> str:
        return f"lut{self.bits}" + ("" if self.rows is None else f"-r{self.rows}")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = cls._name.fullmatch(text)
        if match is None:
            return None
        bits, rows = match.groups()
        return cls(int(bits), int(rows) if rows else None)


@dataclass(frozen=True)
class CodebookName(FormatName):
    """`vq8-d4`, `vq6-d2-out`, `vq8-d4-r64` …: `rows` neighbouring outputs share a codebook, or all do."""

    bits: int
    length: int
    along_outputs: bool = False
    rows: int | None = None

    syntax: ClassVar[str] = "vq<1|2|3|4|6|8>-d<2|4|8>, each also with -out, -r<N>, -out-r<N>"
    _name: ClassVar = re.compile(r"vq([123468])-d([248])(-out)?(?:-r([1-9][0-9]*))?")

    def __post_init__(self) -> None:
        require_codes(self.bits, self.rows)
        _require_length(self.length)

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"-r{self.rows}"
        return f"vq{self.bits}-d{self.length}" + ("-out" if self.along_outputs else "") + rows

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = cls._name.fullmatch(text)
        if match is None:
            return None
        bits, length, along_outputs, rows = match.groups()
        return cls(int(bits), int(length), along_outputs is not None, int(rows) if rows else None)


@dataclass(frozen=True)
class AdditiveName(FormatName):
    """`avq2x8-d8`, `avq3x8-d8-shared` …: `count` codebooks, with `shared` those of all layers of a component."""

    count: int
    bits: int
    length: int
    shared: bool = False

    syntax: ClassVar[str] = "avq<2|3|4>x<1|2|3|4|6|8>-d<2|4|8>, avq<2|3|4>x8-d<4|8>-shared"
    _name: ClassVar = re.compile(r"avq([2-4])x([123468])-d([248])(-shared)?")

    def __post_init__(self) -> None:
        require_codes(self.bits, None)
        if not 2 <= self.count <= _MOST_CODEBOOKS:
            raise TurbopocketError(f"a sum has 2 to {_MOST_CODEBOOKS} codebooks, not {self.count}; vq is for one")
        _require_length(self.length)
        if self.shared and (self.bits != SHARED_BITS or self.length not in SHARED_LENGTHS):
            raise TurbopocketError(
                f"shared codebooks have codes of {SHARED_BITS} bits and vectors of 4 or 8, not {self}"
            )

    def __str__(self) -> str:
        return f"avq{self.count}x{self.bits}-d{self.length}" + ("-shared" if self.shared else "")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = cls._name.fullmatch(text)
        if match is None:
            return None
        count, bits, length, shared = match.groups()
        return cls(int(count), int(bits), int(length), shared is not None)


FORMAT_NAMES: tuple[type[FormatName], ...] = (DenseName, AffineName, PaletteName, CodebookName, AdditiveName)
"""Every kind of name; `quant.formats.FORMATS` are the formats of these names, in the same order."""
RECONSTRUCT = "reconstruct"
FIT_NAMES = ("absmax", "mse", "gptq", "vqdm", RECONSTRUCT)
"""Every fit's name; `quant.fit.FITS` are the fits, in the same order."""

Name = TypeVar("Name", bound=FormatName)


class Parts(NamedTuple):
    """A scheme's: what it calls the weight's format, and how input and output are rounded."""

    weight: FormatName
    input: ActivationFormat | None
    output: ActivationFormat | None


def format_of(text: str, kinds: Sequence[type[Name]]) -> Name:
    """The format of that name among those kinds; TurbopocketError listing the legal names."""
    for kind in kinds:
        parsed = kind.parse(text)
        if parsed is not None:
            return parsed
    legal = ", ".join(kind.syntax for kind in kinds)
    raise TurbopocketError(f"`{text}` is not a weight format: known are {legal}")


def known_scheme(text: str) -> Parts:
    """The parts of the scheme of that name, the inverse of `scheme_name`; TurbopocketError listing what there is."""
    name, *activations = text.split("+")
    weight = format_of(name, FORMAT_NAMES)
    found = [None if each == _FLOAT else _activations(text, each) for each in activations]
    if len(found) > 2:
        raise TurbopocketError(f"`{text}` is not a scheme: after the weight format come activations, as in +a8-static")
    first, *second = found or [None]
    parts = Parts(weight, first, second[0] if second else outputs_with(first))
    if scheme_name(*parts) != text:
        raise TurbopocketError(f"`{text}` is written `{scheme_name(*parts)}`")
    return parts


def outputs_with(inputs: ActivationFormat | None) -> ActivationFormat | None:
    """How outputs are rounded where a name tells of inputs alone: too where scales are calibrated."""
    return None if inputs is None or inputs.scales == "dynamic" else inputs


def scheme_name(weight: FormatName, inputs: ActivationFormat | None, outputs: ActivationFormat | None) -> str:
    """What a scheme of these parts is called."""
    if inputs is None and outputs is None:
        return str(weight)
    if inputs is not None and outputs == outputs_with(inputs):
        return f"{weight}+{inputs}"
    return f"{weight}+{inputs or _FLOAT}+{outputs or _FLOAT}"


def _activations(text: str, name: str) -> ActivationFormat:
    found = ActivationFormat.parse(name)
    if found is None:
        raise TurbopocketError(f"`{text}`: `{name}` is no format of activations: known are {ActivationFormat.syntax}")
    return found


def known_fit(text: str) -> str:
    """The name itself; TurbopocketError listing the legal names."""
    if text not in FIT_NAMES:
        raise TurbopocketError(f"`{text}` is not a fit: known are {', '.join(FIT_NAMES)}")
    return text


def require_codes(bits: int, rows: int | None) -> None:
    """TurbopocketError when codes of that width, or tables for that many outputs, do not exist."""
    if bits not in WIDTHS:
        raise TurbopocketError(f"a code has {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]} bits, not {bits}")
    if rows is not None and rows < 1:
        raise TurbopocketError(f"a table serves at least 1 output channel, not {rows}")


def _require_length(length: int) -> None:
    if length not in _VECTOR_LENGTHS:
        raise TurbopocketError(f"a vector has 2, 4 or 8 weights, not {length}")
