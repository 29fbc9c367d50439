# SPDX-License-Identifier: Apache-2.0
"""What a build's calibration hands to an observation that no file of ours knows."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.build.bench import make_workbench, parity_session
from turbopocket.export.build.calibration import calibrated
from turbopocket.export.build.journal import Journal
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.ground.names import CallPlace, LayerName
from turbopocket.quant.observe import OBSERVATIONS, Observation
from turbopocket.quant.workers import in_turn


class Places(Observation[Counter[CallPlace]]):
    """How often a layer ran at each place."""

    def begin(self, layer: nn.Module) -> None:
        self.found = Counter[CallPlace]()

    def see(self, place: CallPlace, x: Tensor, y: Tensor) -> None:
        self.found[place] += 1

    def value(self) -> Counter[CallPlace]:
        return self.found

    @classmethod
    def packed(cls, value: Counter[CallPlace]) -> dict[str, Tensor]:
        text = json.dumps([[asdict(place), count] for place, count in value.items()])
        return {"json": torch.tensor(list(text.encode()), dtype=torch.uint8)}

    @classmethod
    def unpacked(cls, parts: Mapping[str, Tensor]) -> Counter[CallPlace]:
        found = json.loads(bytes(parts["json"].tolist()))
        return Counter({CallPlace(**place): count for place, count in found})


def test_a_build_says_where_in_drawing_each_layer_ran(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBSERVATIONS, "places", Places)
    asked = {"steps": 3, "guidance": 2.5}
    recipe = make_recipe(
        {"model": {"source": str(tiny_sd)}, "sampler": asked, "calibrate": {"pictures": 2}, "parity": {"pictures": 1}},
        "test",
    )
    bench = make_workbench(recipe, (), StageProgress(quiet=True), in_turn)
    bench.target.write_side_files(bench.model, bench.traced, bench.draft.image.size, tmp_path)
    stats = calibrated(bench, parity_session(bench, tmp_path), Journal(tmp_path / "run", "any model"))
    for name, layer in stats.items():
        component = LayerName.parse(name).component
        places = layer[Places]
        assert {place.component for place in places} == {component}
        assert {place.picture for place in places} == {0, 1}
        if component == "unet":
            assert len(places) == 2 * 3 * 2
            assert {place.guided for place in places} == {True, False}
            timesteps = {place.step: place.timestep for place in places}
            assert list(timesteps) == [0, 1, 2]
            assert timesteps[0] > timesteps[1] > timesteps[2]
        else:
            assert {(place.timestep, place.step) for place in places} == {(None, None)}
            asked_twice = {True, False} if component == "text_encoder" else {None}
            assert {place.guided for place in places} == asked_twice
