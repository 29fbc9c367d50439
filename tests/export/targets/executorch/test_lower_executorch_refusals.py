# SPDX-License-Identifier: Apache-2.0
"""What becomes no ExecuTorch program is refused by name; what is awkward becomes one all the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, vae_decoder_component
from turbopocket.export.targets.executorch import program as target
from turbopocket.export.targets.executorch.form import FormOptions
from turbopocket.export.targets.executorch.stores import form_of_weight
from turbopocket.export.targets.executorch.target import ExecuTorch
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import PartSpec, parse_format
from turbopocket.quant.scheme import Scheme, parse_scheme
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.executorch.runner import ExecuTorchRunner

from ...stand_ins import OneComponent
from .test_lower_executorch import Wrapped, component, compressed

pytest.importorskip("executorch")


class RowsThenPicture(nn.Module):
    """A convolution behind a residual of a transformer block, whose rows of features begin the chain to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 32)
        self.conv, self.last = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.out(self.norm(x.flatten(2).transpose(1, 2)))
        residual = rows.transpose(1, 2).unflatten(2, x.shape[2:]) + x
        return self.last(F.silu(self.conv(residual)) + residual)


def test_rounded_convolutions_behind_rows_of_features_lower_and_compute_what_pytorch_does(tmp_path: Path) -> None:
    """XNNPACK's own choice of delegates fails here: its layout pass moves the channels of the rows, which have none."""
    torch.manual_seed(0)
    module = Wrapped("part", RowsThenPicture().eval())
    part = Component("part", module, {"sample": torch.zeros(1, 32, 8, 8)}, ("picture",), role="denoiser")
    traced = target.trace(part)
    weights = compressed(part, dict.fromkeys(("out", "conv", "last"), "int8-row"))
    manifest: Any = OneComponent({"part": target.lower(traced, weights, tmp_path)})
    planned = target.lowered_bytes(traced, {name: Scheme(weight.format) for name, weight in weights.items()})
    assert (tmp_path / "part.pte").stat().st_size <= planned
    sample = {"sample": np.random.default_rng(1).standard_normal((1, 32, 8, 8), dtype=np.float32)}
    found = ExecuTorchRunner(tmp_path, manifest).run("part", sample)["picture"]
    rounding = torch_runner([target.as_run(part, weights, FormOptions())])
    assert relative_error(found, rounding.run("part", sample)["picture"]) < 1e-5
    assert relative_error(found, torch_runner([part]).run("part", sample)["picture"]) > 1e-3


def test_narrow_convolutions_between_group_norms_are_no_larger_than_planned(tmp_path: Path) -> None:
    """A VAE decoder in fp32: each convolution is a delegate, whose graph outweighs its few weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, layers_per_block=1).eval()
    decoder = vae_decoder_component(vae, (4, 4))
    traced = target.trace(decoder)
    weights = {
        name: parse_format("fp32").compress(decoder.module.get_parameter(f"{name}.weight"), ABSMAX)
        for name in traced.layers
    }
    spec = target.lower(traced, weights, tmp_path)
    found = (tmp_path / spec.file).stat().st_size
    planned = target.lowered_bytes(traced, {name: Scheme(weight.format) for name, weight in weights.items()})
    assert found <= planned <= found + 8_000


@pytest.mark.parametrize(
    ("text", "kind", "shape", "reason"),
    [
        ("int8-row", "linear", (64, 20), None),
        ("int8-row", "conv2d", (64, 20, 3, 3), None),
        ("int4-g32", "linear", (64, 64), None),
        ("int4-row", "linear", (64, 34), None),
        ("int4-g32", "conv2d", (64, 64, 1, 1), None),
        ("fp32", "conv2d", (64, 20, 3, 3), None),
        ("fp16", "linear", (64, 64), "widen fp16 to fp32"),
        ("int4-g32", "conv2d", (64, 64, 3, 3), "8 bits for convolutions"),
        ("int4-g48", "linear", (96, 96), "multiples of 32 columns, not 48"),
        ("int4-g32-asym", "linear", (64, 64), "no zero point"),
        ("int4-row", "linear", (64, 33), "an even number of columns, not 33"),
        ("int8-g32", "linear", (64, 64), "groups of scales for 4 bits only"),
        ("lut4", "linear", (64, 64), "turbopocket writes no linear for ExecuTorch in lut4"),
        ("vq8-d4", "conv2d", (64, 64, 3, 3), None),
        ("avq2x8-d8-shared", "linear", (64, 64), None),
        ("avq2x8-d8", "linear", (64, 20), "not a multiple of vector length 8"),
        ("avq2x6-d8", "linear", (64, 64), "codes of 8 bits, avq2x6-d8 has 6"),
        ("vq8-d4-r16", "linear", (64, 64), "one codebook of vectors along the inputs"),
    ],
)
def test_what_a_program_can_not_store_has_a_reason(
    text: str, kind: Any, shape: tuple[int, ...], reason: str | None
) -> None:
    found = ExecuTorch().storable(parse_scheme(text), kind, shape)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    "text", ["fp32", "int8-row", "int4-row", "int4-g32", "vq8-d4", "avq2x8-d8", "avq2x8-d8-shared"]
)
@pytest.mark.parametrize("shape", [(32, 64), (32, 64, 1, 1)])
def test_a_form_stores_the_constants_that_it_promises(text: str, shape: tuple[int, ...]) -> None:
    weight = parse_format(text).compress(torch.randn(shape), ABSMAX)
    form = form_of_weight("part.layer", weight)
    assert form.tensors() == [PartSpec(each.dtype, tuple(each.shape)) for each in form.arrays(weight)]
    assert all(each.is_contiguous() for each in form.arrays(weight))


def test_missing_executorch_is_one_message_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name.startswith("executorch"):
            raise ImportError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(TurbopocketError) as caught:
        target.trace(component())
    assert "ExecuTorch is not installed" in str(caught.value)
    assert str(caught.value.hint).startswith("pip install executorch==")
