# SPDX-License-Identifier: Apache-2.0
"""What it takes to measure losses: pictures that are drawn for it, then passes back through the model, row by row."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ...quant.layers import KEPT_BYTES as WEIGHT_BYTES
from ...quant.row_losses import KEPT_BYTES, VECTORS, WORTH_SECONDS
from .forecast_stages import Asked, Stage
from .forecast_work import BlockWork, ComponentWork, Work, total
from .probe import LATENT_SIDE

BACKWARD = Work(flops=1.2, conv_flops=1.2, bytes=2.0, operators=0.5)
"""What one vector takes back through a block, in runs of it: gradients of inputs alone, attention again, no Python."""
SLOWER = 3.0
"""Than foreseen a machine may be when it decides whether measuring is worth workers."""
WORKER_BYTES = 550e6
"""Of a process that measures, before it runs anything: 503 MB with the modules of `pocket-turbo`, which has few."""


@dataclass(frozen=True)
class _Rows:
    """Rows of one output: how often each component is called for one, and the share of a call's work that it takes."""

    count: int
    components: Sequence[ComponentWork]
    calls: Mapping[str, float]
    share: float
    measured: Collection[str]

    @property
    def kept_bytes(self) -> float:
        """Between blocks, for one row."""
        return self.share * sum(
            self.calls[each.name] * sum(block.output_bytes for block in each.blocks.values())
            for each in self.components
        )

    @property
    def at_once(self) -> int:
        return int(max(1, min(self.count, KEPT_BYTES // max(1.0, self.kept_bytes))))

    def seconds(self, asked: Asked) -> float:
        """Of one row."""
        return asked.rates.seconds(total([self._work(asked, each) * self.calls[each.name] for each in self.components]))

    @property
    def memory(self) -> float:
        """Of as many rows as are measured at once."""
        blocks = [block for each in self.components for block in each.blocks.values()]
        gradients = max(_gradient_bytes(block, self.share * self.at_once) for block in blocks)
        return self.kept_bytes * self.at_once + gradients

    def _work(self, asked: Asked, component: ComponentWork) -> Work:
        forward, share, at_once = component.work, self.share, self.at_once
        back = Work(
            BACKWARD.flops * forward.flops,
            BACKWARD.conv_flops * forward.conv_flops,
            BACKWARD.bytes * forward.bytes,
            BACKWARD.operators * forward.operators / at_once,
        )
        work = (forward * 2 + back * VECTORS) * share
        for layer in component.layers:
            tried = len(asked.formats[layer.name]) if layer.name in self.measured else 0
            if tried > 1:
                once = Work(bytes=32.0 * tried * layer.weights, operators=40.0 * tried) * (1 / at_once)
                moved = share * tried * 4.0 * layer.outputs * (2 * VECTORS + 4)
                work = work + once + Work(flops=share * tried * layer.flops, bytes=moved, operators=6.0 * tried)
            work = work + Work(bytes=18.0 * layer.weights / at_once)
        return work


def probe(asked: Asked) -> Stage:
    """The pictures at some steps of which gains are measured."""
    return Stage((asked.rates.seconds(asked.picture),) * asked.probe_prompts, asked.drawing_bytes)


def walk(asked: Asked) -> Stage:
    """The pictures whose content is measured, each drawn twice."""
    return Stage((2 * asked.rates.seconds(asked.picture),) * asked.probe_prompts, asked.drawing_bytes)


def measure(asked: Asked) -> Stage:
    """Gains of all candidates, a row after the other: pictures where content is judged, the denoiser with its text
    encoders, then the halves of the VAE. Workers share them where that is worth it; each has in memory what this
    process would have, what it imports, and the weights that it keeps in float32."""
    groups = _groups(asked)
    steps = [each.seconds(asked) for each in groups for _ in range(each.count)]
    memory = max(each.memory for each in groups)
    if asked.workers == 1 or SLOWER * sum(steps) < WORTH_SECONDS:
        return Stage(tuple(steps), memory)
    weights = min(WEIGHT_BYTES, 4 * sum(each.weights for each in asked.components.values()))
    others = sum(each.others_bytes for each in asked.components.values())
    here = max(each.kept_bytes for each in groups)
    each = WORKER_BYTES + weights + memory
    return Stage(tuple(step / asked.workers for step in steps), here + asked.workers * each, others)


def _groups(asked: Asked) -> list[_Rows]:
    components = list(asked.components.values())
    cropped = min(1.0, LATENT_SIDE**2 / asked.latent_positions)
    together = [each for each in components if each.role in ("text encoder", "denoiser")]
    steps, once = min(asked.steps, asked.probe_steps), {each.name: 1.0 for each in components}
    layers = asked.layers
    found = [_Rows(asked.probe_prompts * steps, together, once, 1.0, layers)]
    for each in components:
        if each.role in ("decoder", "encoder"):
            found.append(_Rows(asked.probe_prompts, [each], once, cropped, layers))
    if asked.content:
        drawing = [each for each in components if each.role != "encoder"]
        found.insert(0, _Rows(asked.probe_prompts, drawing, asked.calls, 1.0, asked.content))
    return found


def _gradient_bytes(block: BlockWork, rows: float) -> float:
    """Of a block whose gradients are taken: what its operators made, its weights, gradients of all vectors in what its
    layers give and in what goes in; and a layer's weight beside its error."""
    gradients = VECTORS * (4 * sum(layer.outputs for layer in block.layers) + block.input_bytes + block.output_bytes)
    weights = [4 * layer.weights for layer in block.layers]
    return rows * (block.made_bytes + gradients) + sum(weights) + 3 * max(weights, default=0)
