# SPDX-License-Identifier: Apache-2.0
"""One artifact for pictures of several sizes: README's commands, and every size against diffusers' own pipeline."""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopocket.export.build.build import build
from turbopocket.export.check import check
from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of
from turbopocket.export.output.names import WEIGHTS_FILE
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import load_recipe, recipe_of
from turbopocket.export.settings import with_values
from turbopocket.export.verify.diffusers_reference import diffusers_picture
from turbopocket.export.verify.gaps import Session
from turbopocket.quant.compress import decompressed
from turbopocket.quant.store import load_weights
from turbopocket.runtimes.drawing.text_to_image import FirstPicture, draw, generate, seeded_noise
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.image_size import ImageSize
from turbopocket.runtimes.manifest import load_manifest
from turbopocket.runtimes.onnx.runner import OnnxRunner

README = Path(__file__).parents[3] / "README.md"
QUIET = StageProgress(quiet=True)
PROMPT = "a red circle on the blue square"
Run = Callable[..., Any]


def command(verb: str) -> list[str]:
    """The arguments of README's command of that verb, among those with sizes."""
    (found,) = re.findall(rf"^turbopocket {verb} (.*--size .*)$", README.read_text(), flags=re.MULTILINE)
    return re.findall(r'"[^"]*"|\S+', found)


def sizes_in(arguments: Sequence[str]) -> list[str]:
    return [value for option, value in pairwise(arguments) if option == "--size"]


def drawn_size(png: Path) -> str:
    with Image.open(png) as picture:
        return f"{picture.width}x{picture.height}"


@pytest.fixture(scope="module", params=["sdxl", "sd", pytest.param("sd, tuned", marks=pytest.mark.slow)])
def of_sizes(
    request: pytest.FixtureRequest,
    tiny_sdxl: Path,
    tiny_sd: Path,
    recipe_toml: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """An artifact of README's sizes; that of Stable Diffusion is guided and can begin with a picture.

    Once it is also fitted in blocks and fine-tuned, whose calls are recorded while it draws.
    """
    out = tmp_path_factory.mktemp("sizes") / "art"
    asked: dict[str, Any] = {"image.sizes": sizes_in(command("build")), "compress.budget": "8MB"}
    asked |= {"calibrate.pictures": 4}
    if request.param == "sdxl":
        asked |= {"model.source": str(tiny_sdxl)}
    else:
        asked |= {"model.source": str(tiny_sd), "sampler.guidance": 7.5, "sampler.image_to_image": True}
    if request.param == "sd, tuned":
        asked |= {"compress.sequential": True, "finetune.iterations": 2, "finetune.pictures": 4}
    calibrated: list[ImageSize] = []
    honest = Session.draw

    def spy(session: Session, runner: Any, index: int) -> Any:
        picture = honest(session, runner, index)
        calibrated.append(ImageSize(*picture.shape[:2]))
        return picture

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "draw", spy)
        built = build(with_values(load_recipe(recipe_toml), asked), out, overwrite=False, progress=QUIET)
    sizes = load_manifest(built.folder).sizes
    assert calibrated[:4] == [*sizes, sizes[0]], "what compression does to one size, it may not have seen at another"
    return built


@pytest.fixture
def sdxl_of_sizes(of_sizes: Any) -> Any:
    if load_manifest(of_sizes.folder).family != "sdxl":
        pytest.skip("asked of one family only")
    return of_sizes


def test_every_size_is_what_diffusers_draws_with_the_stored_weights(of_sizes: Any) -> None:
    manifest = load_manifest(of_sizes.folder)
    model = load(recipe_of(of_sizes.folder, manifest).model.source)
    graphs = {component.name: component.module.model for component in components_of(model, image_to_image=True)}
    kept = load_weights(of_sizes.report.parent / WEIGHTS_FILE)
    runner, tokenizers = OnnxRunner(of_sizes.folder, manifest), open_tokenizers(of_sizes.folder, manifest)
    assert len({size.height / size.width for size in manifest.sizes}) == 3
    for size in manifest.sizes:
        sized = manifest.at_size(size)
        with decompressed(graphs, kept):
            expected = diffusers_picture(model, sized, PROMPT, seed=3)
        found = draw(runner, sized, tokenizers, PROMPT, seeded_noise(3))
        assert found.shape == (*size, 3)
        assert expected.std() > 0.01, "a flat picture would prove nothing"
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_build_holds_every_size_against_diffusers_and_against_the_runtime(of_sizes: Any) -> None:
    sizes = load_manifest(of_sizes.folder).sizes
    names = [each.array for each in of_sizes.gaps.to_diffusers.differences]
    for size in sizes:
        assert any(f"the finished picture at {size}" in name for name in names)
        assert any(f"input sample of call 1 of unet at {size}" in name for name in names)
    assert [picture.shape for picture in of_sizes.gaps.pictures.artifact] == [(*size, 3) for size in sizes]
    rows = of_sizes.gaps.lowering["onnxruntime"].rows
    assert {row.picture for row in rows} == set(range(len(sizes)))
    assert max(row.relative_error for row in rows) <= 1e-4


