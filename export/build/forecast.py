# SPDX-License-Identifier: Apache-2.0
"""What a build will take of this machine, before it starts: memory, disk and hours by stage, from configs alone."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...ground.errors import TurbopocketError
from ...ground.memory import anonymous_bytes, machine_bytes
from ...quant.fit import RECONSTRUCT, parse_fit
from ...quant.formats import LayerFormat
from ...quant.layers import KEPT_BYTES
from ...quant.split import content_of
from ...quant.workers import Workers
from ...runtimes.image_size import ImageSize
from ..checkpoint.load import load_shapes, require_built
from ..families.base import LoadedModel
from ..families.graphs import Component
from ..families.sizes import drawn_sizes, latent_size
from ..progress import StageProgress, clock_text
from ..recipe import Recipe
from ..sampling.spec import sampler_spec, with_sampling
from ..targets.base import Target
from ..targets.registry import open_target
from ..units import format_bytes
from . import forecast_measuring as measuring
from . import forecast_runtimes as runtimes
from . import forecast_stages as stages
from .candidates import candidate_schemes
from .forecast_learning import reconstruct
from .forecast_rates import measured_rates
from .forecast_stages import Asked, Stage
from .forecast_training import train_candidates
from .forecast_work import ComponentWork, component_work
from .probe import PROBE_PROMPTS, PROBE_STEPS
from .rewriting import shaped

# Measured on two x86 cores with PyTorch 2.13; `benchmarks/forecast.py` measures forecasts beside builds.
IMPORTS_BYTES = 110e6
"""Of what a build imports after it was foreseen: exporters, diffusers' pipelines, runtimes."""
GRAPH_BYTES = 11e3
"""Of a traced graph, for each operator of the model."""
VOCABULARY_BYTES = 600
"""Of a tokenizer in memory, for each id."""
OFF = 1.25
"""What a forecast may be off by: no more than what is over by as much is refused unasked."""
RETAINED = 0.4
"""Of what drawing holds at most, the share that the C library keeps afterwards."""


@dataclass(frozen=True)
class StageForecast:
    """One stage: the most bytes of anonymous memory while it runs, in all processes and with all that was there before;
    the most bytes of the build's files on disk, those of stages before it among them; and seconds of each step."""

    name: str
    memory_bytes: int
    scratch_bytes: int
    step_seconds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return sum(self.step_seconds)


