# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer folder says about prompts: their length, and tokens that stand for several vectors."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from turbopocket.export.checkpoint.load import load, load_shapes
from turbopocket.export.distill.prompt_states import PromptStates
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.targets.side_files import write_side_files
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.tokenizer import Tokenizer

from ..verify.test_diffusers_reference import Drawing

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@pytest.fixture
def folder(tiny_sdxl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _with_lengths(folder: Path, *lengths: Any) -> Path:
    for name, length in zip(ENCODERS.values(), lengths, strict=True):
        _edit(folder / name / "tokenizer_config.json", model_max_length=length)
    return folder


def _tokenizers(model: LoadedModel, folder: Path) -> dict[str, Tokenizer]:
    """Those of the artifact that would be built."""
    write_side_files(model, {}, model.image_size, folder)
    return {
        encoder: Tokenizer(folder / name / "tokenizer.json", model.text_tokens, model.prompt_replacements.get(encoder))
        for encoder, name in ENCODERS.items()
        if encoder in model.modules
    }


def _ids_of_diffusers(pipeline: Any, prompt: str) -> dict[str, list[int]]:
    """What diffusers' pipeline gives its text encoders for the prompt."""
    seen: dict[str, list[int]] = {}

    def remember(name: str) -> Any:
        return lambda _module, inputs: seen.setdefault(name, inputs[0][0].tolist()) and None

    encoders = [name for name in ENCODERS if name in pipeline.components]
    hooks = [getattr(pipeline, name).register_forward_pre_hook(remember(name)) for name in encoders]
    with torch.no_grad():
        pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    for hook in hooks:
        hook.remove()
    return seen


def _open(folder: Path) -> Any:
    import diffusers

    class_name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return getattr(diffusers, class_name).from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize(
    "said", [1000000000000000019884624838656, 1e30, None, 512, 78, 77, 77.0], ids=lambda length: f"{length}"
)
def test_no_length_or_a_larger_one_is_the_text_encoders_own(folder: Path, said: Any) -> None:
    assert load(str(_with_lengths(folder, said, 77))).text_tokens == 77
    assert load_shapes(str(folder)).text_tokens == 77


def test_a_build_asks_diffusers_for_as_many_ids_as_the_graphs_read(folder: Path, tmp_path: Path) -> None:
    """diffusers' own pipeline of such a folder ends in an OverflowError."""
    drawing = Drawing(_with_lengths(folder, 1000000000000000019884624838656, None), tmp_path / "tokenizers")
    assert drawing.compare().failure is None


def test_the_first_name_of_the_length_is_understood(folder: Path) -> None:
    for name in ENCODERS.values():
        file = folder / name / "tokenizer_config.json"
        config = json.loads(file.read_text())
        file.write_text(
            json.dumps({key: v for key, v in config.items() if key != "model_max_length"} | {"max_len": 20})
        )
    assert _open(folder).tokenizer.model_max_length == 20
    assert load_shapes(str(folder)).text_tokens == 20


@pytest.mark.parametrize("prompt", ["a red cat", "the " * 30, "the " * 18, "a blue circle!"])
def test_a_smaller_length_is_respected_as_diffusers_does(folder: Path, tmp_path: Path, prompt: str) -> None:
    model = load_shapes(str(_with_lengths(folder, 20, 20)))
    assert model.text_tokens == 20
    found = {name: each.encode(prompt).ids.tolist() for name, each in _tokenizers(model, tmp_path / "out").items()}
    assert found == _ids_of_diffusers(_open(folder), prompt)


def test_a_smaller_length_is_the_one_of_the_graphs_and_of_training(folder: Path) -> None:
    from turbopocket.export.families.components import components_of

    model = load(str(_with_lengths(folder, 20, 20)))
    inputs = {component.name: component.example_inputs for component in components_of(model)}
    assert inputs["text_encoder_2"]["input_ids"].shape[1] == 20
    assert inputs["unet"]["encoder_hidden_states"].shape[1] == 20
    assert PromptStates(model, torch.device("cpu")).conditional(["a red cat"])["encoder_hidden_states"].shape[1] == 20


def test_two_lengths_are_refused(folder: Path) -> None:
    _with_lengths(folder, 77, 64)
    for way in (load, load_shapes):
        with pytest.raises(TurbopocketError, match="77 ids for text_encoder and 64 ids for text_encoder_2; one number"):
            way(str(folder))


@pytest.mark.parametrize("said", [0, -1, 1, 76.5, True, "77", [77], {}, float("nan"), float("inf")])
def test_a_length_that_is_none_is_refused_before_weights_are_read(folder: Path, said: Any) -> None:
    _with_lengths(folder, 77, said)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    for way in (load, load_shapes):
        with pytest.raises(TurbopocketError, match=r"tokenizer_2/tokenizer_config.json: model_max_length is .* whole"):
            way(str(folder))


def test_the_artifacts_tokenizer_says_the_length_that_holds(folder: Path, tmp_path: Path) -> None:
    """Readers that pad by themselves (optimum's pipelines) take it from tokenizer_config.json, others from the JSON."""
    from transformers import CLIPTokenizer

    model = load_shapes(str(_with_lengths(folder, 1000000000000000019884624838656, None)))
    write_side_files(model, {}, model.image_size, tmp_path / "out")
    for name in ENCODERS.values():
        assert CLIPTokenizer.from_pretrained(tmp_path / "out" / name).model_max_length == 77
        assert json.loads((tmp_path / "out" / name / "tokenizer.json").read_text())["padding"]["strategy"] == {
            "Fixed": 77
        }


@pytest.mark.parametrize("token", ["pad_token", "unk_token"])
def test_a_tokenizer_without_a_token_that_every_one_needs_is_refused(folder: Path, token: str) -> None:
    _edit(folder / "tokenizer/tokenizer_config.json", **{token: None})
    (folder / "tokenizer/special_tokens_map.json").unlink()
    for way in (load, load_shapes):
        with pytest.raises(TurbopocketError, match=f"tokenizer has no {token}"):
            way(str(folder))


def test_a_tokenizer_without_an_end_is_one_sentence(folder: Path) -> None:
    _edit(folder / "tokenizer/tokenizer_config.json", eos_token=None)
    (folder / "tokenizer/special_tokens_map.json").unlink()
    with pytest.raises(TurbopocketError, match="tokenizer cannot be read as a CLIP tokenizer: "):
        load_shapes(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token": "[PAD]"},
        {"extra_special_tokens": ["<new>"]},
        {"added_tokens_decoder": {"9999": {"content": "<new>", "special": False}}},
    ],
)
def test_ids_that_the_text_encoder_does_not_have_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "tokenizer_2/special_tokens_map.json").unlink()
    _edit(folder / "tokenizer_2/tokenizer_config.json", **changes)
    for way in (load, load_shapes):
        with pytest.raises(TurbopocketError, match=r"tokenizer_2: the id of '.*' is \d+, text_encoder_2 has 550"):
            way(str(folder))


