# SPDX-License-Identifier: Apache-2.0
"""What a manifest says twice, held against each other: a phone reads one of the two, the loop here the other."""

import math

from ...ground.errors import TurbopocketError
from ..manifest import Manifest
from ..pipeline import SamplerTable, Sum
from ..runner import component_spec
from .table import sampler_table

RELATIVE, ABSOLUTE = 1e-6, 1e-7
"""What two machines' float32 logarithms and powers may differ by: eight units of the last place of a coefficient."""


def require_agreement(manifest: Manifest) -> None:
    """Returns when the sampler's table is the sampler's, and the graphs have the latents and pictures of `image`.

    Raises TurbopocketError naming the first number that is another, by step and column of the table, or by tensor.
    """
    if manifest.sampler_table is not None:
        _require_table(manifest, manifest.sampler_table)
    _require_shapes(manifest)


def _require_table(manifest: Manifest, table: SamplerTable) -> None:
    expected = _numbers(sampler_table(manifest.sampler, manifest.pipeline.encoder is not None))
    found = _numbers(table)
    for place in dict.fromkeys((*expected, *found)):
        ours, theirs = expected.get(place), found.get(place)
        if ours is None or theirs is None or not math.isclose(ours, theirs, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            raise TurbopocketError(
                f"{manifest.name}: sampler_table has {_shown(theirs)} for {place}, the manifest's sampler "
                f"{manifest.sampler.kind} in {manifest.sampler.steps} steps {_shown(ours)}",
                hint="the manifest was changed: build again",
            )


def _shown(number: float | None) -> str:
    return "nothing" if number is None else f"{number:.9g}"


def _numbers(table: SamplerTable) -> dict[str, float]:
    """Every number of the table by where it stands: `step 2: signal`, `step 2: next.output after 1 calls`, …"""
    found: dict[str, float] = {"init_scale": table.init_scale}
    if table.bound is not None:
        found["bound"] = table.bound
    for index, row in enumerate(table.rows):
        columns: dict[str, float] = {
            name: getattr(row, name) for name in ("timestep", "signal", "noise", "input_scale")
        } | _sum("estimate", row.estimate)
        for calls, step in enumerate(row.steps):
            after = f" after {calls} calls" if len(row.steps) > 1 else ""
            sums = _sum("next", step.next) | _sum("remember", step.remember)
            columns |= {f"{name}{after}": value for name, value in sums.items()}
        found |= {f"step {index}: {name}": value for name, value in columns.items()}
    return found


def _sum(name: str, terms: Sum | None) -> dict[str, float]:
    return {f"{name}.{operand}": value for operand, value in (terms or {}).items()}


def _require_shapes(manifest: Manifest) -> None:
    image, pipeline = manifest.image, manifest.pipeline
    latents = {1: image.latent_channels, 2: image.latent_height, 3: image.latent_width}
    picture = {1: 3, 2: image.height, 3: image.width}
    denoiser, decoder, encoder = pipeline.denoiser, pipeline.decoder, pipeline.encoder
    expected = [
        (denoiser.component, "input", denoiser.latents, latents),
        (decoder.component, "input", decoder.latents, latents),
        (decoder.component, "output", decoder.output, picture),
    ]
    if encoder is not None:
        expected.append((encoder.component, "input", encoder.picture, picture))
    for component, side, name, sizes in expected:
        spec = component_spec(manifest, component)
        tensors = spec.loop_inputs if side == "input" else spec.loop_outputs
        shape = next(each.shape for each in tensors if each.name == name)
        for at, size in sizes.items():
            found = shape[at] if at < len(shape) else None
            if found != size and not isinstance(found, str):  # a name is a dimension that may vary
                raise TurbopocketError(
                    f"{manifest.name}: {side} {name} of {component} is {shape}; by `image` dimension {at} has {size}"
                )
