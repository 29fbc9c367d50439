# SPDX-License-Identifier: Apache-2.0
"""Which of several plans is carried out: the one whose pictures are nearest to the float model's.

Losses of layers add up only about, and two kinds of them have no exchange rate (MixDQ, Zhao et al. 2024, arXiv
2405.17873, section 4.3), so plans are drawn with before one is chosen, on prompts that are not reported.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...ground.files import write_whole
from ...quant.calibrate import ranges_of
from ...quant.compress import compress_to_files, decompressed
from ...quant.fit import parse_fit
from ...quant.observe import LayerStats
from ...quant.plan import Plan
from ..verify.gaps import Session, torch_runner
from .bench import Workbench
from .calibration import drawing_inputs, fitting_inputs
from .journal import Journal
from .probe import PROBE_PROMPTS

SELECTION_PROMPTS = 4
SCORES_FILE = "scores.json"


def selected(
    bench: Workbench,
    session: Session,
    stats: Mapping[str, LayerStats],
    plans: Sequence[Plan],
    journal: Journal,
) -> Plan:
    """The plan with the least mean squared difference of pictures; the only one without drawing."""
    if len(plans) == 1:
        return plans[0]
    prompts = bench.evidence.prompts("measure", PROBE_PROMPTS + SELECTION_PROMPTS, bench.recipe.seed)[PROBE_PROMPTS:]
    fit = bench.fit(parse_fit(bench.recipe.compress.fit))
    asked = fitting_inputs(bench, session, journal, fit)
    inputs = {
        **asked,
        **drawing_inputs(session, prompts, list(bench.modules)),
        "target": bench.recipe.target.model_dump(mode="json"),
        "plans": [{choice.layer: choice.scheme for choice in each.choices} for each in plans],
    }

    def make(folder: Path) -> None:
        drawing = replace(session, prompts=prompts).of_one_size()
        with write_whole(folder / SCORES_FILE) as file:
            file.write_text(json.dumps(_scores(bench, drawing, stats, plans, journal.store("compress", asked))))

    scores = json.loads((journal.product("select", inputs, make) / SCORES_FILE).read_text(encoding="utf-8"))
    best = int(np.argmin(scores))
    bench.progress.remark(
        f"note: of {len(plans)} plans, the first of least loss of quality, number {best + 1} is taken: its pictures of "
        f"selection prompts have a mean squared error of {scores[best]:.3g}, others {_next(scores, best):.3g} or more"
    )
    return plans[best]


def _scores(
    bench: Workbench, drawing: Session, stats: Mapping[str, LayerStats], plans: Sequence[Plan], kept: Path
) -> list[float]:
    """The mean squared difference between each plan's pictures and the float model's, of values in 0..255."""
    fit, ranges = bench.fit(parse_fit(bench.recipe.compress.fit)), ranges_of(stats)
    pictures = range(len(drawing.prompts))
    scores = []
    with bench.progress.stage("select", len(plans)) as advance:
        expected = drawing.draw_batch(torch_runner(bench.components), pictures)
        for each in plans:
            weights = compress_to_files(bench.layers, each, fit, stats, kept, bench.spread)
            as_run = [bench.target.as_run(component, weights, ranges, each.schemes) for component in bench.components]
            with decompressed(bench.modules, weights):
                found = drawing.draw_batch(torch_runner(as_run), pictures)
            scores.append(float(np.mean((np.stack(found).astype(np.float64) - np.stack(expected)) ** 2)))
            advance()
    return scores


def _next(scores: Sequence[float], best: int) -> float:
    """The least of the others."""
    return min(score for index, score in enumerate(scores) if index != best)
