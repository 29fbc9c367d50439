# SPDX-License-Identifier: Apache-2.0
"""Operations that fp16 would ruin: sines of time steps, and norms of large values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component
from turbopocket.export.targets.coreml.precision import Fp32Region
from turbopocket.runtimes.coreml.evaluate.evaluator import Evaluator
from turbopocket.runtimes.coreml.file.program import Program

from .test_lower_coreml_layers import component_of, half_noise, lowered, run, snr_db, with_stored_weights


class Sines(nn.Module):
    """A time embedding as diffusers makes it, and a layer that reads it."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.embeddings import Timesteps

        self.sines = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.layer = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.sines(x.flatten()))[None]


def sines_snr_db(folder: Path) -> tuple[float, Program]:
    torch.manual_seed(0)
    component = component_of(Sines(), 5)
    program, weights = lowered(component, folder, "fp16")
    times = torch.tensor([[999.0, 749.0, 499.0, 249.0, 1.0]])
    return snr_db(run(program, times.numpy(), "fp16"), with_stored_weights(component, weights, times)), program


def test_sines_of_time_steps_are_computed_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, program = sines_snr_db(tmp_path / "kept")
    assert kept >= 60
    for op in program.operations:
        if op.kind in ("sin", "cos"):
            assert program.type_of(op.parameters["x"][0]).dtype.name == "FLOAT32"
    tables = [c.type for c in program.function.constants.values() if c.type.shape[-1:] == (16,)]
    assert "FLOAT32" in {table.dtype.name for table in tables}
    monkeypatch.setattr(Fp32Region, "_decide", lambda *_: set())
    assert sines_snr_db(tmp_path / "damaged")[0] <= kept - 15


def norm_component(epsilon: float = 1e-5) -> Component:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16, eps=epsilon)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return component_of(norm, 16, 24, 20)


def test_group_norm_survives_values_whose_square_is_no_fp16_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = norm_component()
    program, _ = lowered(component, tmp_path / "ours")
    for largest in (1e-3, 1.0, 300.0, 60_000.0):
        x = half_noise(1, 16, 24, 20)
        x = (x / x.abs().max() * largest).half().float()
        with torch.inference_mode():
            expected = component.module(x).numpy()
        for mode, least_db in (("fp32", 70.0), ("fp16", 55.0), ("acc16", 50.0)):
            assert snr_db(run(program, x.numpy(), mode), expected) >= least_db, (largest, mode)
    from turbopocket.export.targets.coreml import convert as coreml_convert

    monkeypatch.delitem(coreml_convert._TRANSLATIONS, "group_norm")
    damaged, _ = lowered(component, tmp_path / "theirs")
    found = run(damaged, x.numpy(), "fp16")
    assert not np.isfinite(found).all() or snr_db(found, expected) < 10


def test_no_sum_of_a_group_norm_can_overflow(tmp_path: Path) -> None:
    program, _ = lowered(norm_component(1e-6), tmp_path)
    x = 60_000 * torch.sign(half_noise(1, 16, 24, 20)).numpy()
    evaluator = Evaluator(program, "fp16", statistics=True)
    evaluator.run({"z": x.astype(np.float16)})
    assert not [op for op in evaluator.statistics if op.may_overflow]


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
@pytest.mark.parametrize("value", [0.0, 1e-4, 1.0, 1000.0])
def test_group_norm_of_a_constant_group_is_its_bias(value: float, epsilon: float, tmp_path: Path) -> None:
    component = norm_component(epsilon)
    program, _ = lowered(component, tmp_path)
    x = torch.full((1, 16, 24, 20), value).half().float()
    bias = component.module.get_parameter("vae_decoder.bias").detach().numpy()
    expected = np.broadcast_to(bias.reshape(1, 16, 1, 1), x.shape)
    np.testing.assert_allclose(run(program, x.numpy(), "fp16"), expected, atol=2e-3)
