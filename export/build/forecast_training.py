# SPDX-License-Identifier: Apache-2.0
"""What training candidates takes; see `forecast_stages`."""

from ...quant.formats import Additive, Codebook
from .forecast_stages import Asked, Stage


def train_candidates(asked: Asked) -> Stage:
    """Blocks stored as vectors of codebooks, one at a time: drawn once, run up to, and trained call by call."""
    options, seconds, memory, files = asked.candidates, [], 0.0, 0.0
    drawn = asked.rates.seconds(asked.picture) * options.pictures
    for component, block in asked.blocks:
        lengths = [asked.stored_as(layer) for layer in block.layers]
        vectors = [
            layer.weights / chosen.length
            for layer, chosen in zip(block.layers, lengths, strict=True)
            if isinstance(chosen, Codebook | Additive)
        ]
        if not vectors:
            continue
        calls = asked.calls[component.name] * options.pictures
        seconds.append(asked.rates.seconds(block.work * (2 * calls + 3 * options.iterations)))
        # Floats, decoded ones and their gradients; of each candidate its entry, logit, gradient and mean square.
        weights = sum(layer.weights for layer in block.layers)
        memory = max(memory, 16.0 * weights + 20.0 * options.count * sum(vectors) + 3 * block.made_bytes)
        files += calls * (block.output_bytes + block.input_bytes)
    return Stage((drawn + sum(seconds[:1]), *seconds[1:]), memory, files + asked.stored_bytes, asked.stored_bytes)
