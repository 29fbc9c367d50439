# SPDX-License-Identifier: Apache-2.0
"""What a model is, whatever it is called and wherever it lies: a hash of its content."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from ..families.base import LoadedModel

ADDED_WHEN_READ = ("_name_or_path", "_commit_hash", "name_or_path", "_use_default_values")
"""What libraries add to a config: where they read it, and which settings it left out, in the order of a set of strings,
which is another in each process."""


def model_identity(model: LoadedModel) -> str:
    """64 hexadecimal digits over weights, configs and tokenizers as they were loaded, LoRAs merged.

    It reads every weight: about a second for each gigabyte and core.
    """
    told = {
        "family": model.family.name,
        "tensors": _digests(model.modules),
        "configs": {name: _plain(module.config) for name, module in model.modules.items()},
        "scheduler": _plain(model.scheduler_config),
        "pipeline": _plain(model.pipeline_config),
        "tokenizers": {
            f"{name}/{path.name}": sha256(path.read_bytes()).hexdigest()
            for name, folder in model.tokenizers.items()
            for path in sorted(folder.iterdir())
            if path.is_file()
        },
    }
    return sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def module_identity(module: nn.Module) -> str:
    """64 hexadecimal digits over the tensors and config of one module, as they were loaded."""
    told = {"tensors": _digests({"": module}), "config": _plain(module.config)}
    return sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _digests(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The hash of each tensor by its module and name."""
    owners = {
        f"{component}.{path}.{name}": (owner, name)
        for component, module in modules.items()
        for path, owner in module.named_modules()
        for name, _ in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
    }
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # hashlib lets go of Python's lock
        return dict(zip(owners, threads.map(_digest, *zip(*owners.values(), strict=True)), strict=True))


def _digest(owner: nn.Module, name: str) -> str:
    tensor: Tensor = getattr(owner, name)  # a layer's weight is made here, and let go of
    digest = sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(config: Any) -> dict[str, Any]:
    values: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {str(key): value for key, value in values.items() if key not in ADDED_WHEN_READ}
