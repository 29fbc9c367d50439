# SPDX-License-Identifier: Apache-2.0
"""The loop draws whatever a manifest's pipeline says: here one with a text encoder that reads a mask, a transformer
that is told the mask and sizes, and a prediction of which half the channels are a variance."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray
from pydantic import ValidationError

from turbopocket.ground.arrays import Arrays
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.sampler import Memory, make_sampler
from turbopocket.runtimes.drawing.text_to_image import FirstPicture, draw, exercise, generate, seeded_noise
from turbopocket.runtimes.drawing.tokenizer import Tokenizer
from turbopocket.runtimes.image_size import ImageSize
from turbopocket.runtimes.manifest import ComponentSpec, FileEntry, ImageSpec, Manifest, TensorSpec
from turbopocket.runtimes.pipeline import Decoder, Denoiser, Encoder, MaskFeed, NumbersFeed, Pipeline, TextEncoder
from turbopocket.runtimes.runner import one_by_one
from turbopocket.runtimes.schedule import SamplerSpec

from ...pipelines import text

TOKENS, WIDTH = 6, 5
PROMPT = "a red circle"
DPM = {"_class_name": "DPMSolverMultistepScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def tensor(name: str, *shape: int | str, dtype: Any = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=list(shape))


COMPONENTS = {
    "reader": ComponentSpec(
        file="reader.onnx",
        inputs=[
            tensor("input_ids", "batch", TOKENS, dtype="int64"),
            tensor("attention_mask", "batch", TOKENS, dtype="int64"),
        ],
        outputs=[tensor("last_hidden_state", "batch", TOKENS, WIDTH)],
    ),
    "transformer": ComponentSpec(
        file="transformer.onnx",
        inputs=[
            tensor("hidden_states", "batch", 4, 8, 4),
            tensor("timestep"),
            tensor("encoder_hidden_states", "batch", TOKENS, WIDTH),
            tensor("encoder_attention_mask", "batch", TOKENS, dtype="int64"),
            tensor("resolution", "batch", 2),
            tensor("aspect_ratio", "batch", 1),
        ],
        outputs=[tensor("out", "batch", 8, 8, 4)],
    ),
    "pixels": ComponentSpec(
        file="pixels.onnx", inputs=[tensor("z", "batch", 4, 8, 4)], outputs=[tensor("picture", "batch", 3, 16, 8)]
    ),
    "latents": ComponentSpec(
        file="latents.onnx", inputs=[tensor("picture", "batch", 3, 16, 8)], outputs=[tensor("z", "batch", 4, 8, 4)]
    ),
}
PIPELINE = Pipeline(
    text_encoders={"reader": TextEncoder(attention_mask="attention_mask")},
    denoiser=Denoiser(
        component="transformer",
        latents="hidden_states",
        timestep="timestep",
        inputs={
            "encoder_hidden_states": text(("reader", "last_hidden_state")),
            "encoder_attention_mask": MaskFeed(component="reader"),
            "resolution": NumbersFeed(values=["height", "width"]),
            "aspect_ratio": NumbersFeed(values=["aspect_ratio"]),
        },
        output="out",
        channels="first half",
    ),
    without_prompt="empty prompt",
    decoder=Decoder(component="pixels", latents="z", output="picture"),
    encoder=Encoder(component="latents", picture="picture", output="z", gives="latents"),
)


def manifest(**changed: Any) -> Manifest:
    paths = [f"{name}.onnx" for name in COMPONENTS] + ["tokenizer/tokenizer.json"]
    values: dict[str, Any] = {
        "name": "drawn",
        "family": "nobody's",
        "target": "onnx",
        "files": [FileEntry(path=path, bytes=0, sha256="0" * 64) for path in paths],
        "components": COMPONENTS,
        "tokenizers": {"reader": "tokenizer"},
        "pipeline": PIPELINE,
        "sampler": SamplerSpec.from_scheduler_config(DPM, 4, guidance_scale=4.5),
        "image": ImageSpec(
            height=16, width=8, latent_channels=4, latent_height=8, latent_width=4, vae_scaling_factor=0.5
        ),
        "sizes": [ImageSize(16, 8)],
        "tools": {},
        "recipe": "",
    }
    return Manifest(**(values | changed))


class Stubs:
    """Networks of a line each, that remember what they were given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Arrays]] = []

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        self.calls.append((component, dict(inputs)))
        return getattr(self, component)(**inputs)

    def reader(self, input_ids: Any, attention_mask: Any) -> Arrays:
        states = np.sin(np.arange(WIDTH) + input_ids[:, :, None] + 1) * attention_mask[:, :, None]
        return {"last_hidden_state": states.astype(np.float32)}

    def transformer(self, hidden_states: Any, timestep: Any, **told: Any) -> Arrays:
        mask = told["encoder_attention_mask"]
        words = (told["encoder_hidden_states"] * mask[:, :, None]).sum((1, 2)) / mask.sum()
        told_sizes = told["resolution"].sum() / 100 + told["aspect_ratio"].sum()
        moved = words.reshape(-1, 1, 1, 1) + timestep / 1000 + told_sizes
        prediction = hidden_states + np.sin(hidden_states + moved) / 50
        return {"out": np.concatenate([prediction, np.full_like(prediction, 1e6)], axis=1).astype(np.float32)}

    def pixels(self, z: Any) -> Arrays:
        return {"picture": np.tanh(np.repeat(np.repeat(z[:, :3], 2, 2), 2, 3) / 10)}

    def latents(self, picture: Any) -> Arrays:
        z = picture[:, [0, 1, 2, 0], ::2, ::2]
        return {"z": z}