def test_a_vocabulary_larger_than_the_embeddings_is_refused(folder: Path) -> None:
    file = folder / "tokenizer/vocab.json"
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps(vocabulary | {"new</w>": len(vocabulary)}, ensure_ascii=False))
    with pytest.raises(TurbopocketError, match=r"the id of 'new</w>' is 550, text_encoder has 550 embeddings"):
        load_shapes(str(folder))


def test_a_side_that_only_tokenizer_json_names_is_refused(folder: Path) -> None:
    from transformers import CLIPTokenizer

    rules = CLIPTokenizer.from_pretrained(folder / "tokenizer").backend_tokenizer
    rules.enable_truncation(77, direction="left")
    rules.save(str(folder / "tokenizer/tokenizer.json"))
    with pytest.raises(TurbopocketError, match="tokenizer: truncation_side is 'left'; supported: 'right'"):
        load_shapes(str(folder))


VECTORS: Mapping[str, Mapping[str, int]] = {
    "text_encoder": {"<cat>": 3, "<cat2>": 2, "<one>": 1, "sks": 2, "sksy": 2},
    "text_encoder_2": {"<cat>": 2, "<dog>": 2, "<one>": 1},
}


@pytest.fixture(scope="module")
def inverted(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL with textual inversions of several vectors, other ones for each text encoder, as diffusers saves it."""
    pipeline = _open(tiny_sdxl)
    torch.manual_seed(0)
    for encoder, tokens in VECTORS.items():
        parts = {"text_encoder": getattr(pipeline, encoder), "tokenizer": getattr(pipeline, ENCODERS[encoder])}
        width = parts["text_encoder"].config.hidden_size
        for token, count in tokens.items():
            pipeline.load_textual_inversion(torch.randn(count, width), token=token, **parts)
    folder = tmp_path_factory.mktemp("inverted") / "model"
    pipeline.save_pretrained(folder)
    return folder


PROMPTS = [
    "a red circle",
    "<cat> on the square",
    "a <cat>",
    "<cat>",
    "a <cat> and a <cat>",
    "a <cat>, and <cat>! (<cat>)",
    "x<cat>y",
    "A <CAT> on the square",
    "<cat>_1",
    "<cat>_1 and <cat>",
    "<cat2> on <cat>",
    "a <dog> on <cat> on <dog>",
    "a <one> on <one>",
    "<cat> " * 40,
    "sksy",
    "a sks on sks",
    "",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_of_several_vectors_become_the_ids_of_diffusers_pipeline(
    inverted: Path, tmp_path: Path, prompt: str
) -> None:
    model = load_shapes(str(inverted))
    found = {name: each.encode(prompt).ids.tolist() for name, each in _tokenizers(model, tmp_path).items()}
    assert found == _ids_of_diffusers(_open(inverted), prompt)


def test_each_text_encoder_has_its_own_replacements(inverted: Path) -> None:
    model = load_shapes(str(inverted))
    assert model.prompt_replacements["text_encoder"]["<cat>"] == "<cat> <cat>_1 <cat>_2"
    assert model.prompt_replacements["text_encoder_2"] == {"<cat>": "<cat> <cat>_1", "<dog>": "<dog> <dog>_1"}


@pytest.mark.parametrize("prompt", ["a <cat>, and <dog>", "<cat2> on a sks"])
def test_a_prompt_with_such_tokens_draws_what_diffusers_draws(inverted: Path, tmp_path: Path, prompt: str) -> None:
    drawing = Drawing(inverted, tmp_path / "tokenizers")
    drawing.session = replace(drawing.session, prompts=[prompt])
    assert drawing.compare().failure is None


def test_names_that_overlap_in_one_prompt_are_refused(inverted: Path, tmp_path: Path) -> None:
    """diffusers replaces tokens in the order of a set, so what it draws changes from run to run."""
    tokenizers = _tokenizers(load_shapes(str(inverted)), tmp_path)
    with pytest.raises(TurbopocketError, match="'sks' and 'sksy', of which each stands for several vectors"):
        tokenizers["text_encoder"].encode("a sks on a sksy")


def test_a_model_without_such_tokens_has_no_replacements(tiny_sdxl: Path) -> None:
    assert load_shapes(str(tiny_sdxl)).prompt_replacements == {}


def test_training_sees_the_same_text_states_as_diffusers(inverted: Path) -> None:
    prompt = "a <cat> on <dog>"
    with torch.no_grad():
        expected = _open(inverted).encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        found = PromptStates(load(str(inverted)), torch.device("cpu")).conditional([prompt])
    assert torch.equal(found["encoder_hidden_states"], expected[0])
    assert torch.equal(found["text_embeds"], expected[2])
