# SPDX-License-Identifier: Apache-2.0
"""Training of pocket-dit: its tokenizer and text states, exact resume, and a folder that the family opens."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from safetensors.torch import load_file

from turbopocket.export.checkpoint.load import load
from turbopocket.pocket.evaluate import WEIGHTS
from turbopocket.pocket.scenes import captions, scenes_of
from turbopocket.pocket.tokenizer import T5_TOKENS, scene_words, t5_tokenizer
from turbopocket.pocket.train import dit
from turbopocket.pocket.train.loop import fit
from turbopocket.pocket.train.t5 import CAPTION_IDS, T5Text, train_t5

STEPS = 4


class InterruptedRunError(Exception):
    pass


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    train_t5(folder / "t5", steps=2, batch=4, seed=1)
    return folder / "t5"


def train(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> Path:
    """A run of a few steps that saves at every one; returns its preview folder."""
    saved: list[Path] = []

    def watch(preview: Path) -> None:
        saved.append(preview)
        if len(saved) == stop_at:
            raise InterruptedRunError

    monkeypatch.setattr(dit, "scenes_of", lambda split: scenes_of(split)[:40])
    monkeypatch.setattr(dit, "fit", functools.partial(fit, checkpoint_every_s=-1.0))
    folder.mkdir(exist_ok=True)
    if not (folder / "t5").exists():
        (folder / "t5").symlink_to(text)
    preview = folder / "preview"
    dit.train_dit(folder, WEIGHTS / "vae", steps=STEPS, pictures=6, seed=1, preview=preview, watch=watch)
    return preview


@pytest.fixture(scope="module")
def preview(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return train(tmp_path_factory.mktemp("whole"), text_folder, monkeypatch)


def test_each_word_is_one_piece_and_no_caption_is_cut() -> None:
    tokenizer = t5_tokenizer()
    for caption in captions("train", 200, seed=0):
        pieces = tokenizer.tokenize(caption)
        assert [piece.removeprefix("\u2581") for piece in pieces] == caption.split()
        assert len(pieces) + 1 <= CAPTION_IDS
    assert tokenizer.unk_token_id not in tokenizer("Any other text: 3 cats, 1 dog!").input_ids
    assert len(tokenizer) == 3 + len(scene_words()) + 95 + 100


def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, text_folder: Path, preview: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InterruptedRunError):
        train(tmp_path / "stopped", text_folder, monkeypatch, stop_at=2)
    resumed = train(tmp_path / "stopped", text_folder, monkeypatch)
    name = Path("transformer") / "diffusion_pytorch_model.safetensors"
    whole, after = load_file(preview / name), load_file(resumed / name)
    assert whole.keys() == after.keys()
    assert all(torch.equal(whole[key], after[key]) for key in whole)


def test_training_s_states_are_the_pipeline_s_without_padding(preview: Path) -> None:
    pipeline = PixArtAlphaPipeline.from_pretrained(preview, dtype=torch.float32)
    prompts = captions("test", 3, seed=0)
    theirs, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")
    ours = T5Text.load(preview)(prompts)
    assert theirs.shape[1] == T5_TOKENS
    assert mask[:, CAPTION_IDS:].sum() == 0
    assert torch.equal(mask[:, :CAPTION_IDS], ours.mask)
    told = ours.mask.bool()
    torch.testing.assert_close(theirs[:, :CAPTION_IDS][told], ours.tokens[told], atol=1e-5, rtol=1e-5)
    latents, times = torch.randn(3, 4, 8, 8), torch.tensor([900, 500, 10])
    with torch.no_grad():
        long = pipeline.transformer(latents, theirs, times, encoder_attention_mask=mask).sample
        short = pipeline.transformer(latents, ours.tokens, times, encoder_attention_mask=ours.mask).sample
    torch.testing.assert_close(long, short, atol=1e-5, rtol=1e-4)


def test_the_loss_counts_what_is_told_of_the_empty_prompt(text_folder: Path) -> None:
    """A prediction that is right only for the empty prompt's states leaves the others' error."""
    states = torch.ones(5, 2, CAPTION_IDS, 128)
    pool = dit.DitPool(
        torch.zeros(5, 3, 4, 8, 8),
        states.half(),
        torch.ones(5, 2, CAPTION_IDS, dtype=torch.bool),
        torch.zeros(CAPTION_IDS, 128).half(),
        torch.arange(CAPTION_IDS) < 1,
    )
    seen = SimpleNamespace(empty=0, told=0)

    def count(noised, tokens, timesteps, encoder_attention_mask, return_dict):  # type: ignore[no-untyped-def]
        empty = tokens.eq(0).all((1, 2))
        assert torch.equal(encoder_attention_mask.sum(1) == 1, empty)
        seen.empty, seen.told = int(empty.sum()), int((~empty).sum())
        return (noised,)

    shares = torch.linspace(0.999, 0.001, 1000)
    dit.dit_loss(count, pool, shares, 1000, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert 70 <= seen.empty <= 130
    assert seen.empty + seen.told == 1000


def test_the_family_opens_what_training_writes(preview: Path) -> None:
    model = load(str(preview))
    assert model.family.name == "pixart-alpha"
    assert model.text_tokens == T5_TOKENS
    weights = sum(parameter.numel() for parameter in model.modules["transformer"].parameters())
    assert 8e6 <= weights <= 12e6
