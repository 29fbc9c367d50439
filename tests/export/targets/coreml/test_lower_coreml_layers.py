# SPDX-License-Identifier: Apache-2.0
"""Single layers in Core ML packages: stored values come back bit for bit, and what fp16 would spoil is not spoilt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.targets.coreml import program as target
from turbopocket.export.targets.coreml.blobs import write_blobs
from turbopocket.export.targets.coreml.mil import tensor_type
from turbopocket.export.targets.coreml.stores import STORES
from turbopocket.export.targets.layer import kind_of
from turbopocket.ground.bits import pack_bits
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import CompressedTensor, LayerFormat, parse_format
from turbopocket.quant.scheme import Scheme, parse_scheme
from turbopocket.runtimes.coreml.evaluate.evaluator import Evaluator, Mode
from turbopocket.runtimes.coreml.file.blobs import BlobFile
from turbopocket.runtimes.coreml.file.program import Program

EXACT_FORMATS = (
    *("fp16", "int8-row", "int8-g16", "int8-row-asym", "int8-g8-asym"),
    *("int4-row", "int4-g16", "int4-row-asym", "int4-g8-asym"),
    *("lut1", "lut2", "lut3", "lut4", "lut6", "lut8", "lut4-r16", "lut3-r8"),
)
VECTOR_FORMATS = ("vq8-d4", "vq4-d2", "vq3-d8", "vq6-d4-r16", "vq8-d4-out", "vq2-d2-out-r8", "vq6-d8-out")
SUM_FORMATS = ("avq2x8-d8", "avq3x4-d4", "avq4x6-d2")
LAYERS = ("wide", "narrow", "flat")
IOS17_FORMATS = ("fp16", "int8-row", "int8-row-asym", "lut1", "lut2", "lut4", "lut6", "lut8")


class Passed(ComponentModule):
    """Calls the model with the component's one input."""

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.model(latent_sample)


class Layers(nn.Module):
    """A Conv2d 3x3, a Conv2d 1x1 and a Linear, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(48, 64, 1, bias=False)
        self.flat = nn.Linear(64, 80)
        self.last = nn.Linear(80, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.wide(x)).flatten(2).transpose(1, 2)
        return self.last(torch.tanh(self.flat(x)))


def component_of(model: nn.Module, *shape: int) -> Component:
    """A component of any model with one input, under the decoder's name, whose package takes any shape."""
    module = Passed("vae_decoder", model.eval())
    return Component("vae_decoder", module, {"latent_sample": torch.zeros(2, *shape)}, ("sample",), role="decoder")


def compressed(component: Component, traced: target.TracedProgram, *names: str) -> dict[str, CompressedTensor]:
    """Every layer in the first format that it can be stored in."""
    return {
        name: first_storable(traced, name, names).compress(component.module.get_parameter(f"{name}.weight"), ABSMAX)
        for name in traced.layers
    }


def first_storable(traced: target.TracedProgram, name: str, names: tuple[str, ...]) -> LayerFormat:
    layer = traced.layers[name]
    formats = map(parse_format, (*names, "fp16"))
    return next(f for f in formats if STORES.storable(Scheme(f), layer.kind, layer.shape, traced.deployment) is None)


def lowered(
    component: Component, folder: Path, *names: str, **options: Any
) -> tuple[Program, dict[str, CompressedTensor]]:
    traced = target.trace(component, target.CoreMLOptions(**options))
    weights = compressed(component, traced, *names)
    spec = target.lower(traced, weights, folder)
    return Program.open((folder / spec.file).parent), weights


def run(program: Program, x: NDArray[np.float32], mode: Mode = "fp32") -> NDArray[np.float32]:
    return Evaluator(program, mode).run({"z": x.astype(np.float16)})["image"]


