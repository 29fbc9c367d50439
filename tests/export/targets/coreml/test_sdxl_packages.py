# SPDX-License-Identifier: Apache-2.0
"""SDXL's real topology through the Core ML target: bytes at full width, numbers and memory at half. Takes minutes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ...published_sdxl import write_configs

pytest.importorskip("coremltools")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STAGES = Path(__file__).with_name("sdxl_packages.py")
MAX_RESIDENT_BYTES = 6 * 10**9
LEAST_SNR_DB = 60.0


def stage(name: str, *folders: Path) -> dict[str, Any]:
    """What one stage reports, run in a process of its own; printed, so that `make test-slow` shows it."""
    ran = subprocess.run(
        [sys.executable, str(STAGES), name, *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    report: dict[str, Any] = json.loads(ran.stdout)
    print(name, json.dumps(report, indent=2))
    return report


def test_full_sdxl_has_the_planned_bytes_in_every_package(tmp_path: Path) -> None:
    report = stage("full", write_configs(tmp_path / "sdxl"), tmp_path / "out")
    components = report["components"]
    assert components["unet"]["layers"] == 794
    assert list(components["unet"]["packages"]) == ["UnetChunk1.mlpackage", "UnetChunk2.mlpackage"]
    assert max(components["unet"]["packages"].values()) <= 2**30
    for name, component in components.items():
        on_disk = sum(component["packages"].values())
        assert component["planned"] == on_disk, name
        assert component["planned_before_formats"] == pytest.approx(on_disk, rel=0.01), name
    total = sum(sum(component["packages"].values()) for component in components.values())
    assert report["plan_bytes"] == pytest.approx(total, rel=0.01)


def test_half_of_sdxls_width_builds_and_computes_what_pytorch_does_in_6_gb(tmp_path: Path) -> None:
    built = stage("half", write_configs(tmp_path / "sdxl"), tmp_path / "out")
    assert built["package_bytes"] == built["planned"]
    assert built["peak_resident_bytes"] < MAX_RESIDENT_BYTES
    run = stage("evaluate", tmp_path / "out")
    assert run["fp32"]["snr_db"] >= LEAST_SNR_DB
    assert run["fp16"]["snr_db"] >= 40
    assert run["peak_resident_bytes"] < MAX_RESIDENT_BYTES
