# SPDX-License-Identifier: Apache-2.0
"""Names of layers' groups, and the files beside the graphs."""

import json
import shutil
from pathlib import Path

import pytest

from turbopocket.export.checkpoint.load import load_shapes, tokenizer_json
from turbopocket.export.families.components import group_name
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