def with_stored_weights(component: Component, weights: Mapping[str, CompressedTensor], x: Tensor) -> NDArray[Any]:
    for name, weight in weights.items():
        component.module.get_parameter(f"{name}.weight").data.copy_(weight.format.decompress(weight))
    with torch.inference_mode():
        return component.module(x).numpy()


def snr_db(found: NDArray[Any], expected: NDArray[Any]) -> float:
    assert found.shape == expected.shape
    error = np.square(found.astype(np.float64) - expected).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / error)) if error else np.inf


def half_noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).half().float()


@pytest.fixture(scope="module")
def layers() -> tuple[Component, target.TracedProgram]:
    torch.manual_seed(0)
    component = component_of(Layers(), 32, 6, 4)
    return component, target.trace(component)


@pytest.mark.parametrize("name", EXACT_FORMATS)
def test_stored_values_decode_to_the_decompressed_weight(
    layers: tuple[Component, target.TracedProgram], name: str, tmp_path: Path
) -> None:
    component, traced = layers
    weights = compressed(component, traced, name)
    spec = target.lower(traced, weights, tmp_path)
    program = Program.open((tmp_path / spec.file).parent)
    for layer in LAYERS:
        weight = weights[f"vae_decoder.{layer}"]
        assert str(weight.format) == name
        expected = weight.format.decompress(weight).half().numpy()
        np.testing.assert_array_equal(program.constant(f"{layer}_weight"), expected)


@pytest.mark.parametrize("name", [*VECTOR_FORMATS, *SUM_FORMATS])
def test_codebooks_times_their_scale_are_the_decompressed_weight(
    layers: tuple[Component, target.TracedProgram], name: str, tmp_path: Path
) -> None:
    component, traced = layers
    weights = compressed(component, traced, name)
    spec = target.lower(traced, weights, tmp_path)
    program = Program.open((tmp_path / spec.file).parent)
    for layer in LAYERS:
        weight = weights[f"vae_decoder.{layer}"]
        assert str(weight.format) == name
        count = getattr(weight.format, "count", 1)
        names = [f"{layer}_weight{index}" for index in range(count)] if count > 1 else [f"{layer}_weight"]
        vectors = sum(program.constant(each).astype(np.float32) for each in names)
        scale = program.constant(f"{layer}_weight_scale").astype(np.float32)
        assert 0.5 <= np.abs(scale).max() < 1
        product = vectors * scale.reshape(-1, *(1 for _ in vectors.shape[1:]))
        expected = weight.format.decompress(weight).numpy()
        np.testing.assert_allclose(product, expected, rtol=0, atol=count * 2.0**-25)
        if count == 1:  # residual codebooks have more of them
            assert (product == expected).mean() > 0.98  # all but entries that became subnormal


