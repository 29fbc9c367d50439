# SPDX-License-Identifier: Apache-2.0
"""What each layer loses in each way to store and run it: of the model's quality, and of its pictures' content."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ...quant.calibrate import ranges_of
from ...quant.fit import Fit, measuring_fit, parse_fit
from ...quant.observe import LayerStats
from ...quant.plan import LayerChoices
from ...quant.row_losses import SHARED_FILE, SUMS_FILE, Question, RowwiseOutput, measure
from ...quant.sensitivity import candidates_to_files, load_choices, save_choices
from ...quant.split import content_of
from ..families.components import component_name
from ..output.names import CHOICES_FILE
from ..output.owned import remove_journal
from ..verify.gaps import Session
from .bench import Workbench
from .calibration import drawing_inputs, fitting_inputs
from .candidates import exempted, narrowed, with_schemes
from .content import SsimForm
from .journal import Journal
from .probe import PROBE_PROMPTS, PROBE_STEPS, make_probe
from .walk import make_walk

CONTENT_FILE = "content.json"
Choices = dict[str, LayerChoices]


def measured_choices(
    bench: Workbench, session: Session, stats: Mapping[str, LayerStats], journal: Journal
) -> tuple[Choices, Choices]:
    """Choices of every layer by shares of the denoiser's output or picture that are lost; and of those layers that a
    recipe calls content, by 1 - SSIM of the picture."""
    quality, content = _measured_losses(bench, session, stats, journal)
    asked = bench.recipe.compress
    choices = exempted(with_schemes(quality, bench.candidates), asked.exempt, asked.pin)
    return choices, narrowed(with_schemes(content, bench.candidates), choices)


def _measured_losses(
    bench: Workbench, session: Session, stats: Mapping[str, LayerStats], journal: Journal
) -> tuple[Choices, Choices]:
    """Both losses of each layer, by weight format and by rounding of activations."""
    prompts = bench.evidence.prompts("measure", PROBE_PROMPTS, bench.recipe.seed)
    fit = bench.fit(measuring_fit(parse_fit(bench.recipe.compress.fit)))
    inputs = {
        **fitting_inputs(bench, session, journal, fit),
        **drawing_inputs(session, prompts, list(bench.modules)),
        "steps": PROBE_STEPS,
        "candidates": {name: [str(each) for each in own] for name, own in bench.candidates.items()},
        "content": list(bench.recipe.compress.content),
    }

    def make(folder: Path) -> None:
        probing = replace(session, prompts=prompts).of_one_size()  # whose calls go in one batch
        kept = journal.store("compress", fitting_inputs(bench, session, journal, fit))
        quality, content = _measured(bench, probing, stats, fit, kept, folder)
        save_choices(folder / CHOICES_FILE, quality)
        save_choices(folder / CONTENT_FILE, content)
        for halves in (*folder.glob(SUMS_FILE.format("*")), folder / SHARED_FILE):
            halves.unlink(missing_ok=True)
        if fit.name != bench.recipe.compress.fit:  # else these are what is shipped
            remove_journal(journal.folder, kept)

    folder = journal.product("measure", inputs, make)
    return load_choices(folder / CHOICES_FILE), load_choices(folder / CONTENT_FILE)


def _measured(
    bench: Workbench, probing: Session, stats: Mapping[str, LayerStats], fit: Fit, kept: Path, folder: Path
) -> tuple[Choices, Choices]:
    """`kept` is for layers in their formats, `folder` for sums of losses, which a killed build goes on from."""
    with bench.progress.stage("try formats", len(bench.layers)) as advance:
        asked = bench.layers, stats, bench.formats, fit, kept
        stored = candidates_to_files(*asked, bench.spread, advance)
    with bench.progress.stage("probe", len(probing.prompts)) as advance:
        outputs = make_probe(probing, bench.components, PROBE_STEPS, advance).outputs()
    felt = [({name for name in bench.layers if component_name(name) in own}, output) for own, output in outputs]
    content = content_of(list(bench.layers), bench.recipe.compress.content)
    if content:  # first, since its rows take longest: workers are then done at one time
        felt.insert(0, (content, _pictures(bench, probing)))
    formats, roundings = bench.formats, bench.roundings(ranges_of(stats))
    questions = [
        Question(
            bench.layers,
            {name: formats[name] for name in bench.layers if name in names},
            stored,
            output,
            roundings,
            seed=bench.recipe.seed,
        )
        for names, output in felt
    ]
    with bench.progress.stage("measure", sum(each.output.rows for each in questions)) as advance:
        found = measure(questions, advance, bench.spread, folder)
    of_content = found.pop(0) if content else {}
    of_quality = {name: own for each in found for name, own in each.items()}
    return {name: of_quality[name] for name in bench.layers}, of_content


def _pictures(bench: Workbench, probing: Session) -> RowwiseOutput:
    """Whole pictures, of which the squared length of a change is what SSIM lacks."""
    with bench.progress.stage("walk", len(probing.prompts)) as advance:
        walk = make_walk(probing, bench.components, advance)
        with torch.no_grad():
            form = SsimForm(torch.cat([walk.pictures(slice(row, row + 1)) for row in range(len(probing.prompts))]))
    return walk.output(form, form.energy)
