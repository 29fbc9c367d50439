# SPDX-License-Identifier: Apache-2.0
"""Weights in the order in which one kind of CPU reads them, saved so that they need no private memory."""

import tempfile
from pathlib import Path

import onnx

from .data import DATA_FILE, MODEL_FILE

_INLINE_BYTES = 1024
_ENTRIES = {
    "session.optimized_model_external_initializers_file_name": DATA_FILE,
    "session.optimized_model_external_initializers_min_size_in_bytes": str(_INLINE_BYTES),
    "session.save_external_prepacked_constant_initializers": "1",
}
_ERRORS_ONLY = 3


def prepack(folder: Path) -> None:
    """Replaces the graph in `folder` by ONNX Runtime's optimised one with packed weights beside the plain ones.

    When it is loaded, packed weights are mapped from the file instead of being made in private memory. The data file
    about doubles, the graph is what this ONNX Runtime made of it for this CPU's instructions, and on another CPU
    weights are packed in memory again: for a fleet of one device, not for an artifact that is handed out.
    """
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary)
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.optimized_model_filepath = str(made / MODEL_FILE)
        for key, value in _ENTRIES.items():
            options.add_session_config_entry(key, value)
        ort.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
        _put_constants_first(made / MODEL_FILE)
        for name in (MODEL_FILE, DATA_FILE):
            (made / name).replace(folder / name)


def _put_constants_first(path: Path) -> None:
    """Moves nodes that read initializers only to the front again, for the reason that `lower` puts them there."""
    model = onnx.load(path, load_external_data=False)
    initializers = {tensor.name for tensor in model.graph.initializer}
    nodes = sorted(model.graph.node, key=lambda node: not initializers.issuperset(node.input))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path.write_bytes(model.SerializeToString(deterministic=True))
