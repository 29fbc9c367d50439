# SPDX-License-Identifier: Apache-2.0
"""Every kind of checkpoint on every target, from folder to picture, held against diffusers' own pipeline.

All pairs are slow tests; a few, others with every change of the source, run in `make test`.
"""

import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from turbopocket.export.build.build import build
from turbopocket.export.check import check
from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.families.components import layers_of
from turbopocket.export.families.graphs import Component
from turbopocket.export.families.registry import FAMILIES
from turbopocket.export.output.names import RANGES_FILE, WEIGHTS_FILE
from turbopocket.export.plan import plan
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import Recipe, make_recipe
from turbopocket.export.targets.registry import default_targets, open_target
from turbopocket.export.verify.diffusers_reference import diffusers_picture
from turbopocket.quant.compress import decompressed
from turbopocket.quant.ranges import load_ranges
from turbopocket.quant.store import load_weights
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.drawing.text_to_image import draw, seeded_noise
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import Manifest, load_manifest
from turbopocket.runtimes.open import open_runner

from ..checkpoints import CHECKPOINTS, REFUSED, Checkpoint, Refused, models_page
from ..flux2_checkpoints import PLANNED, Planned

ROOT = Path(__file__).parents[2]
PROMPT, SEED = "a red circle on the white square", 3
FORMATS = {"onnx": ["int4-g32", "int8-g32", "fp16"], "coreml": ["int8-row"], "executorch": ["fp32"]}
"""ExecuTorch's integer layers round activations, where one code that is rounded the other way makes another picture of
random weights; they are judged layer by layer on equal inputs, in `build` itself."""
AMPLIFIED = 10
"""How many times as far as one component's outputs a picture may be: guidance of 5 weighs two outputs by 5 and 4."""
NAMES = tuple(target.name for target in default_targets())
PAIRS = [(checkpoint, target) for checkpoint in CHECKPOINTS for target in NAMES if target in checkpoint.targets]


def _turn() -> int:
    """A number that every change of the source moves, and nothing else."""
    turn = 0
    for path in sorted(path for folder in ("export", "runtimes") for path in (ROOT / folder).rglob("*.py")):
        turn = zlib.crc32(path.read_bytes(), turn)
    return turn


def _params() -> list[Any]:
    """All pairs; of each target one, by turns, is not slow."""
    turn = _turn()
    able = {target: [pair[0].name for pair in PAIRS if pair[1] == target] for target in NAMES}
    quick = {(names[(turn + index) % len(names)], target) for index, (target, names) in enumerate(able.items())}
    return [
        pytest.param(
            checkpoint,
            target,
            id=f"{checkpoint.name}-{target}",
            marks=[] if (checkpoint.name, target) in quick else [pytest.mark.slow],
        )
        for checkpoint, target in PAIRS
    ]


def test_every_family_target_and_runtime_is_in_the_matrix() -> None:
    only_planned = {name for name, family in FAMILIES.items() if family.only_planned is not None}
    assert {checkpoint.family for checkpoint in CHECKPOINTS} == set(FAMILIES) - only_planned
    assert {row.family for row in PLANNED} == only_planned
    assert set(FORMATS) == set(NAMES)