@pytest.fixture
def words(tmp_path: Any) -> dict[str, Tokenizer]:
    """Words of one token each with an end mark and no beginning, as T5 has it; padding is 0."""
    rules = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "circle": 4}, unk_token="<unk>")
    )
    rules.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rules.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    rules.enable_padding(pad_id=0, pad_token="<pad>")
    rules.save(str(tmp_path / "tokenizer.json"))
    return {"reader": Tokenizer(tmp_path / "tokenizer.json", TOKENS)}


def test_a_pipeline_of_no_known_family_is_drawn_by_the_book(words: dict[str, Tokenizer]) -> None:
    """The same loop written down once more for this pipeline alone."""
    told = manifest()
    stubs, noise = Stubs(), seeded_noise(3)
    asked = {
        ids: {
            "encoder_hidden_states": stubs.reader(np.array([list(ids)]), np.array([mask]))["last_hidden_state"],
            "encoder_attention_mask": np.array([mask]),
            "resolution": np.array([[16.0, 8.0]]),
            "aspect_ratio": np.array([[2.0]]),
        }
        for ids, mask in (((2, 3, 4, 1, 0, 0), [1, 1, 1, 1, 0, 0]), ((1, 0, 0, 0, 0, 0), [1, 0, 0, 0, 0, 0]))
    }
    sampler, memory = make_sampler(told.sampler), Memory()
    x_t = noise((1, 4, 8, 4))
    for index, timestep in enumerate(sampler.timesteps):
        with_prompt, without = (stubs.transformer(x_t, timestep, **values)["out"][:, :4] for values in asked.values())
        guided = without + np.float32(4.5) * (with_prompt - without)
        x_t, memory = sampler.step(index, x_t, guided, memory, noise)
    expected = np.clip(stubs.pixels(x_t / np.float32(0.5))["picture"][0] / 2 + 0.5, 0, 1).transpose(1, 2, 0)
    assert expected.std() > 0.01, "a flat picture would prove nothing"
    found = draw(stubs, told, words, PROMPT, seeded_noise(3))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_graph_is_given_the_number_types_it_has(words: dict[str, Tokenizer]) -> None:
    stubs = Stubs()
    draw(stubs, manifest(), words, PROMPT, seeded_noise(0))
    for component, inputs in stubs.calls:
        expected = {each.name: (each.dtype, len(each.shape)) for each in COMPONENTS[component].inputs}
        assert {name: (value.dtype.name, value.ndim) for name, value in inputs.items()} == expected


def test_zeros_for_no_prompt_leave_mask_and_sizes_as_they_are(words: dict[str, Tokenizer]) -> None:
    stubs = Stubs()
    zeros = PIPELINE.model_copy(update={"without_prompt": "zeros"})
    draw(stubs, manifest(pipeline=zeros), words, PROMPT, seeded_noise(0))
    conditional, away_from = (inputs for component, inputs in stubs.calls[1:3] if component == "transformer")
    assert not away_from["encoder_hidden_states"].any()
    for name in ("encoder_attention_mask", "resolution", "aspect_ratio"):
        assert (away_from[name] == conditional[name]).all()
    assert [component for component, _ in stubs.calls].count("reader") == 1