@dataclass(frozen=True)
class Forecast:
    """A build's stages in order, from nothing, on this machine; `workers` processes share layers and rows."""

    stages: tuple[StageForecast, ...]
    workers: int

    @property
    def memory_bytes(self) -> int:
        """The most of all stages."""
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def scratch_bytes(self) -> int:
        """The most that is on disk at once."""
        return max(stage.scratch_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def expected(self) -> dict[str, tuple[float, ...]]:
        """Seconds of each step by stage, as progress wants to be told."""
        return {stage.name: stage.step_seconds for stage in self.stages}

    def summary(self) -> dict[str, Any]:
        """Returns the forecast as JSON values."""
        by_stage = {
            stage.name: {
                "memory_bytes": stage.memory_bytes,
                "scratch_bytes": stage.scratch_bytes,
                "seconds": round(stage.seconds, 1),
            }
            for stage in self.stages
        }
        return {
            "workers": self.workers,
            "memory_bytes": self.memory_bytes,
            "scratch_bytes": self.scratch_bytes,
            "seconds": round(self.seconds, 1),
            "stages": by_stage,
        }

    def lines(self) -> list[str]:
        """Returns the forecast for a person, a line for each stage and one for all."""
        shown = [(each.name, each.memory_bytes, each.scratch_bytes, each.seconds) for each in self.stages]
        shown.append(("build", self.memory_bytes, self.scratch_bytes, self.seconds))
        return [
            f"{name:<21} {format_bytes(memory):>10} memory {format_bytes(scratch):>10} disk  {clock_text(seconds):>8}"
            for name, memory, scratch, seconds in shown
        ]


def forecast(
    recipe: Recipe, model: LoadedModel, target: Target, works: Mapping[str, ComponentWork], workers: int = 1
) -> Forecast:
    """Foresees a build from a model without weights (`load_shapes`), a recipe that says how it is drawn, and what calls
    of its components take (`drawing_works`).

    Memory and disk are counted from shapes, on top of what this process holds now. Seconds are counts of operations
    over what this machine does in a fraction of a second, of a machine that does nothing else.
    """
    held = anonymous_bytes()  # the model without weights, too, which is as many objects as the one that is loaded
    asked = _asked(recipe, model, target, works, workers)
    return _together(asked, _resident(asked, model, held))


def drawing_works(recipe: Recipe, model: LoadedModel, target: Target) -> dict[str, ComponentWork]:
    """What one call of each component takes for the largest picture, counted on a model without weights."""
    sizes = drawn_sizes(model, recipe.image.image_sizes)
    components = shaped(target.components(model, sizes, recipe.sampler.image_to_image), recipe, model)
    return works_of(model, components, largest_of(sizes))


def _asked(
    recipe: Recipe, model: LoadedModel, target: Target, works: Mapping[str, ComponentWork], workers: int
) -> Asked:
    sizes = drawn_sizes(model, recipe.image.image_sizes)
    largest = largest_of(sizes)
    latents = latent_size(model, largest)
    sampler = sampler_spec(model, recipe.sampler)
    told = model.denoiser.config.get("time_cond_proj_dim") is not None  # the guidance, in the place of asking twice
    twice = 2 if sampler.guidance_scale > 1 and not told else 1
    shapes = {layer.name: layer.shape for each in works.values() for layer in each.layers}
    schemes = candidate_schemes(target, shapes, recipe.compress.formats, recipe.compress.pin)
    formats: Mapping[str, Sequence[LayerFormat]] = {
        name: list(dict.fromkeys(each.weight for each in own)) for name, own in schemes.items()
    }
    return Asked(
        components=dict(works),
        calls={name: _calls(each, len(sampler.timesteps), twice) for name, each in works.items()},
        pixels=largest.height * largest.width,
        latent_positions=latents.height * latents.width,
        steps=len(sampler.timesteps),
        sizes=len(sizes),
        pictures=recipe.calibrate.pictures,
        decoded_pixels=recipe.calibrate.decoded_pixels,
        parity_pictures=max(recipe.parity.pictures, len(sizes)),
        probe_prompts=PROBE_PROMPTS,
        probe_steps=PROBE_STEPS,
        runtimes=len(target.runtime_names),
        formats=formats,
        content=content_of(list(shapes), recipe.compress.content),
        budget_bytes=_budget_bytes(recipe, sum(each.weights for each in works.values())),
        fit=parse_fit(recipe.compress.fit),
        sequential=recipe.compress.sequential,
        candidates=recipe.candidates,
        learning=recipe.reconstruct if recipe.compress.fit == RECONSTRUCT.name else None,
        tuning=recipe.finetune,
        rates=measured_rates(torch.get_num_threads()),
        workers=workers,
    )


def largest_of(sizes: Sequence[ImageSize]) -> ImageSize:
    """The size of most pixels."""
    return max(sizes, key=lambda size: size.height * size.width)


def works_of(model: LoadedModel, components: Sequence[Component], size: ImageSize) -> dict[str, ComponentWork]:
    """What one call of each component takes for a picture of that size, by its name."""
    latents = latent_size(model, size)
    sides = {"height": size.height, "width": size.width}
    sides |= {"latent_height": latents.height, "latent_width": latents.width}
    return {each.name: component_work(each, sides) for each in components}


def _budget_bytes(recipe: Recipe, weights: int) -> int | None:
    """What is allowed for so many weights, in bytes or in bits for each."""
    bits = recipe.compress.average_bits
    return recipe.compress.budget_bytes if bits is None else round(bits * weights / 8)


def _calls(component: ComponentWork, steps: int, twice: int) -> int:
    """Of a component, for one picture."""
    return {"text encoder": twice, "denoiser": steps * twice}.get(component.role, 1)


def _resident(asked: Asked, model: LoadedModel, held: int) -> dict[str, float]:
    """Bytes that a build holds beside what its stages do, from which stage on."""
    operators = sum(each.work.operators for each in asked.components.values())
    ids = sum(getattr(model.modules[name].config, "vocab_size", 0) for name in model.tokenizers)
    return {
        "load": held + sum(each.others_bytes for each in asked.components.values()) + VOCABULARY_BYTES * ids,
        "trace": IMPORTS_BYTES + GRAPH_BYTES * operators,
        "reference": min(KEPT_BYTES, 4 * sum(each.weights for each in asked.components.values())),
        "calibrate": RETAINED * asked.drawing_bytes,
    }


def _together(asked: Asked, resident: Mapping[str, float]) -> Forecast:
    found: dict[str, Stage] = {
        "load": Stage((asked.rates.seconds(stages.loading(asked)),)),
        "trace": stages.trace(asked),
        "reference": stages.reference(asked),
        "calibrate": stages.calibrate(asked),
        "try formats": stages.try_formats(asked),
        "probe": measuring.probe(asked),
        **({"walk": measuring.walk(asked)} if asked.content else {}),
        "measure": measuring.measure(asked),
        **({"trace for fine-tuning": stages.trace(asked)} if asked.moves_vectors else {}),
        "compress": stages.compress(asked),
        **({} if asked.learning is None else {"reconstruct": reconstruct(asked, asked.learning)}),
        **({"candidates": train_candidates(asked)} if asked.candidates.count else {}),
        **({"fine-tune": stages.fine_tune(asked)} if asked.tuning.iterations else {}),
        **({"trace again": stages.trace(asked)} if asked.moves_vectors else {}),
        "lower": stages.lower(asked),
        "compare": runtimes.compare(asked),
        "self-check": runtimes.self_check(asked),
        "memory": runtimes.memory(asked),
    }
    held, left, made = 0.0, 0.0, []
    for name, stage in found.items():
        held += resident.get(name, 0.0)
        made.append(StageForecast(name, round(held + stage.memory), round(left + stage.files), stage.seconds))
        left += stage.left
    return Forecast(tuple(made), asked.workers)


def foresee(
    recipe: Recipe, model: LoadedModel, works: Mapping[str, ComponentWork], workers: int, folder: Path
) -> Forecast:
    """The forecast of a build whose files go beside and into `folder`; fewer workers where more do not fit in memory.

    Raises TurbopocketError, with the numbers of each stage, for a build that the recipe's `max_ram` or the free disk
    can not hold.
    """
    target = open_target(recipe.target)
    allowed = recipe.machine.max_ram_bytes
    foreseen = forecast(recipe, model, target, works, workers)
    while allowed is not None and foreseen.memory_bytes > allowed and foreseen.workers > 1:
        foreseen = forecast(recipe, model, target, works, foreseen.workers // 2)
    if allowed is not None:
        require_memory(foreseen, allowed, "max_ram allows")
    require_memory(foreseen, machine_bytes(), "this machine has", OFF)
    require_disk(foreseen, folder)
    return foreseen


def require_memory(foreseen: Forecast, allowed: int, who: str, off: float = 1.0) -> None:
    """Raises TurbopocketError for a build that takes more memory than `off` times so many bytes; `who` allows them."""
    over = [each for each in foreseen.stages if each.memory_bytes > off * allowed]
    if over:
        told = ", ".join(f"{each.name} {format_bytes(each.memory_bytes)}" for each in over)
        raise TurbopocketError(
            f"this build takes {format_bytes(foreseen.memory_bytes)} of memory, and {who} "
            f"{format_bytes(allowed)}: {told}",
            hint="the fits absmax and mse take no matrix of a layer's inputs; smaller pictures take less of all stages",
        )


def require_disk(foreseen: Forecast, folder: Path) -> None:
    """Raises TurbopocketError for a build whose files take more than is free where `folder` lies, or will lie."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    own = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free + own  # what a build of before left there is used, or removed
    if foreseen.scratch_bytes > free:
        most = max(foreseen.stages, key=lambda each: each.scratch_bytes)
        raise TurbopocketError(
            f"this build takes {format_bytes(foreseen.scratch_bytes)} of disk ({most.name}), and {there} has "
            f"{format_bytes(free)} free",
            hint="--run puts intermediate results on another disk; fewer pictures to calibrate take less",
        )


def tell(foreseen: Forecast, recipe: Recipe, workers: int, progress: StageProgress) -> None:
    """Says what is foreseen, and holds progress to it; `workers` were asked for."""
    for line in foreseen.lines():
        progress.remark(line)
    if foreseen.workers < workers:
        progress.remark(
            f"note: workers: {foreseen.workers}, not {workers}; more do not fit in {recipe.machine.max_ram}"
        )
    progress.expect(foreseen.expected)
    progress.hold_to(recipe.machine.max_ram_bytes)


def foreseen(
    recipe: Recipe, workers: Workers, folder: Path, progress: StageProgress
) -> tuple[Recipe, tuple[str, ...], Workers, dict[str, ComponentWork]]:
    """The recipe with its sampling in it, what of that was assumed, as many workers as memory has room for, and what a
    call of each component takes.

    From the configs, so that what nobody can tell is asked for, and what can not end refused, before gigabytes are
    fetched and read. Raises what `foresee` raises.
    """
    with progress.stage("forecast"):
        shapes = load_shapes(recipe.model.source, recipe.model.config)
        require_built(shapes)
        recipe, assumed = with_sampling(recipe, shapes)
        works = drawing_works(recipe, shapes, open_target(recipe.target))
        found = foresee(recipe, shapes, works, workers.count, folder)
    tell(found, recipe, workers.count, progress)
    return recipe, assumed, replace(workers, count=found.workers), works