@pytest.mark.parametrize(("checkpoint", "target"), _params())
def test_from_folder_to_picture(checkpoint: Checkpoint, target: str, tmp_path: Path) -> None:
    folder = tmp_path / checkpoint.name
    checkpoint.make(folder)
    recipe = _recipe(checkpoint, target, folder)
    quiet = StageProgress(quiet=True)
    estimated = plan(recipe).fixed_bytes
    built = build(recipe, tmp_path / "art", overwrite=False, progress=quiet)
    assert estimated == pytest.approx(built.plan.fixed_bytes, rel=0.25)  # nearly all graph, in models this small
    assert set(built.gaps.lowering) == set(open_target(recipe.target).runtime_names)
    checked = check(tmp_path / "art", quiet)
    assert checked.gaps is not None
    assert checked.failure is None

    manifest = load_manifest(tmp_path / "art")
    assert manifest.sampler.steps == checkpoint.steps
    expected = _by_diffusers(recipe, built.report.parent, manifest)
    shutil.rmtree(folder)  # the artifact draws by itself
    tokenizers = open_tokenizers(tmp_path / "art", manifest)
    found = draw(open_runner(tmp_path / "art", manifest), manifest, tokenizers, PROMPT, seeded_noise(SEED))
    assert found.std() > 0.02
    limit = AMPLIFIED * open_target(recipe.target).lowering_limit(built.plan.schemes)
    assert relative_error(found - expected.mean(), expected - expected.mean()) < limit


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    made = {}
    for checkpoint in CHECKPOINTS:
        if checkpoint.name in {each.base for each in REFUSED}:
            made[checkpoint.name] = tmp_path_factory.mktemp("bases") / checkpoint.name
            checkpoint.make(made[checkpoint.name])
    return made


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_what_is_not_supported_is_refused_in_its_sentence_by_plan_and_build(
    row: Refused, folders: Mapping[str, Path], tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[row.base], folder)
    asked = ("--formats", "fp16", "--recipe", tmp_path / "recipe.toml")
    (tmp_path / "recipe.toml").write_text("[sampler]\nsteps = 2\nguidance = 1.0\n")
    assert turbopocket("plan", folder, *asked).code == 0
    row.change(folder)
    planned = turbopocket("plan", folder, *asked)
    built = turbopocket("build", folder, *asked, "--out", tmp_path / "art")
    assert (planned.code, built.code) == (1, 1)
    assert row.says in planned.err
    assert planned.err.splitlines()[-1] == built.err.splitlines()[-1]
    assert not (tmp_path / "art").exists()


@pytest.mark.parametrize("row", PLANNED, ids=lambda row: row.family)
def test_what_is_planned_alone_is_planned_and_says_what_a_build_lacks(
    row: Planned, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    row.make(tmp_path / "model")
    planned = turbopocket("plan", tmp_path / "model", "--formats", "int8-row,fp16")
    built = turbopocket("build", tmp_path / "model", "--out", tmp_path / "art")
    assert (planned.code, built.code) == (0, 1)
    assert row.lacks in planned.out
    assert row.lacks in built.err


def test_the_page_on_models_shows_this_matrix() -> None:
    assert models_page() in (ROOT / "docs" / "models.md").read_text()


def _recipe(checkpoint: Checkpoint, target: str, folder: Path) -> Recipe:
    values: dict[str, Any] = {
        "model": {"source": str(folder)},
        "target": {"name": target},
        "sampler": {"steps": checkpoint.steps, "guidance": checkpoint.guidance},
        "compress": {"formats": FORMATS[target], "fit": "absmax"},
        "calibrate": {"pictures": 1},
        "parity": {"pictures": 1},
    }
    return make_recipe(
        {name: values.get(name, {}) | checkpoint.recipe.get(name, {}) for name in values | checkpoint.recipe}, "test"
    )


def _by_diffusers(recipe: Recipe, report: Path, manifest: Manifest) -> Any:
    """The picture of diffusers' own pipeline over modules that hold the stored weights, rounding as the target does."""
    model = load(recipe.model.source, recipe.model.lora, recipe.sampler.steps)
    target = open_target(recipe.target)
    components = target.components(model, manifest.sizes)
    kept, ranges = load_weights(report / WEIGHTS_FILE), load_ranges(report / RANGES_FILE)
    weights = {name: kept[name] for name in layers_of(components) if name in kept}
    with decompressed({component.name: component.module.model for component in components}, kept):
        as_run = {component.name: target.as_run(component, weights, ranges) for component in components}
        return diffusers_picture(_with(model, as_run), manifest, PROMPT, SEED)


def _with(model: LoadedModel, components: Mapping[str, Component]) -> LoadedModel:
    modules: dict[str, nn.Module] = dict(model.modules)
    for name, component in components.items():
        owner = {"vae_decoder": "vae"}.get(name, name)
        whole, part = modules[owner], component.module.model
        if isinstance(part, type(whole)):
            modules[owner] = part
        else:  # a half of the whole, whose modules have the names that they have there
            for child_name, child in part.named_children():
                setattr(whole, child_name, child)
    return replace(model, modules=modules)