@pytest.mark.parametrize("name", IOS17_FORMATS)
def test_ios17_packages_hold_the_same_values(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    component = component_of(Layers(), 32, 6, 4)
    program, weights = lowered(component, tmp_path, name, deployment="iOS17")
    assert program.opset == "CoreML7"
    for layer in LAYERS:
        weight = weights[f"vae_decoder.{layer}"]
        assert str(weight.format) == name
        expected = weight.format.decompress(weight).half().numpy()
        np.testing.assert_array_equal(program.constant(f"{layer}_weight"), expected)


def test_ios26_packages_compute_the_same(tmp_path: Path) -> None:
    component = component_of(Layers(), 32, 6, 4)
    program, weights = lowered(component, tmp_path, "vq8-d4", deployment="iOS26")
    x = half_noise(1, 32, 6, 4)
    assert program.spec_version == 10
    assert snr_db(run(program, x.numpy()), with_stored_weights(component, weights, x)) >= 60


@pytest.mark.parametrize(
    ("name", "shape", "deployment", "reason"),
    [
        ("fp32", (64, 64), "iOS18", "compute in fp16"),
        ("int4-g48", (64, 64), "iOS18", "64 input channels are not a multiple of group 48"),
        ("lut4-r16", (40, 64), "iOS18", "40 output channels are not a multiple of 16"),
        ("vq8-d8", (64, 4, 3, 3), "iOS18", "4 input channels are not a multiple of vector length 8"),
        ("int4-row", (64, 64), "iOS17", "takes iOS18"),
        ("int8-g32", (64, 64), "iOS17", "takes iOS18"),
        ("lut3", (64, 64), "iOS17", "takes iOS18"),
        ("lut4-r16", (64, 64), "iOS17", "takes iOS18"),
        ("vq8-d4", (64, 64), "iOS17", "takes iOS18"),
        ("avq2x8-d8", (64, 64), "iOS17", "takes iOS18"),
        ("avq2x8-d8-shared", (64, 64), "iOS18", "a table of its own, avq2x8-d8-shared has one for all layers"),
    ],
)
def test_what_can_not_be_stored_is_refused_with_a_reason(
    name: str, shape: tuple[int, ...], deployment: Any, reason: str
) -> None:
    assert reason in str(STORES.storable(parse_scheme(name), kind_of(shape), shape, deployment))


def test_what_coremltools_made_before_changes_no_name() -> None:
    """It numbers values through all programs of a process: what failed, or was never converted, counted on."""
    from coremltools.converters.mil.mil import Builder

    found = []
    for made_before in (0, 7):
        Builder.name_count["concat"] = made_before
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(1), nn.Linear(128, 128), nn.Unflatten(1, (8, 4, 4)))
        found.append(target.trace(component_of(model, 8, 4, 4)).operations)
    assert found[0] == found[1]


