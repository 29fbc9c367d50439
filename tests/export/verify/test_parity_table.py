# SPDX-License-Identifier: Apache-2.0
"""The table that `build` and `check` print fits a terminal, whatever runs the artifact."""

import io

import pytest
from rich.console import Console

from turbopocket.export.verify.gaps import Difference, Gaps, Pictures, ToDiffusers
from turbopocket.export.verify.table import parity_table
from turbopocket.runtimes.compare.rows import Limits, ParityReport, ParityRow


def report(error: float) -> ParityReport:
    row = ParityRow(
        picture=0,
        component="text_encoder_2",
        timestep=None,
        output="text_embeds",
        max_abs_error=error,
        relative_error=error,
        snr_db=100.0,
        max_relative_error=1e-4,
    )
    return ParityReport(limits=Limits(), rows=[row], pictures=[])


@pytest.mark.parametrize("runtime", ["onnxruntime+kernels", "arm64:cortex-a76", "executorch"])
def test_every_column_is_whole_in_80(runtime: str) -> None:
    to_diffusers = ToDiffusers((Difference("the finished picture", 1.5e-7),))
    gaps = Gaps(to_diffusers, report(0.012), {runtime: report(3.21e-7)}, report(0.1), Pictures((), (), ()), {}, {})
    console = Console(file=io.StringIO(), width=80)
    console.print(parity_table(gaps))
    header, row = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert header.split() == ["component", "runtime", "compression", "lowering", "SNR", "dB", "limit", "verdict"]
    assert row.split() == ["text_encoder_2", runtime, "1.20e-02", "3.21e-07", "129.9", "1e-04", "passed"]
