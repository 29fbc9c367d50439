# SPDX-License-Identifier: Apache-2.0
"""Which format fits which kind of layer on this target: the `STORES` table."""

from collections.abc import Mapping

from ....ground.errors import TurbopocketError
from ....quant.formats import Additive, Affine, Codebook, Dense, LayerFormat, Palette
from .affine import AffineForm, DenseForm
from .form import Deployment, Form, Kind, Layer
from .lut import AdditiveForm, CodebookForm, PaletteForm

STORES: Mapping[type[LayerFormat], type[Form]] = {
    Dense: DenseForm,
    Affine: AffineForm,
    Palette: PaletteForm,
    Codebook: CodebookForm,
    Additive: AdditiveForm,
}
"""What this target stores natively, of Linear and Conv2d alike. A format that is not here has no compressed form."""

DEPLOYMENT: Deployment = "iOS18"
"""The first system with groups of scales, 4-bit integers and vectors in lookup tables."""


def storable(
    format: LayerFormat, kind: Kind, shape: tuple[int, ...], deployment: Deployment = DEPLOYMENT
) -> str | None:
    """None when this target keeps a layer of this kind and shape compressed in that format, else the reason."""
    form = STORES.get(type(format))
    if form is None:
        return f"Core ML has no compressed {kind} for {format}"
    return format.fits(shape) or form.refusal(format, shape, deployment)


def form_of(layer: Layer, format: LayerFormat, deployment: Deployment) -> Form:
    """The layer's form in that format. Raises TurbopocketError with `storable`'s reason when there is none."""
    reason = storable(format, layer.kind, layer.shape, deployment)
    if reason is not None:
        raise TurbopocketError(f"{layer.name}: {reason}")
    return STORES[type(format)](layer, format, deployment)
