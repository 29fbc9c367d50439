# SPDX-License-Identifier: Apache-2.0
"""FLUX.2-klein, which is planned and not built: its bytes against what is published, its graphs against diffusers."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.families.components import components_of, described, layers_of, parameter_count
from turbopocket.export.families.flux2 import FLUX2_KLEIN, READ_LAYERS
from turbopocket.export.plan import Planned, plan
from turbopocket.export.recipe import make_recipe
from turbopocket.quant.fit import parse_fit
from turbopocket.quant.scheme import parse_scheme

from ...flux2_checkpoints import write_flux2
from ..published_flux2 import FILE_BYTES, QWEN3_4B, TEXT_ENCODER_BYTES, write_klein

FORMATS = ["int4-g32", "int8-row", "fp16"]
LAYER_TABLE = {
    "transformer_blocks": 1_226_836_480,
    "single_transformer_blocks": 2_453_672_960,
    "double_stream_modulation_img": 56_623_104,
    "double_stream_modulation_txt": 56_623_104,
    "single_stream_modulation": 28_311_552,
    "context_embedder": 23_592_960,
    "norm_out": 18_874_368,
    "proj_out": 393_216,
    "time_guidance_embed": 10_223_616,
    "x_embedder": 393_216,
}
"""Parameters of each part of the published transformer, 3,875,544,576 in all."""


def recipe_of(folder: Path, **compress: Any) -> Any:
    values = {"model": {"source": str(folder)}, "compress": {"formats": FORMATS, **compress}}
    return make_recipe(values, "test")


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the published configs, without tokenizer."""
    return write_klein(tmp_path_factory.mktemp("published") / "FLUX.2-klein-4B")


@pytest.fixture(scope="module")
def published(klein: Path) -> LoadedModel:
    return load_shapes(str(klein))


