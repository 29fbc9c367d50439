# SPDX-License-Identifier: Apache-2.0
"""Sessions of ONNX Runtime that stay small. Also runs on the emulated CPU: needs nothing but ONNX Runtime."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from .. import limits
from ..kernels.library import require_whole

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

    `operators` is a library of our operators; without it their bodies in the file are run. OSError where it is cut off.
    """
    options = session_options(threads)
    if operators is not None:
        require_whole(operators)
        options.register_custom_ops_library(str(operators))
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    with limits.bounded(lambda: options.set_load_cancellation_flag(True)) as late:
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _told(error, late) from error


def run_session(session: ort.InferenceSession, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
    """The session's outputs in this order, in bounded memory and time."""
    options = ort.RunOptions()
    with limits.bounded(lambda: setattr(options, "terminate", True)) as late:
        try:
            found: list[Any] = session.run(list(outputs), dict(inputs), options)
        except Exception as error:
            raise _told(error, late) from error
    return found


def _told(error: Exception, late: threading.Event) -> Exception:
    """What ONNX Runtime raised, or that it was stopped."""
    return TimeoutError(f"it was stopped after {limits.MOST_SECONDS} s without an end") if late.is_set() else error
