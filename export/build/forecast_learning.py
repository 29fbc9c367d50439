# SPDX-License-Identifier: Apache-2.0
"""What it takes to learn a denoiser's rounding: iterations of each block, forwards and back, on batches of calls."""

from ...quant.options import ReconstructOptions
from ...quant.reconstruct import KEPT_BYTES
from .forecast_stages import Asked, Stage
from .forecast_work import BlockWork, Work

FORWARDS = 4
"""Of a block in an iteration: as it is rounded, and back, where weights and inputs both get gradients."""
WEIGHT_NUMBERS = 8
"""For each weight: it, its two neighbours, V with its gradient and both of Adam's means, and the soft weight."""
WEIGHT_BYTES = 160.0
"""That an iteration moves for each weight: h(V), what undecided weights cost, both back, and Adam."""


def reconstruct(asked: Asked, options: ReconstructOptions) -> Stage:
    """The denoiser's calls while calibration pictures are drawn, then each of its blocks by itself."""
    (denoiser,) = (each for each in asked.components.values() if each.role == "denoiser")
    drawing = asked.rates.seconds(asked.picture) * asked.pictures
    blocks = list(denoiser.blocks.values())
    seconds = [asked.rates.seconds(_work(block, options)) for block in blocks]
    seconds[0] += drawing
    memory = max(_bytes(block, options) for block in blocks) + 2 * KEPT_BYTES
    files = sum(block.input_bytes for block in blocks) * asked.runs(denoiser) + asked.stored_bytes
    return Stage(tuple(seconds), max(memory, asked.drawing_bytes), files, asked.stored_bytes)


def _work(block: BlockWork, options: ReconstructOptions) -> Work:
    weights = sum(layer.weights for layer in block.layers)
    iteration = block.work * (FORWARDS * options.batch) + Work(bytes=WEIGHT_BYTES * weights, operators=100.0)
    return iteration * options.iterations


def _bytes(block: BlockWork, options: ReconstructOptions) -> float:
    weights = sum(layer.weights for layer in block.layers)
    return 4.0 * WEIGHT_NUMBERS * weights + 2.0 * options.batch * block.made_bytes