def test_the_files_are_as_planned(of_sizes: Any) -> None:
    assert of_sizes.total_bytes <= of_sizes.plan.total_bytes <= 1.005 * of_sizes.total_bytes


def test_check_draws_every_size_again(of_sizes: Any) -> None:
    checked = check(of_sizes.folder, QUIET)
    assert checked.failure is None
    assert checked.gaps is not None
    assert checked.gaps.lowering["onnxruntime"].worst_errors == of_sizes.gaps.lowering["onnxruntime"].worst_errors
    assert any("was trained to draw 32x32" in note for note in checked.notes)


def test_readmes_commands_draw_the_size_they_say(
    sdxl_of_sizes: Any, turbopocket: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    arguments = command("generate")
    (tmp_path / arguments[0]).symlink_to(sdxl_of_sizes.folder)
    assert command("build")[command("build").index("--out") + 1] == arguments[0]
    ran = turbopocket("generate", *(each.strip('"') for each in arguments), "--json")
    assert ran.code == 0, ran.err
    (size,) = sizes_in(arguments)
    drawn = json.loads(ran.out)
    assert drawn["size"] == size
    assert drawn_size(tmp_path / drawn["picture"]) == size


def test_the_first_size_is_drawn_by_default_and_others_are_refused(
    sdxl_of_sizes: Any, turbopocket: Run, tmp_path: Path
) -> None:
    first, *others = sizes_in(command("build"))
    out = tmp_path / "a.png"
    assert turbopocket("generate", sdxl_of_sizes.folder, PROMPT, "-o", out).code == 0
    assert drawn_size(out) == first
    for size, message in (
        ("40x32", f"tiny_sdxl was asked for 40x32, this artifact was built for {', '.join([first, *others])}"),
        ("huge", "size 'huge' is not WIDTHxHEIGHT in pixels, such as 768x512"),
    ):
        ran = turbopocket("generate", sdxl_of_sizes.folder, PROMPT, "--size", size, "-o", tmp_path / "b.png")
        assert (ran.code, ran.err.splitlines()[0]) == (1, f"error: {message}")
    assert not (tmp_path / "b.png").exists()


def test_an_artifact_of_one_size_takes_that_one_only(artifact: Path, turbopocket: Run, tmp_path: Path) -> None:
    asked = "generate", artifact, PROMPT, "-o", tmp_path / "a.png"
    ran = turbopocket(*asked, "--size", "48x32")
    assert "was asked for 48x32, this artifact was built for 32x32" in ran.err
    assert "hint: build another with --size 48x32" in ran.err
    assert turbopocket(*asked, "--size", "32x32").code == 0
    assert '"latent_height"' not in json.dumps(json.loads((artifact / "manifest.json").read_text())["components"])


def test_pictures_that_begin_with_one_have_its_size(of_sizes: Any) -> None:
    manifest = load_manifest(of_sizes.folder)
    if "vae_encoder" not in manifest.components:
        pytest.skip("asked of the artifact that can")
    runner, tokenizers = OnnxRunner(of_sizes.folder, manifest), open_tokenizers(of_sizes.folder, manifest)
    for size in manifest.sizes:
        first = FirstPicture(np.full((*size, 3), 99, np.uint8), 1.0)
        assert generate(runner, manifest.at_size(size), tokenizers, PROMPT, 0, first=first).shape == (*size, 3)


def test_the_report_says_which_size_each_picture_has(sdxl_of_sizes: Any) -> None:
    page = sdxl_of_sizes.report.read_text()
    sizes = sizes_in(command("build"))
    for size in sizes:
        assert f"<span>{size} px</span>" in page
    assert f"{', '.join(sizes)} px (the first is the default)" in page
    largest = load_manifest(sdxl_of_sizes.folder).largest_size
    assert f"for one picture of {largest} px" in page