@pytest.fixture(scope="module")
def planned(klein: Path) -> Planned:
    embedder = {"transformer.x_embedder": "fp16"}
    return plan(recipe_of(klein, budget="5GB", pin=embedder), devices=["android-16gb"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "flux2"
    write_flux2(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def file_bytes(module: nn.Module) -> int:
    """Of a safetensors file of the module's tensors, floating point ones in bf16: header, padded to 8, and values."""
    offset, header = 0, {"__metadata__": {"format": "pt"}}
    tensors = module.state_dict()
    for name in sorted(tensors, key=lambda name: (tensors[name].is_floating_point(), name)):
        tensor = tensors[name]
        kind, each = ("BF16", 2) if tensor.is_floating_point() else ("I64", 8)
        end = offset + each * tensor.numel()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}  # type: ignore[dict-item]
        offset = end
    told = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(told / 8) * 8 + offset


def test_modules_are_the_published_ones_to_the_byte(published: LoadedModel) -> None:
    """Names, shapes and number of all tensors: each is in the file's header."""
    for name, nbytes in FILE_BYTES.items():
        assert file_bytes(published.modules[name.split("/")[0]]) == nbytes
    text: Any = published.modules["text_encoder"]
    once = {name: tensor for name, tensor in text.state_dict().items() if name != "lm_head.weight"}
    assert sum(2 * tensor.numel() for tensor in once.values()) == TEXT_ENCODER_BYTES


def test_a_plan_counts_the_published_layer_table(published: LoadedModel, planned: Planned) -> None:
    components = {each.name: each for each in components_of(published)}
    transformer = components["transformer"].module.model
    found = {name: sum(each.numel() for each in part.parameters()) for name, part in transformer.named_children()}
    assert {name: count for name, count in found.items() if count} == LAYER_TABLE
    assert {name: parameter_count(each) for name, each in components.items()} == {
        "text_encoder": 3_114_088_192,  # what FLUX.2-klein's ports to JAX and ONNX keep of Qwen3-4B, 27 of 36 layers
        "transformer": 3_875_544_576,
        "vae_decoder": 49_620_259 + 2 * 128,  # and the mean and deviation of its patches
    }
    assert {name: each.layers for name, each in planned.components.items()} == {
        "text_encoder": 27 * 7,
        "transformer": 9 + 5 * 12 + 20 * 2,
        "vae_decoder": planned.components["vae_decoder"].layers,
    }
    norms = 5 * 4 * 128 + 20 * 2 * 128
    assert planned.components["transformer"].weights == 3_875_544_576 - norms


BITS: Mapping[str, Callable[[int, int], int]] = {
    "int4-g32": lambda rows, columns: rows * columns // 2 + 2 * rows * columns // 32,
    "int8-row": lambda rows, columns: rows * columns + 2 * rows,
    "fp16": lambda rows, columns: 2 * rows * columns,
}
"""Bytes of a weight of so many rows and columns, by what the formats are."""


def test_a_plans_bytes_are_those_of_its_formats(planned: Planned) -> None:
    assert planned.total_bytes <= 5_000_000_000
    assert set(planned.layers.values()) == set(FORMATS)
    for choice in planned.plan.choices:
        rows = choice.shape[0]
        assert choice.nbytes == BITS[choice.scheme](rows, math.prod(choice.shape[1:])), choice.layer


def test_embeddings_are_stored_once_and_in_fp16(planned: Planned) -> None:
    """Tied or not, the head is not run; 2 bytes for each value that is no layer's weight."""
    table = QWEN3_4B["vocab_size"] * QWEN3_4B["hidden_size"]
    assert 2 * table < planned.fixed_bytes < 2 * table + 30_000_000


def test_an_untied_head_adds_no_byte(klein: Path, planned: Planned, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(klein, tmp_path / klein.name))
    edit(folder / "text_encoder/config.json", tie_word_embeddings=False)
    untied = load_shapes(str(folder))
    assert sum(parameter_count(each) for each in components_of(untied)) == planned.fp16_bytes // 2


def test_a_plan_says_what_it_counts_and_what_is_not_there_yet(planned: Planned) -> None:
    assert any("the first 27 layers are counted" in note for note in planned.notes)
    assert any(
        "nothing but this plan is made of such a folder yet: a build lacks a sampler" in n for n in planned.notes
    )
    assert planned.forecast is None
    tokenizer = next(each for each in planned.estimates if each.what == "tokenizer")
    assert "151,936 ids" in tokenizer.why
    assert "Qwen3's own" in tokenizer.why
    assert tokenizer.bytes == pytest.approx(11_422_654 + 2_776_833 + 1_671_853, rel=0.01)


def test_a_device_is_told_by_the_memory_that_its_graphs_take(planned: Planned) -> None:
    """Predicted from shapes as for families that are built. By hand what is alive at least: the states, the modulated
    ones and what a single block's first layer makes of them, 9 times as wide, for 1024 x 1024 pixels and a prompt."""
    (fit,) = planned.devices
    memory = planned.plan.memory["transformer"]
    assert fit.fits
    assert fit.largest == "transformer"
    assert memory.running > 4 * (512 + 64 * 64) * 3072 * (1 + 1 + 9)
    assert memory.held > planned.components["transformer"].bytes


def test_a_tiny_folder_compressed_has_the_bytes_of_its_plan(tiny: Path) -> None:
    """Each layer's stored weight, really made in the scheme that the plan chose."""
    planned = plan(recipe_of(tiny, average_bits=6.0))
    assert len({str(parse_scheme(each).weight) for each in planned.layers.values()}) > 1
    weights = stored_weights(tiny)
    by_name = {choice.layer: choice for choice in planned.plan.choices}
    assert by_name.keys() <= weights.keys()
    fit = parse_fit("absmax")
    for name, choice in by_name.items():
        made = parse_scheme(choice.scheme).weight.compress(weights[name], fit)
        assert sum(part.numel() * part.element_size() for part in made.parts.values()) == choice.nbytes, name


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of the folder's files by the names of layers."""
    found = {}
    for part, component in {"text_encoder": "text_encoder", "transformer": "transformer", "vae": "vae_decoder"}.items():
        [file] = (folder / part).glob("*.safetensors")
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found[f"{component}.{name.removesuffix('.weight')}"] = opened.get_tensor(name)
    return found


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Any:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline.from_pretrained(tiny)


def with_modules(tiny: Path, pipeline: Any) -> dict[str, Any]:
    """The graphs of the tiny model, with the weights that diffusers read."""
    model = load_shapes(str(tiny))
    modules = {name: getattr(pipeline, name).eval() for name in model.modules}
    return {each.name: each for each in components_of(replace(model, modules=modules))}


@torch.no_grad()
def test_graphs_compute_what_diffusers_modules_compute(tiny: Path, pipeline: Any) -> None:
    graphs = with_modules(tiny, pipeline)
    torch.manual_seed(1)
    ids = torch.randint(0, 30, (1, 512))
    mask = (torch.arange(512) < 40).long()[None]
    theirs = pipeline.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    ours = graphs["text_encoder"].module(ids, mask)
    assert graphs["text_encoder"].output_names == tuple(f"hidden_states.{count}" for count in READ_LAYERS)
    for count, states in zip(READ_LAYERS, ours, strict=True):
        torch.testing.assert_close(states, theirs[count], atol=1e-5, rtol=1e-4)
    text = torch.cat(ours, dim=-1)
    latents = torch.randn(1, pipeline.transformer.config.in_channels, 4, 6)
    expected = pipeline.transformer(
        hidden_states=pipeline._pack_latents(latents),
        encoder_hidden_states=text,
        timestep=torch.tensor([0.7]),
        img_ids=pipeline._prepare_latent_ids(latents),
        txt_ids=pipeline._prepare_text_ids(text),
        return_dict=False,
    )[0]
    found = graphs["transformer"].module(latents, torch.tensor(700.0), text)
    torch.testing.assert_close(pipeline._pack_latents(found), expected, atol=1e-5, rtol=1e-4)
    norm = pipeline.vae.bn
    scaled = latents * torch.sqrt(norm.running_var + norm.eps)[:, None, None] + norm.running_mean[:, None, None]
    picture = pipeline.vae.decode(pipeline._unpatchify_latents(scaled), return_dict=False)[0]
    torch.testing.assert_close(graphs["vae_decoder"].module(latents), picture, atol=1e-5, rtol=1e-4)


def test_its_pipeline_names_what_its_graphs_have(tiny: Path) -> None:
    model = load_shapes(str(tiny))
    specs = {each.name: described(each) for each in components_of(model)}
    for component, side, name in FLUX2_KLEIN.pipeline(model, specs).uses():
        tensors = specs[component].inputs if side == "input" else specs[component].outputs
        assert name in {each.name for each in tensors}


def test_blocks_are_those_of_the_transformer(tiny: Path) -> None:
    transformer = next(each for each in components_of(load_shapes(str(tiny))) if each.name == "transformer")
    blocks = [name.removeprefix("transformer.") for name in transformer.blocks() if "blocks" in name]
    assert blocks == ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"]
    assert len(layers_of([transformer])) == 9 + 12 + 2 * 2


def test_the_command_plans_the_budget_that_the_page_on_models_names(
    klein: Path, turbopocket: Callable[..., Any]
) -> None:
    """At two bits: what no format makes smaller is the embedding, of which graphs look rows up."""
    ran = turbopocket("plan", klein, "--budget", "2.5GB", "--formats", "vq8-d4,int4-g32,fp16", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["total_bytes"] <= 2_500_000_000
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    assert f"{told['average_bits']:.2f} bits a weight" in page
    assert f"{told['smallest_bytes'] / 1e9:.3f} GB" in page
    assert f"{2 * QWEN3_4B['vocab_size'] * QWEN3_4B['hidden_size'] / 1e6:.0f} MB" in page
