# SPDX-License-Identifier: Apache-2.0
"""The finished manifest, and how many bytes it will have."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...ground.errors import OverBudget, TurbopocketError
from ...quant.fit.threads import in_threads
from ...quant.plan import LayerChoices, Plan
from ...quant.scheme import Scheme, parse_scheme
from ...runtimes.manifest import FileEntry, Manifest, file_entries
from ..verify.gaps import Gaps
from ..verify.table import parity_summary

_WORST_NUMBER = -1.2345678901234567e-100
_MOST_BYTES = 10**10
READ_AT_ONCE, DEFLATED_AT_ONCE = 2**20, 2**26
"""Bytes. Large files are deflated in parts, side by side; that a part does not know the 32 KB before it is nothing."""


def final_manifest(draft: Manifest, artifact: Path, plan: Plan, gaps: Gaps) -> Manifest:
    """Returns the draft with what is known now: the files as they lie in `artifact`, the plan and the parity."""
    by_step = any(scheme.is_by_step for scheme in plan.schemes.values())
    values = draft.model_dump() | {
        "only_these_steps": draft.only_these_steps or by_step,
        "files": [entry.model_dump() for entry in file_entries(artifact)],
        "plan": _plan_summary(plan),
        "parity": parity_summary(gaps),
    }
    return Manifest.model_validate(values)


def expected_manifest_bytes(
    draft: Manifest,
    choices: Mapping[str, LayerChoices],
    files_to_come: Sequence[str],
    runtimes: Sequence[str],
    artifact: Path,
    limited: bool = False,
) -> int:
    """Returns the bytes of the finished manifest.json, at most: names as long and numbers as wide as they get.

    `limited` is whether memory has a limit.
    """
    schemes = [candidate.scheme for layer in choices.values() for candidate in layer.candidates]
    files = file_entries(artifact) + [
        FileEntry(path=path, bytes=_MOST_BYTES, sha256="0" * 64) for path in files_to_come
    ]
    numbers = dict.fromkeys(draft.components, _WORST_NUMBER)
    kinds = dict.fromkeys(("float_model", "stored", "artifact"), _WORST_NUMBER)
    values = draft.model_dump() | {
        "files": [entry.model_dump() for entry in files],
        "plan": {
            "budget_bytes": _MOST_BYTES,
            "total_bytes": _MOST_BYTES,
            "predicted_loss": _WORST_NUMBER,
            **(_memory_summary(_MOST_BYTES, dict.fromkeys(draft.components, _MOST_BYTES)) if limited else {}),
            "schemes": dict.fromkeys(choices, max(schemes, key=len)),
        },
        "parity": {
            "passed": False,
            "max_lowering_error": dict.fromkeys(runtimes, _WORST_NUMBER),
            "lowering": dict.fromkeys(runtimes, numbers),
            "compression": numbers,
            "to_diffusers": _WORST_NUMBER,
            "pictures": 1000,
            "picture_psnr_db": _WORST_NUMBER,
            "picture_ssim": _WORST_NUMBER,
            "alignment": kinds,
        },
    }
    return len(Manifest.model_validate(values).model_dump_json(indent=2)) + 1


def planned_schemes(manifest: Manifest) -> dict[str, Scheme]:
    """The scheme of each layer as the manifest's plan has it; artifacts from before schemes have weight formats there.

    Raises TurbopocketError when the plan has neither.
    """
    plan = manifest.plan or {}
    found = plan.get("schemes", plan.get("formats"))
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise TurbopocketError(f"the manifest of {manifest.name} has a plan without its layers' schemes")
    return {layer: parse_scheme(text) for layer, text in found.items()}


def _plan_summary(plan: Plan) -> dict[str, Any]:
    return {
        "budget_bytes": plan.budget_bytes,
        "total_bytes": plan.total_bytes,
        "predicted_loss": plan.predicted_loss,
        **({} if plan.peak_memory_bytes is None else _memory_summary(plan.peak_memory_bytes, _peaks(plan))),
        "schemes": {choice.layer: choice.scheme for choice in plan.choices},
    }


def _peaks(plan: Plan) -> dict[str, int]:
    return {name: each.peak for name, each in plan.memory.items()}


def _memory_summary(allowed_bytes: int, peaks: Mapping[str, int]) -> dict[str, Any]:
    """What a runner reads that holds components open: no more than so much together."""
    return {"peak_memory_bytes": allowed_bytes, "component_peak_bytes": dict(peaks)}


def zipped_bytes(folder: Path) -> int:
    """Returns what all files come to when each is deflated (zlib's level 6), as a download or a package store does."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    parts = [(path, start) for path in files for start in range(0, max(1, path.stat().st_size), DEFLATED_AT_ONCE)]
    return sum(in_threads(_deflated_bytes, parts))


def _deflated_bytes(part: tuple[Path, int]) -> int:
    path, start = part
    packer, total = zlib.compressobj(6), 0
    with path.open("rb") as file:
        file.seek(start)
        for _ in range(0, DEFLATED_AT_ONCE, READ_AT_ONCE):
            total += len(packer.compress(file.read(READ_AT_ONCE)))
    return total + len(packer.flush())


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_budget(built_bytes: int, decided: Plan, not_in_plan: str | None) -> int:
    """Returns the bytes that were built: the budget holds on disk too.

    Raises OverBudget when the files came out larger than planned for.
    `not_in_plan` is what a target knows of bytes that its plans leave out.
    """
    if decided.budget_bytes is not None and built_bytes > decided.budget_bytes:
        raise OverBudget(
            f"the files came to {built_bytes:,} bytes, {built_bytes - decided.budget_bytes:,} over the budget of "
            f"{decided.budget_bytes:,} bytes; planned were {decided.total_bytes:,}",
            hint=not_in_plan,
        )
    return built_bytes
