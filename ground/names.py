# SPDX-License-Identifier: Apache-2.0
"""What layers and calls of a pipeline are called."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class LayerName(NamedTuple):
    """`unet.down_blocks.0.resnets.1.conv1` as its component and the module's path in it.

    The path is empty when the component itself is the layer.
    """

    component: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "LayerName":
        """The inverse of `str`."""
        component, _, path = text.partition(".")
        return cls(component, path)

    def __str__(self) -> str:
        return f"{self.component}.{self.path}" if self.path else self.component


@dataclass(frozen=True)
class CallPlace:
    """Where in drawing a component is called; None is what whoever draws did not say.

    Attributes:
        component: the component's name, "" before one is called.
        timestep: training timestep of a denoiser's call; None for components that have none.
        step: index of the call in the walk, from 0 where the noise is strongest.
        guided: False for what guidance steers away from, True for what the prompt asks for.
        picture: index of the picture that is drawn; where several are drawn at once, of the first of them.
    """

    component: str = ""
    timestep: float | None = None
    step: int | None = None
    guided: bool | None = None
    picture: int | None = None


_NOWHERE = CallPlace()
_CURRENT: ContextVar[CallPlace] = ContextVar("call_place", default=_NOWHERE)


def current_place() -> CallPlace:
    """The place of the call that is being made, as far as those who draw have said it."""
    return _CURRENT.get()


@contextmanager
def at_place(**known: Any) -> Iterator[None]:
    """While the block runs, calls are made at the current place with these of its fields changed.

    Runners know names and arrays only, and modules not even those; what watches a module finds the place here, so that
    no runner has to hand it on.
    """
    before = _CURRENT.set(replace(_CURRENT.get(), **known))
    try:
        yield
    finally:
        _CURRENT.reset(before)
