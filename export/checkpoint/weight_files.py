# SPDX-License-Identifier: Apache-2.0
"""Which files of a component folder hold its weights: whole, sharded, or of a variant such as fp16."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...ground.errors import TurbopocketError
from .header import StoredTensor, read_header
from .json_object import read_json_object

SHARD = re.compile(r"-\d+-of-\d+.*\.safetensors$")
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def choose_weight_file(names: Collection[str], stem: str) -> str | None:
    """Returns the file to read weights from: the plain one, else a shard index, else a variant, else None.

    Raises TurbopocketError when there are several variants and no plain file, for either would be a guess.
    """
    for plain in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
        if plain in names:
            return plain
    variant = re.compile(rf"{re.escape(stem)}(\.[A-Za-z0-9_]+\.safetensors|\.safetensors\.index\.[A-Za-z0-9_]+\.json)")
    variants = sorted(name for name in names if variant.fullmatch(name))
    if len(variants) > 1:
        raise TurbopocketError(
            f"{len(variants)} variants of {stem}.safetensors and no plain one: {', '.join(variants)}",
            hint=f"rename the one to use to {stem}.safetensors",
        )
    return variants[0] if variants else None


def stored_tensors(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """Returns the tensors that a component folder's weight files hold, by name, from the headers alone.

    Raises TurbopocketError when the folder has no safetensors weights, only pickled ones, or broken ones.
    """
    chosen = choose_weight_file({path.name for path in folder.iterdir()}, stem)
    if chosen is None:
        raise _no_weights(folder, stem)
    return read_header(folder / chosen) if chosen.endswith(".safetensors") else _sharded(folder / chosen)


@dataclass(frozen=True)
class KnownTensors:
    """Stored tensors by name, as the file `where` says; None where no more than a name is there."""

    where: Path
    tensors: Mapping[str, StoredTensor | None]


def known_tensors(folder: Path, stem: str) -> KnownTensors | None:
    """Returns what a component folder says of its tensors, be it an index whose shards lie elsewhere; None for nothing.

    Raises TurbopocketError for an index or a header that is none.
    """
    chosen = choose_weight_file({path.name for path in folder.iterdir()}, stem)
    if chosen is None:
        return None
    where = folder / chosen
    is_index = chosen.endswith(".json")
    return KnownTensors(where, dict.fromkeys(_weight_map(where)) if is_index else read_header(where))


def _no_weights(folder: Path, stem: str) -> TurbopocketError:
    names = sorted(path.name for path in folder.iterdir())
    named_otherwise = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if Path(name).suffix in PICKLED_SUFFIXES]
    if pickled and not named_otherwise:
        return TurbopocketError(
            f"{folder} holds weights only as pickles ({', '.join(pickled)}), which can run code when opened; "
            "safetensors is allowed",
            hint=_conversion_command(folder) if {f"{stem}.bin", "pytorch_model.bin"} & {*pickled} else None,
        )
    whole = [name for name in named_otherwise if not SHARD.search(name)]
    only = (
        f"mv '{folder / whole[0]}' '{folder / stem}.safetensors'" if len(named_otherwise) == len(whole) == 1 else None
    )
    return TurbopocketError(
        f"{folder} has no weights: no {stem}.safetensors, no shard index, no variant of it; "
        f"it holds {', '.join(names) or 'nothing'}",
        hint=only,
    )


def _conversion_command(folder: Path) -> str:
    """The command by which diffusers saves a folder's pickles as safetensors, without running their code."""
    whole = (folder.parent / "model_index.json").is_file()
    name, pickled = ("DiffusionPipeline", folder.parent) if whole else ("UNet2DConditionModel", folder)
    return (
        f"""python -c "from diffusers import {name} as M; """
        f"""M.from_pretrained({str(pickled)!r}).save_pretrained({f"{pickled}-safetensors"!r})\""""
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise TurbopocketError(f"{index} has no weight_map from tensor names to file names")
    return weight_map


def _sharded(index: Path) -> dict[str, StoredTensor]:
    weight_map = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise TurbopocketError(f"{index} names the shard {shard!r}, which is no file beside it")
        tensors |= read_header(index.parent / shard)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise TurbopocketError(f"{index} places {name} in {shard}, which does not hold it")
    return tensors
