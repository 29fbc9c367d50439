# SPDX-License-Identifier: Apache-2.0
"""Few-step students of `pocket` against their teacher: alignment, Frechet distance, diversity; and TDM's ablations.

    python benchmarks/distillation.py students build/pocket-turbo build/pocket-mse
    python benchmarks/distillation.py ablations

Everyone draws prompt i of the test split from the noise of seed i. Networks are PyTorch's, in float32.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from picture_rows import write_rows
from torch import Tensor

from turbopocket.export.build.draft import pipeline_manifest
from turbopocket.export.checkpoint.load import load
from turbopocket.export.distill.distill import distill, fastest_precision
from turbopocket.export.distill.recipe import DistillRecipe
from turbopocket.export.families.components import components_of, described
from turbopocket.export.recipe import make_recipe
from turbopocket.export.settings import with_values
from turbopocket.export.targets.side_files import write_tokenizers
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.pocket.evaluate import frechet_distance, write_json
from turbopocket.pocket.judge import Judge, alignment, features, load_judge
from turbopocket.pocket.render import render
from turbopocket.pocket.scenes import sample_scenes
from turbopocket.quant.distill.options import Devices
from turbopocket.quant.distill.steps import FixedIntervals, Step
from turbopocket.quant.distill.trajectory_mse import TEACHER_STEPS
from turbopocket.runtimes.drawing.text_to_image import generate_batch
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.schedule import SamplerSpec
from turbopocket.runtimes.scheduler_classes import config_for

RESULTS = Path(__file__).parent / "results"
PROMPTS = 500
BATCH = 100
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 25, 8
GUIDANCE = 2.0  # of the teacher in all ablations, as for the shipped student
DOCS = Path(__file__).parents[1] / "docs"
SHOWN_PROMPTS = [scene.caption for scene in sample_scenes("test", 6, 0)]


@dataclass(frozen=True)
class Figures:
    """Measured on the test split.

    Attributes:
        alignment: share of pictures that show exactly what their prompt says.
        frechet: distance of judge features to as many drawn pictures; None when not asked for.
        diversity: mean distance of judge features between pictures of one prompt, over seeds.
    """

    alignment: float
    frechet: float | None
    diversity: float


class Painter:
    """One model folder, ready to draw in any number of steps at any guidance, by DDIM with trailing timesteps."""

    def __init__(self, source: str, steps: int, guidance: float, step_biases: bool) -> None:
        model = load(source, steps=steps if step_biases else None)
        components = components_of(model)
        specs = {component.name: described(component) for component in components}
        asked = {"model": {"source": source}, "sampler": {"kind": "ddim", "steps": steps, "guidance": guidance}}
        walk = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
        spec = SamplerSpec.from_scheduler_config(config_for(model.scheduler_config, "ddim") | walk, steps, guidance)
        draft = pipeline_manifest(model, make_recipe(asked, "benchmark"), specs, ())
        self.manifest, self.runner = draft.model_copy(update={"sampler": spec}), torch_runner(components)
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizers(model, Path(folder))
            self.tokenizers = open_tokenizers(Path(folder), self.manifest)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(N, 3, 64, 64) uint8 pictures; each depends on its prompt and seed alone."""
        parts = [slice(start, start + BATCH) for start in range(0, len(prompts), BATCH)]
        drawing = self.runner, self.manifest, self.tokenizers
        pictures_NHWC = np.concatenate([generate_batch(*drawing, prompts[part], seeds[part]) for part in parts])
        return torch.from_numpy(pictures_NHWC).permute(0, 3, 1, 2)


def measured(painter: Painter, judge: Judge, frechet_pictures: int) -> Figures:
    """Draws the test prompts, one prompt many times, and as many more as the Frechet distance asks for."""
    count = max(PROMPTS, frechet_pictures)
    scenes = sample_scenes("test", count, 0)
    pictures = painter.draw([scene.caption for scene in scenes], range(count))
    found = alignment(judge, pictures[:PROMPTS], scenes[:PROMPTS]).all_right
    distance = None
    if frechet_pictures:
        reference = render(sample_scenes("test", frechet_pictures, 1), torch.Generator().manual_seed(0))
        distance = frechet_distance(judge, pictures, reference)
    return Figures(found, distance, diversity(painter, judge))


def diversity(painter: Painter, judge: Judge) -> float:
    """Mean judge-feature distance between two pictures of one prompt from different noise."""
    captions = [scene.caption for scene in sample_scenes("test", DIVERSITY_PROMPTS, 2)]
    prompts = [caption for caption in captions for _ in range(DIVERSITY_SEEDS)]
    read = features(judge, painter.draw(prompts, range(len(prompts)))).unflatten(0, (DIVERSITY_PROMPTS, -1))
    pairs = torch.cdist(read, read)
    return float(pairs.sum() / (DIVERSITY_PROMPTS * DIVERSITY_SEEDS * (DIVERSITY_SEEDS - 1)))


