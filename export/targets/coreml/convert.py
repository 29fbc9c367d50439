# SPDX-License-Identifier: Apache-2.0
"""A wrapped component as coremltools converts it: every layer one operator, no weights, hazards of fp16 avoided."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.frontend.torch import ops as torch_ops
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from coremltools.converters.mil.mil import Builder
from coremltools.converters.mil.mil.passes import pass_pipeline

from ....runtimes.coreml.file.blobs import BlobFile
from .interface import Wrapped
from .layer_op import TORCH_KIND, layers_intercepted, translate_layer
from .norm import scaled_group_norm
from .package import PACKAGE_PATHS
from .precision import Fp32Region

TARGETS = {"iOS17": ct.target.iOS17, "iOS18": ct.target.iOS18, "iOS26": ct.target.iOS26}

_DTYPES = {"float16": np.float16, "float32": np.float32}


@contextmanager
def converted(
    wrapped: Wrapped, path_by_weight: Mapping[int, str], deployment: str, region: Fp32Region
) -> Iterator[tuple[Any, BlobFile | None]]:
    """The model's protobuf message, and coremltools' file of its constants, if any; it lasts while the block runs."""
    with _quiet(), torch.no_grad(), layers_intercepted(path_by_weight):
        traced = torch.jit.trace(wrapped.module, wrapped.example_inputs(), check_trace=False)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "converted.mlpackage"
        with _quiet(), _translations():
            # coremltools numbers values through all programs of a process, until one is converted without error.
            Builder.name_count.clear()
            model = ct.convert(
                traced,
                inputs=[
                    ct.TensorType(name=spec.name, shape=tuple(spec.shape), dtype=_DTYPES[spec.dtype])
                    for spec in wrapped.inputs
                ],
                outputs=[ct.TensorType(name=name, dtype=_DTYPES[dtype]) for name, dtype in wrapped.outputs.items()],
                convert_to="mlprogram",
                minimum_deployment_target=TARGETS[deployment],
                compute_precision=ct.transform.FP16ComputePrecision(op_selector=region.allows_fp16),
                package_dir=str(package),
                skip_model_load=True,
            )
        weights = package / PACKAGE_PATHS[-1]
        yield model.get_spec(), BlobFile(weights) if weights.is_file() else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of this is the user's business: PyTorch says that tracing is old, that it takes shapes for constants, as
    meant here, and reads attributes that transformers has given up; coremltools draws bars, warns of an unknown
    PyTorch, and leaves a folder to the garbage collector.
    """
    logger = logging.getLogger("coremltools")
    level, bars = logger.level, (torch_ops._tqdm, pass_pipeline.tqdm)
    logger.setLevel(logging.ERROR)
    torch_ops._tqdm = pass_pipeline.tqdm = _without_bar
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
            warnings.filterwarnings("ignore", category=torch.jit._trace.TracerWarning)
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
            yield
    finally:
        logger.setLevel(level)
        torch_ops._tqdm, pass_pipeline.tqdm = bars


def _without_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


def _cast(context: Any, node: Any, dtype: Callable[[Any], Any], name: str) -> None:
    """coremltools' own, but for arrays of one element, which numpy 2.4 no longer takes for numbers."""
    (x,) = torch_ops._get_inputs(context, node, expected=1)
    if x.can_be_folded_to_const() and np.ndim(x.val) > 0:
        context.add(Builder.const(val=dtype(np.asarray(x.val).item()), name=node.name), node.name)
    else:
        _COREMLTOOLS_CAST(context, node, dtype, name)


_COREMLTOOLS_CAST = torch_ops._cast


def _alias(context: Any, node: Any) -> None:
    context.add(torch_ops._get_inputs(context, node)[0], torch_name=node.name)


def _gelu(context: Any, node: Any) -> None:
    """tanh stays tanh, also when it comes as a keyword."""
    x, *given = torch_ops._get_inputs(context, node)
    kind = given[0].val if given else "none"
    mode = {"tanh": "TANH_APPROXIMATION", "none": "EXACT"}[kind]
    context.add(Builder.gelu(x=x, mode=mode, name=node.name))


def _group_norm(context: Any, node: Any) -> None:
    x, groups, gamma, beta, epsilon, *_ = torch_ops._get_inputs(context, node)
    channels = x.shape[1]
    gamma_C = np.ones(channels, np.float32) if gamma is None else gamma.val
    beta_C = np.zeros(channels, np.float32) if beta is None else beta.val
    context.add(scaled_group_norm(x, int(groups.val), gamma_C, beta_C, float(epsilon.val), node.name))


_TRANSLATIONS = {
    TORCH_KIND: translate_layer,
    "alias": _alias,
    "gelu": _gelu,
    "group_norm": _group_norm,
}


@contextmanager
def _translations() -> Iterator[None]:
    """Our translations are coremltools' while the block runs, and no longer: other users of it see no change."""
    registry = _TORCH_OPS_REGISTRY.name_to_func_mapping
    originals = {name: registry.get(name) for name in _TRANSLATIONS}
    registry.update(_TRANSLATIONS)
    torch_ops._cast = _cast
    try:
        yield
    finally:
        torch_ops._cast = _COREMLTOOLS_CAST
        for name, original in originals.items():
            if original is None:
                del registry[name]
            else:
                registry[name] = original
