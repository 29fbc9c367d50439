# SPDX-License-Identifier: Apache-2.0
"""What a build says of its denoiser's temporal features."""

from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.report.page import ReportData
from turbopocket.export.report.rewrite import rewrite_report
from turbopocket.runtimes.manifest import load_manifest


def test_a_build_tells_of_every_feature_at_every_step(built: Any) -> None:
    data = ReportData.load(built.report.parent, load_manifest(built.folder))
    temporal = data.measurements.temporal
    assert temporal is not None
    assert temporal.inputs == ("timestep", "text_embeds", "time_ids")
    assert {"unet.time_embedding.linear_1", "unet.add_embedding.linear_2"} < set(temporal.layers)
    ends = [name for name in temporal.layers if name.endswith("time_emb_proj")]
    assert [(row.step, row.layer) for row in temporal.features] == [(step, name) for step in (0, 1) for name in ends]
    assert [temporal.features[0].timestep, temporal.features[-1].timestep] == data.manifest.sampler.timesteps
    # Stored in 4 and 8 bits: not the same, and not another thing.
    assert all(0.9 < row.cosine < 1 - 1e-7 and 1e-4 < row.relative_error < 0.3 for row in temporal.features)
    page = built.report.read_text()
    assert "Temporal features" in page
    assert all(f"<code>{name}</code>" in page for name in temporal.layers)


@pytest.mark.parametrize("shift", [0, -8])
def test_the_page_counts_features_of_other_timesteps(artifact: Path, shift: int) -> None:
    file = artifact.with_name(f"{artifact.name}.report") / "measurements.json"
    file.write_text(file.read_text().replace('"shift": 0', f'"shift": {shift}', 1))
    page = rewrite_report(artifact).read_text()
    assert (">1</b> of" in page, "nearest to timestep" in page) == (shift != 0, shift != 0)