def compare_students(teacher: str, tdm: str, mse: str | None, frechet_pictures: int) -> dict[str, Any]:
    """Teacher at 20, 4, 2 and 1 guided steps; students at 4, 2 and 1 without guidance; Frechet distances at 4."""
    judge, own = load_judge(), json.loads((load(teacher).folder / "sampling.json").read_text())
    results, rows = {}, {}
    wanted = [("teacher", teacher, steps, own["guidance_scale"]) for steps in (20, 4, 2, 1)]
    wanted += [("tdm", tdm, steps, 1.0) for steps in (4, 2, 1)]
    wanted += [("mse", mse, steps, 1.0) for steps in (4, 2, 1)] if mse else []
    for name, source, steps, guidance in wanted:
        painter = Painter(source, steps, guidance, step_biases=name != "teacher")
        results[f"{name} {steps}"] = asdict(measured(painter, judge, frechet_pictures if steps == 4 else 0))
        rows[f"{name}, {steps} steps"] = shown(painter)
        print(name, steps, results[f"{name} {steps}"], flush=True)
    write_rows(rows, SHOWN_PROMPTS, DOCS / "students.png")
    return results


def shown(painter: Painter) -> Tensor:
    """The same test prompts for every model, the first ones of the split."""
    return painter.draw(SHOWN_PROMPTS, range(len(SHOWN_PROMPTS)))


def ablate(recipe: DistillRecipe, folder: Path, frechet_pictures: int) -> dict[str, Any]:
    """All devices, each one off, and regression for as many network evaluations: one run each, equal compute."""
    judge, results, rows = load_judge(), {}, {}
    runs: list[tuple[str, str, dict[str, bool]]] = [("all devices", "tdm", {})]
    runs += [(f"without {each.name}", "tdm", {f"distill.devices.{each.name}": False}) for each in fields(Devices)]
    for title, method, without in [*runs, ("mse", "mse", {})]:
        iterations = recipe.distill.iterations if method == "tdm" else mse_iterations(recipe.distill.iterations)
        out = folder / title.replace(" ", "-")
        if not out.is_dir():
            distill(with_values(recipe, {"distill.method": method, "distill.iterations": iterations, **without}), out)
        results[title] = {"iterations": iterations}
        for steps in (4, 2, 1):
            painter = Painter(str(out), steps, 1.0, step_biases=True)
            results[title][str(steps)] = asdict(measured(painter, judge, frechet_pictures if steps == 4 else 0))
            rows[f"{title}, {steps} steps"] = shown(painter)
        print(title, results[title], flush=True)
    write_rows(
        {name: row for name, row in rows.items() if "2 steps" not in name}, SHOWN_PROMPTS, DOCS / "ablations.png"
    )
    return results


def network_evaluations(walk: Sequence[Step], guidance: float) -> tuple[float, float]:
    """Forward passes that one iteration costs by TDM and by regression; a backward pass counts as two.

    TDM: half the walk to get there, the student's step and the fake score's update with gradient, the fake and the
    guided teacher without. Regression: the teacher's whole trajectory, and every student step with gradient.
    """
    asks = 2 if guidance > 1 else 1
    tdm = (len(walk) - 1) / 2 + 3 + 3 + 1 + asks
    per_step = -(-TEACHER_STEPS // len(walk))
    return tdm, per_step * len(walk) * asks + 3 * len(walk)


def mse_iterations(iterations: int) -> int:
    """How many iterations of regression cost as many network evaluations as these of TDM."""
    schedule = FixedIntervals(1000, range(1, 5))
    costs = np.array([network_evaluations(schedule.walk(count), guidance=2.0) for count in schedule.counts])
    tdm, mse = schedule.odds @ costs
    return round(iterations * float(tdm / mse))


def main() -> None:
    """Measures, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["students", "ablations"])
    parser.add_argument("folders", nargs="*", help="students: the TDM student, then the MSE student")
    parser.add_argument("--teacher", default="pocket")
    parser.add_argument("--frechet-pictures", type=int, default=5000)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--student-lr", type=float, default=1.5e-4)
    parser.add_argument("--fake-lr", type=float, default=6e-4)
    parser.add_argument("--runs", type=Path, default=Path("build/ablations"), help="where the ablations are kept")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rates = {"student_lr": asked.student_lr, "fake_lr": asked.fake_lr}
    if asked.what == "students":
        results = compare_students(asked.teacher, *[*asked.folders, None][:2], asked.frechet_pictures)
    else:
        training = {"iterations": asked.iterations, "batch": asked.batch, **rates}
        values = {f"distill.{key}": value for key, value in training.items()}
        values |= {"teacher.source": asked.teacher, "teacher.guidance": GUIDANCE}
        results = ablate(with_values(DistillRecipe(), values), asked.runs, asked.frechet_pictures)
    about = {"prompts": PROMPTS, "split": "test"}
    if asked.what == "ablations":
        about |= {"batch": asked.batch, **rates, "guidance": GUIDANCE, "precision": fastest_precision()}
    write_json(asked.out or RESULTS / f"distillation_{asked.what}.json", {**about, "results": results})


if __name__ == "__main__":
    main()