def test_a_first_picture_goes_through_the_encoder_that_the_pipeline_names(words: dict[str, Tokenizer]) -> None:
    stubs = Stubs()
    pixels = np.full((16, 8, 3), 255, np.uint8)
    draw(stubs, manifest(), words, PROMPT, seeded_noise(0), first=FirstPicture(pixels, 0.5))
    assert stubs.calls[1][0] == "latents" or stubs.calls[2][0] == "latents"
    without = PIPELINE.model_copy(update={"encoder": None})
    with pytest.raises(TurbopocketError, match="can not begin with a picture"):
        draw(Stubs(), manifest(pipeline=without), words, PROMPT, seeded_noise(0), first=FirstPicture(pixels, 0.5))


def changed(**denoiser: Any) -> Pipeline:
    return PIPELINE.model_copy(update={"denoiser": PIPELINE.denoiser.model_copy(update=denoiser)})


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (changed(component="unet"), "pipeline names unet, which is not a component"),
        (changed(latents="sample"), "pipeline names input sample of transformer, which has hidden_states, timestep"),
        (changed(output="sample"), "pipeline names output sample of transformer, which has out"),
        (
            changed(inputs={n: f for n, f in PIPELINE.denoiser.inputs.items() if n != "resolution"}),
            "pipeline does not say what feeds input resolution of transformer",
        ),
        (
            changed(inputs=PIPELINE.denoiser.inputs | {"encoder_hidden_states": text(("reader", "pooled"))}),
            "pipeline names output pooled of reader, which has last_hidden_state",
        ),
        (
            PIPELINE.model_copy(update={"text_encoders": {"reader": TextEncoder(), "pixels": TextEncoder(ids="z")}}),
            "pipeline: text encoder pixels has no tokenizer",
        ),
        (
            PIPELINE.model_copy(update={"decoder": Decoder(component="pixels", latents="x", output="picture")}),
            "pipeline names input x of pixels, which has z",
        ),
    ],
)
def test_a_pipeline_that_the_components_do_not_bear_out_is_refused(pipeline: Pipeline, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        manifest(pipeline=pipeline)


class ByPicture(Stubs):
    """The same networks, whose rows know nothing of each other."""

    def transformer(self, hidden_states: Any, timestep: Any, **told: Any) -> Arrays:
        rows = []
        for at in range(len(hidden_states)):
            own = {name: value[at : at + 1] for name, value in told.items()}
            rows.append(super().transformer(hidden_states[at : at + 1], timestep, **own))
        return {"out": np.concatenate([row["out"] for row in rows])}


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("without", ["zeros", "empty prompt"])
def test_pictures_drawn_at_once_are_those_drawn_one_by_one(
    words: dict[str, Tokenizer], scheduler: str, without: Any
) -> None:
    """The ancestral sampler draws noise at every step, so each picture must go on with its own."""
    spec = SamplerSpec.from_scheduler_config(DPM | {"_class_name": scheduler}, 4, guidance_scale=4.5)
    told = manifest(sampler=spec, pipeline=PIPELINE.model_copy(update={"without_prompt": without}))
    prompts, seeds = ["a red circle", "red", "circle circle red"], [5, 3, 4]
    stubs = ByPicture()
    found = exercise(stubs, told, words, prompts, seeds)
    assert [component for component, _ in stubs.calls].count("transformer") == 2 * 4
    for picture, prompt, seed in zip(found, prompts, seeds, strict=True):
        assert picture.std() > 1, "flat pictures would prove nothing"
        assert (picture == generate(ByPicture(), told, words, prompt, seed)).all()


def test_a_graph_for_one_item_is_asked_for_several_one_by_one() -> None:
    specs = [tensor("x", 1, 2), tensor("timestep"), tensor("t", 1)]
    x, t = np.arange(6).reshape(3, 2), np.arange(3)
    calls = one_by_one(specs, {"x": x, "timestep": np.array(7), "t": t})
    assert [call["x"].tolist() for call in calls] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [call["t"].tolist() for call in calls] == [[0], [1], [2]]
    assert all(call["timestep"] == 7 for call in calls)
    assert len(one_by_one([tensor("x", "batch", 2)], {"x": x})) == 1
