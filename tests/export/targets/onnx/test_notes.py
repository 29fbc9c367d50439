# SPDX-License-Identifier: Apache-2.0
"""What `build` and `check` say of how an artifact ran on this machine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from rich.console import Console

from turbopocket.export.check import Checked
from turbopocket.export.targets.onnx.target import Onnx


@pytest.mark.parametrize("kernels", [None, Path("libcodebook_onnxruntime.so")], ids=["absent", "built"])
@pytest.mark.parametrize("domain", ["turbopocket", "com.microsoft"])
def test_missing_kernels_are_noted_in_one_line_where_codebooks_want_them(
    domain: str, kernels: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, used in (("text", ""), ("unet", domain)):
        graph = onnx.helper.make_graph([], "empty", [], [])
        opset = onnx.helper.make_opsetid(used, 1)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[opset]), tmp_path / name)
    specs = {name: SimpleNamespace(file=name) for name in ("text", "unet")}
    manifest: Any = SimpleNamespace(components=specs, files=[], total_bytes=0)
    monkeypatch.setattr("turbopocket.export.targets.onnx.target.onnx_operators", lambda: kernels)
    notes = Onnx().notes(tmp_path, manifest)
    checked, console = Checked(manifest, None, "no weights", (), notes), Console(record=True, width=40)
    checked.show(console)
    wanted = domain == "turbopocket" and kernels is None
    lines = [line for line in console.export_text().splitlines() if "make kernels" in line]
    assert len(lines) == len(notes) == len(checked.summary()["notes"]) == wanted
