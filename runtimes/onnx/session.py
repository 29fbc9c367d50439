# SPDX-License-Identifier: Apache-2.0
"""Sessions of ONNX Runtime that stay small. Also runs on the emulated CPU: needs nothing but ONNX Runtime."""

from pathlib import Path

import onnxruntime as ort

_ERRORS_ONLY = 3


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Options under which memory is given back as soon as a tensor dies: no arena, no preplanned block.

    Weights in external data are mapped from the file, so pages of weights that are not repacked stay clean.
    """
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def open_session(
    model: str | bytes, threads: int | None = None, weights: str | None = None, operators: Path | None = None
) -> ort.InferenceSession:
    """A session on the CPU; `weights` is the folder of the external data, when it is not the model's own.

    `operators` is a library of our operators; without it their bodies in the file are run.
    """
    options = session_options(threads)
    if operators is not None:
        options.register_custom_ops_library(str(operators))
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
