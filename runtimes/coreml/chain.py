# SPDX-License-Identifier: Apache-2.0
"""Packages run one after the other, as the chunks of one model are; one package is a chain of one."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ..manifest import TensorSpec


class Engine(Protocol):
    """Something that runs one package, which messages call `where`."""

    @property
    def where(self) -> str:
        """The package's path."""
        ...

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """The package's own inputs."""
        ...

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """The package's own outputs."""
        ...

    @property
    def values(self) -> Collection[str]:
        """Names that `run` can also give."""
        ...

    def run(self, inputs: Mapping[str, NDArray[Any]], also: Sequence[str] = ()) -> Arrays:
        """The outputs by name, and the values named in `also`."""
        ...


def run_chain(
    engines: Sequence[Engine], inputs: Mapping[str, NDArray[Any]], also: Sequence[str] = ()
) -> tuple[Arrays, Arrays]:
    """The last package's outputs, and the values named in `also` that any package has.

    Each package gets, by name, what the given inputs and the outputs of all before it hold. TurbopocketError when
    one asks for a name that nothing before it made.
    """
    known, seen = dict(inputs), Arrays()
    outputs: Arrays = {}
    for engine in engines:
        names = [spec.name for spec in engine.inputs]
        if missing := [name for name in names if name not in known]:
            raise TurbopocketError(f"{engine.where}: input {missing[0]} is made by no package before it")
        here = [name for name in also if name in engine.values]
        found = engine.run({name: known[name] for name in names}, here)
        seen |= {name: found[name] for name in here}
        outputs = {spec.name: found[spec.name] for spec in engine.outputs}
        known |= outputs
    return outputs, seen