def test_a_layer_that_runs_twice_is_stored_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    component = component_of(Twice(), 6, 64)
    program, weights = lowered(component, tmp_path, "int8-row")
    assert list(weights) == ["vae_decoder.layer"]
    x = half_noise(1, 6, 64)
    assert snr_db(run(program, x.numpy()), with_stored_weights(component, weights, x)) >= 60
    assert {"layer", target.layer_value("layer", 2)} <= set(program.function.types)
    assert sum(file.size for file in program.weight_files) < 2 * 64 * 64


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Conv2d(8, 8, 1, groups=2), (8, 4, 4), "a Conv2d of 2 groups"),
        (nn.Linear(4, 4), (8, 4, 4), r"at most 3 dimensions, found \[1, 8, 4, 4\]"),
    ],
)
def test_layers_without_a_core_ml_form_are_refused(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(TurbopocketError, match=message):
        target.trace(component_of(nn.Sequential(model), *shape))


def test_tanh_gelu_stays_tanh(tmp_path: Path) -> None:
    class Gelu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.gelu(x, approximate="tanh") - torch.nn.functional.gelu(x)

    component = component_of(Gelu(), 400)
    program, _ = lowered(component, tmp_path)
    modes = {str(program.argument(op.parameters["mode"][0])) for op in program.operations if op.kind == "gelu"}
    assert modes == {"TANH_APPROXIMATION", "EXACT"}
    x = torch.linspace(-4, 4, 400).half().float()[None]
    with torch.inference_mode():
        expected = component.module(x).numpy()
    assert np.abs(expected).max() > 4e-4
    assert np.abs(run(program, x.numpy()) - expected).max() < 2e-6


class Stream(nn.Module):
    """A residual stream that a layer makes too large for fp16, a norm that tames it, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(32, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 1)
        self.norm = nn.GroupNorm(4, 32)
        self.last = nn.Conv2d(32, 32, 1)
        nn.init.normal_(self.first.weight, std=2e4 / 288**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.nn.functional.silu(self.norm(x + self.second(x))))


@pytest.mark.parametrize("name", ["fp16", "int8-row", "int4-g16-asym", "lut4-r16", "vq8-d4", "avq2x8-d8"])
@pytest.mark.parametrize("deployment", ["iOS17", "iOS18"])
def test_layers_beyond_fp16_compute_in_fp32(name: str, deployment: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    component = component_of(Stream(), 32, 6, 4)
    largest = {"vae_decoder.first": 9e4, "vae_decoder.second": 3.0, "vae_decoder.last": 5.0}
    traced = target.trace(component, target.CoreMLOptions(deployment=deployment), largest=largest)
    wide = {name for name, layer in traced.layers.items() if layer.wide}
    assert wide == {"vae_decoder.first", "vae_decoder.second"}  # the second reads what the first made
    weights = compressed(component, traced, name)
    formats = {layer: Scheme(weight.format) for layer, weight in weights.items()}
    spec = target.lower(traced, weights, tmp_path / "wide")
    folder = (tmp_path / "wide" / spec.file).parent
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert (
        on_disk
        == target.lowered_bytes(traced, formats)
        <= target.fixed_bytes(traced, dict.fromkeys(formats, frozenset(formats.values())))
        + sum(weight.nbytes for weight in weights.values())
    )
    program = Program.open(folder)
    kinds = {program.function.types[value].dtype.name for value in ("first", "second")}
    assert kinds == {"FLOAT32"}
    assert program.function.types["last"].dtype.name == "FLOAT16"
    x = half_noise(1, 32, 6, 4)
    expected = with_stored_weights(component, weights, x)
    assert snr_db(run(program, x.numpy(), "fp16"), expected) >= 45
    damaged = target.trace(component, target.CoreMLOptions(deployment=deployment))
    spec = target.lower(damaged, weights, tmp_path / "narrow")
    found = run(Program.open((tmp_path / "narrow" / spec.file).parent), x.numpy(), "fp16")
    assert not np.isfinite(found).all()


def test_largest_outputs_of_unknown_layers_are_refused() -> None:
    component = component_of(Layers(), 32, 6, 4)
    with pytest.raises(TurbopocketError, match=r"vae_decoder runs no layer nowhere"):
        target.trace(component, largest={"vae_decoder.nowhere": 1.0, "unet.elsewhere": 9e9})


def test_weight_files_are_those_that_coremltools_writes(tmp_path: Path) -> None:
    from coremltools.libmilstoragepython import _BlobStorageWriter

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size).astype(dtype) for size, dtype in ((7, np.float16), (33, np.float32))]
    arrays += [rng.integers(0, 256, size).astype(np.uint8) for size in (1, 64, 65)]
    types = [tensor_type("FLOAT16", (7,)), tensor_type("FLOAT32", (33,))]
    types += [tensor_type("UINT8", (size,)) for size in (1, 64, 65)]
    writer = _BlobStorageWriter(str(tmp_path / "theirs"))
    for array in arrays:
        match array.dtype.name:
            case "float16":
                writer.write_fp16_data(array.view(np.uint16))
            case "float32":
                writer.write_float_data(array)
            case "uint8":
                writer.write_uint8_data(array)
    del writer
    write_blobs(tmp_path / "ours", types, arrays)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", ["UINT1", "UINT2", "UINT3", "UINT4", "UINT6", "INT4"])
@pytest.mark.parametrize("count", [1, 7, 8, 61])
def test_values_below_a_byte_come_back_from_the_file(dtype: str, count: int, tmp_path: Path) -> None:
    tensor = tensor_type(dtype, (count,))
    low = -8 if dtype == "INT4" else 0
    values = np.random.default_rng(1).integers(low, low + 2**tensor.dtype.bits, count).astype(tensor.dtype.numpy)
    write_blobs(tmp_path / "file", [tensor], [values])
    file = BlobFile(tmp_path / "file")
    file.check(64, tensor)
    np.testing.assert_array_equal(file.read(64, tensor), values)


def test_codes_are_packed_low_bits_first() -> None:
    assert pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(np.array([1, 2, 3, 4], np.uint8), 3).tolist() == [0b11010001, 0b00001000]
