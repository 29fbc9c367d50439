# SPDX-License-Identifier: Apache-2.0
"""What passes for what the verbs make, without their work: folders of the right files, a manifest of one component."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from turbopocket.export.output.owned import KEY_FILE, write_record
from turbopocket.runtimes.manifest import ComponentSpec


@dataclass(frozen=True)
class OneComponent:
    """As much of a manifest as a runner reads."""

    components: Mapping[str, ComponentSpec]
    name: str = "part"
    plan: None = None


def put_artifact(folder: Path, text: str = "model") -> None:
    """An artifact of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_text(text)
    files = [{"path": "model.onnx", "bytes": len(text), "sha256": "0" * 64}]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def put_report(folder: Path, text: str = "report") -> None:
    """A report of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(text)
    write_record(folder)


def put_product(run: Path) -> Path:
    """What a stage of a build made: one layer's weights."""
    file = run / "compress-0123456789abcdef" / "unet.down_blocks.0.conv@int4-g32.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent / KEY_FILE).write_text("{}")
    file.write_text("layer")
    return file
