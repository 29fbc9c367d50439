# SPDX-License-Identifier: Apache-2.0
"""A traced program and a format per layer, put together to the packages that will be written; sizes from shapes."""

from collections.abc import Iterable, Iterator, Mapping

from ....ground.errors import TurbopocketError
from ....quant.formats import CompressedTensor
from ....quant.scheme import Scheme
from ....runtimes.coreml.file.dtypes import TensorType
from ....runtimes.coreml.interface import CHUNKS, package_file
from .blobs import blob_bytes
from .chunk import halves
from .emit import applied, emitted, weight_operations
from .form import Array, Form
from .mil import Message
from .package import PackageContent, package_content
from .stores import STORES
from .trace import LAYER, TracedProgram, used_only

_FRAME_BYTES = 8
"""An operation's tag and length among the others, at most."""

_LARGE = 2**31
"""Has as many digits as any offset or number of a blob in a package that a phone can hold."""


class Lowering:
    """A component's program with its layers in the given schemes (by full name).

    Raises TurbopocketError when these are not exactly the traced layers, or Core ML can not store one of them.
    """

    def __init__(self, traced: TracedProgram, schemes: Mapping[str, Scheme]) -> None:
        self.traced = traced
        forms = STORES.forms_of(traced.layers, schemes, traced.deployment)
        self.forms = {form.layer.path: form for form in forms.values()}
        self.blob_types = list(traced.rest_types)
        self._owner: list[tuple[str, int]] = []
        first_blobs = {}
        for path, form in self.forms.items():
            first_blobs[path] = len(self.blob_types)
            self._owner += [(path, at) for at in range(len(form.tensors()))]
            self.blob_types += form.tensors()
        self.operations = used_only(emitted(traced.operations, self.forms, first_blobs), traced.outputs)

    def packages(self) -> list[PackageContent]:
        """The package, or a UNet's chunks when it would pass the limit. Raises TurbopocketError when they would too."""
        traced = self.traced
        whole = self._content(None, self.operations, traced.inputs, traced.outputs)
        if not is_cut(traced, whole.nbytes):
            return [whole]
        parts = halves(self.operations, traced.inputs, traced.outputs, self.blob_types.__getitem__)
        chunks = [self._content(at, part.operations, part.inputs, part.outputs) for at, part in enumerate(parts, 1)]
        for chunk in chunks:
            if chunk.nbytes > traced.max_package_bytes:
                raise TurbopocketError(
                    f"{traced.component}: {chunk.file} would have {chunk.nbytes:,} bytes, "
                    f"{traced.max_package_bytes:,} are allowed in each of {CHUNKS} packages",
                    hint="use smaller formats, or allow larger packages",
                )
        return chunks

    def arrays(self, blobs: Iterable[int], weights: Mapping[str, CompressedTensor]) -> Iterator[Array]:
        """Values of blobs by number; the arrays of one layer at a time are held."""
        held: tuple[str, list[Array]] = ("", [])
        for blob in blobs:
            if blob < len(self.traced.rest):
                yield self.traced.rest[blob]
                continue
            path, at = self._owner[blob - len(self.traced.rest)]
            if held[0] != path:
                form = self.forms[path]
                held = (path, form.arrays(weights[form.layer.name]))
            yield held[1][at]

    def _content(
        self,
        chunk: int | None,
        operations: list[Message],
        inputs: Mapping[str, TensorType],
        outputs: Mapping[str, TensorType],
    ) -> PackageContent:
        file = package_file(self.traced.component, chunk)
        asked = self.traced.deployment, operations, inputs, outputs, self.blob_types.__getitem__
        return package_content(file, *asked, self.traced.card)


def is_cut(traced: TracedProgram, nbytes: int) -> bool:
    """Whether a component of that size becomes two packages: only UNets do, the Swift package knows no other."""
    return traced.component == "unet" and nbytes > traced.max_package_bytes


def skeleton_bytes(traced: TracedProgram) -> int:
    """Bytes of a package of everything but the layers, at most."""
    inner = [op for op in traced.operations if op.type != LAYER]
    file = package_file(traced.component)
    asked = traced.deployment, inner, traced.inputs, traced.outputs, traced.rest_types.__getitem__
    return package_content(file, *asked, traced.card).nbytes


def layer_bytes(form: Form, uses: Iterable[Message], constants: Mapping[str, Message]) -> int:
    """Bytes that a layer in that form takes in both files, at most; `uses` are its operations in the skeleton."""
    operations = [*weight_operations(form, _LARGE)]
    operations += [op for use in uses for op in applied(use, form, constants)]
    return sum(op.ByteSize() + _FRAME_BYTES for op in operations) + sum(map(blob_bytes, form.tensors()))
