# SPDX-License-Identifier: Apache-2.0
"""An .mlpackage on disk: the same program gives the same bytes, with nothing of the day or the machine in them."""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ....runtimes.coreml.file.dtypes import ARRAY_TYPES, TensorType
from ....runtimes.coreml.file.package import coremltools_module
from ...checkpoint.card import ModelCard
from .blobs import blob_offsets, write_blobs
from .mil import Message, blobs_of, describe, mil

SPEC_VERSIONS = {"iOS17": 8, "iOS18": 9, "iOS26": 10}
OPSETS = {"iOS17": "CoreML7", "iOS18": "CoreML8", "iOS26": "CoreML9"}
MODEL_FILE = "com.apple.CoreML/model.mlmodel"
WEIGHT_FOLDER = "com.apple.CoreML/weights"
PACKAGE_PATHS = ("Manifest.json", f"Data/{MODEL_FILE}", f"Data/{WEIGHT_FOLDER}/weight.bin")
"""All files of a package, by their path in it."""

DESCRIPTION = "{package} of a text-to-image diffusion pipeline; manifest.json beside it says how it is used"
FEATURES = {
    "input_ids": "ids of the prompt's tokens, padded to this length",
    "hidden_embeds": "states before the last layer, one a token",
    "last_hidden_state": "states of the last layer, one a token",
    "pooled_outputs": "the whole prompt's state, projected where the model does so",
    "sample": "noisy latents, one item for each time the denoiser is asked",
    "timestep": "timestep of the noise, the same for each item",
    "encoder_hidden_states": "text states as [items, width, 1, tokens]",
    "time_ids": "height, width, top, left, height, width of the picture in pixels",
    "text_embeds": "the second text encoder's pooled_outputs",
    "timestep_cond": "sines and cosines of the guidance scale",
    "noise_pred": "the predicted noise, or what else the scheduler's prediction_type says",
    "z": "clean latents over the scaling factor",
    "x": "a picture in -1..1, red, green and blue planes",
    "image": "the picture in -1..1, red, green and blue planes",
    "latent": "means, then logarithms of variances of the latents",
    "latent_sample": "latents, without their variance",
}
"""What a person who opens a package is told of its tensors."""
CROSSING = "what the next package of the component takes"
_CROSSING = ("FLOAT16", "FLOAT32", "INT32")
"""INT8 takes iOS26."""
_IDENTIFIERS = uuid.UUID("5f2a4b0e-6f0d-5c39-9d6b-3b1c1d0a7c55")


@dataclass(frozen=True)
class PackageContent:
    """One package to be: its file name, its model with final offsets, and the weight file's tensors in order.

    `blobs` are the numbers of those tensors among all of the component's.
    """

    file: str
    model: Message
    tensors: tuple[TensorType, ...]
    blobs: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Exact bytes of all files that `write_package` writes."""
        return self.model.ByteSize() + blob_offsets(self.tensors)[1] + len(_manifest())


def can_cross(tensor: TensorType) -> bool:
    """Whether a tensor of this type can be an input or an output of a package."""
    return tensor.dtype.name in _CROSSING and bool(tensor.shape)


def package_content(
    file: str,
    deployment: str,
    operations: Sequence[Message],
    inputs: Mapping[str, TensorType],
    outputs: Mapping[str, TensorType],
    blob_types: Callable[[int], TensorType],
    card: ModelCard,
) -> PackageContent:
    """The package of these operations, whose blobs are numbered; a number used twice is stored once."""
    program = mil().Program(version=1)
    function = program.functions["main"]
    function.opset = OPSETS[deployment]
    for name, tensor in inputs.items():
        describe(function.inputs.add(name=name).type, tensor)
    block = function.block_specializations[function.opset]
    block.outputs.extend(outputs)
    block.operations.extend(operations)
    values = [value.blobFileValue for operation in block.operations for value in blobs_of(operation)]
    blobs = list(dict.fromkeys(value.offset for value in values))
    tensors = tuple(blob_types(blob) for blob in blobs)
    offset_of = dict(zip(blobs, blob_offsets(tensors)[0], strict=True))
    for value in values:
        value.offset = offset_of[value.offset]
    model = coremltools_module("proto.Model_pb2").Model(specificationVersion=SPEC_VERSIONS[deployment])
    told = model.description.metadata
    told.shortDescription = DESCRIPTION.format(package=Path(file).stem)
    told.author, told.license = card.author or "", card.license or ""
    for features, ends in ((model.description.input, inputs), (model.description.output, outputs)):
        for name, tensor in ends.items():
            feature = features.add(name=name, shortDescription=FEATURES.get(name, CROSSING))
            array = feature.type.multiArrayType
            array.dataType = ARRAY_TYPES[tensor.dtype.name]
            array.shape.extend(tensor.shape)
    model.mlProgram.CopyFrom(program)
    return PackageContent(file, model, tensors, tuple(blobs))


def write_package(content: PackageContent, folder: Path, arrays: Iterable[NDArray[Any]]) -> None:
    """Writes `folder/<file>` with the values of `content.blobs`, in their order."""
    package = folder / content.file
    manifest, model, weights = (package / path for path in PACKAGE_PATHS)
    weights.parent.mkdir(parents=True)
    manifest.write_text(_manifest(), encoding="utf-8")
    model.write_bytes(content.model.SerializeToString(deterministic=True))
    write_blobs(weights, content.tensors, arrays)


def _manifest() -> str:
    items = {
        str(uuid.uuid5(_IDENTIFIERS, path)): {
            "author": "com.apple.CoreML",
            "description": description,
            "name": Path(path).name,
            "path": path,
        }
        for path, description in (
            (MODEL_FILE, "CoreML Model Specification"),
            (WEIGHT_FOLDER, "CoreML Model Weights"),
        )
    }
    root = str(uuid.uuid5(_IDENTIFIERS, MODEL_FILE))
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": root}
    return json.dumps(manifest, indent=4) + "\n"
