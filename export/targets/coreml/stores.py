# SPDX-License-Identifier: Apache-2.0
"""Which format fits which kind of layer on this target."""

from ....quant.formats import Additive, Affine, Codebook, Dense, Palette
from ..layer import Stores
from .affine import AffineForm, DenseForm
from .form import Form
from .lut import AdditiveForm, CodebookForm, PaletteForm

_FORMS: dict[type, type[Form]] = {
    Dense: DenseForm,
    Affine: AffineForm,
    Palette: PaletteForm,
    Codebook: CodebookForm,
    Additive: AdditiveForm,
}
STORES: Stores[Form] = Stores(
    "Core ML",
    {
        **{(each, "linear"): form for each, form in _FORMS.items()},
        **{(each, "conv2d"): form for each, form in _FORMS.items()},
    },
)
"""A constant is decoded alike for Linear and Conv2d."""
