# SPDX-License-Identifier: Apache-2.0
"""Whether a file is a LoRA, told from its header: nothing here needs PyTorch, or the model that it is for."""

from pathlib import Path
from typing import Any

from ....ground.errors import TurbopocketError
from ....ground.reading import one_sentence
from ..header import FLOAT_DTYPES, ITEM_BYTES, StoredTensor, read_header_and_metadata
from ..single_file import describe
from .file import SUFFIX
from .names import other_adapter, split_name

ALLOWED = "allowed: LoRA, LoCon, LoHa and LoKr for text encoders and UNet"


def read_lora(file: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Returns the file's tensors, every one of a name and dtype that a LoRA has, and its metadata.

    Raises TurbopocketError when it is no safetensors file, or no LoRA.
    """
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "is not a file" if file.exists() else "does not exist"
        raise TurbopocketError(f"the LoRA {file} {found}; allowed: a {SUFFIX} file")
    if file.suffix.lower() != SUFFIX:
        raise TurbopocketError(f"the LoRA {file} is a {file.suffix or 'nameless'} file; allowed: {SUFFIX}")
    with one_sentence(f"the header of {file} can not be read"):
        stored, metadata = read_header_and_metadata(file)
        if strange := [name for name in stored if split_name(name) is None or other_adapter(name)]:
            known = {name: kind for name in strange if (kind := other_adapter(name))}
            example = next(iter(known), strange[0])
            kind = known.get(example) or (describe(file)[0] if len(strange) == len(stored) else "not all a LoRA")
            raise TurbopocketError(
                f"{file} is {kind}: {len(strange)} of its {len(stored)} tensors, such as {example!r} of shape "
                f"{list(stored[example].shape)}, can not be merged; {ALLOWED}"
            )
    if not stored:
        raise TurbopocketError(f"{file} holds no tensors; {ALLOWED}")
    for name, tensor in stored.items():
        allowed = ITEM_BYTES.keys() - {"BOOL"} if name.endswith(".alpha") else FLOAT_DTYPES
        if tensor.dtype not in allowed:
            raise TurbopocketError(f"{file}: {name} is {tensor.dtype}; allowed: {', '.join(FLOAT_DTYPES)}")
    return stored, metadata
