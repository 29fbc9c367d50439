# SPDX-License-Identifier: Apache-2.0
"""Names of layers' groups, and the files beside the graphs."""

import json
import shutil
from pathlib import Path

import pytest

from turbopocket.export.checkpoint.load import load_shapes, tokenizer_json
from turbopocket.export.families.components import components_of, group_name, layers_of
from turbopocket.export.families.graphs import block_name
from turbopocket.export.families.tokenizers import CLIP
from turbopocket.export.targets.side_files import write_swift_files


@pytest.mark.parametrize(
    ("layer", "group"),
    [
        ("unet.down_blocks.1.attentions.0.proj_in", "unet.down_blocks.1"),
        ("unet.mid_block.resnets.1.conv1", "unet.mid_block.resnets.1"),
        ("unet.conv_in", "unet.conv_in"),
        ("text_encoder.encoder.layers.3.mlp.fc1", "text_encoder.layers.3"),
        ("text_encoder.encoder.block.3.layer.0.SelfAttention.q", "text_encoder.block.3"),
        ("transformer.transformer_blocks.7.attn1.to_q", "transformer.transformer_blocks.7"),
        ("vae_decoder.decoder.layers.4.conv.2", "vae_decoder.layers.4"),
        ("vae_decoder.post_quant_conv", "vae_decoder.post_quant_conv"),
        ("decoder.decoder.layers.4.conv.2", "decoder.layers.4"),
        ("encoder.conv_in", "encoder.conv_in"),
    ],
)
def test_layers_are_grouped_by_component_and_block(layer: str, group: str) -> None:
    assert group_name(layer) == group


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("unet.down_blocks.1.attentions.0.proj_in", None),
        (
            "unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_out.0",
            "unet.mid_block.attentions.0.transformer_blocks.1",
        ),
        ("unet.up_blocks.1.resnets.10.conv_shortcut", "unet.up_blocks.1.resnets.10"),
        ("unet.up_blocks.1.upsamplers.0.conv", None),
        ("text_encoder_2.text_model.encoder.layers.11.mlp.fc1", "text_encoder_2.text_model.encoder.layers.11"),
        ("text_encoder.encoder.block.3.layer.0.SelfAttention.q", "text_encoder.encoder.block.3.layer.0"),
        ("transformer.transformer_blocks.7.attn1.to_q", "transformer.transformer_blocks.7"),
        ("vae_decoder.decoder.mid_block.attentions.0.to_q", "vae_decoder.decoder.mid_block.attentions.0"),
        ("vae_decoder.decoder.layers.4.conv.2", "vae_decoder.decoder.layers.4"),
    ],
)
def test_a_block_is_what_runs_as_one(layer: str, block: str | None) -> None:
    assert block_name(layer) == (block or layer)


def test_the_blocks_of_a_component_share_its_layers_out(tiny_sdxl: Path) -> None:
    for component in components_of(load_shapes(str(tiny_sdxl))):
        layers = layers_of([component])
        held = [
            f"{name}.{path}".removesuffix(".")
            for name, block in component.blocks().items()
            for path, module in block.named_modules()
            if module in layers.values()
        ]
        assert sorted(held) == sorted(layers)
        assert all(block_name(layer) in component.blocks() for layer in layers)


@pytest.mark.parametrize("left", ["tokenizer.json", "tokenizer.json, vocab.json"])
def test_the_swift_package_gets_its_vocabulary_out_of_tokenizer_json(left: str, tiny_sd: Path, tmp_path: Path) -> None:
    """transformers 5 saves nothing else."""
    from transformers import CLIPTokenizer

    folder = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    tokenizer = folder / "tokenizer"
    (tokenizer / "tokenizer.json").write_bytes(tokenizer_json(tokenizer, CLIP))
    for name in {"vocab.json", "merges.txt"} - set(left.split(", ")):
        (tokenizer / name).unlink()
    out = tmp_path / "art"
    out.mkdir()
    write_swift_files(load_shapes(str(folder)), out)
    assert (out / "merges.txt").read_text("utf-8") == (tiny_sd / "tokenizer" / "merges.txt").read_text("utf-8")
    vocab = json.loads((tiny_sd / "tokenizer" / "vocab.json").read_text("utf-8"))
    assert json.loads((out / "vocab.json").read_text("utf-8")) == vocab
    (out / "tokenizer" / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(out / name, out / "tokenizer" / name)
    prompt = "a red circle on the BLUE square, naïve"
    ids = [CLIPTokenizer.from_pretrained(each)(prompt).input_ids for each in (out / "tokenizer", tiny_sd / "tokenizer")]
    assert ids[0] == ids[1]
