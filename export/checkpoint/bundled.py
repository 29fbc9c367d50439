# SPDX-License-Identifier: Apache-2.0
"""The models that come with the package."""

from importlib import resources
from pathlib import Path

from ... import pocket

_FOLDER = Path(str(resources.files(pocket)))
BUNDLED = {
    "pocket-turbo": _FOLDER / "turbo_weights",
    "pocket": _FOLDER / "weights",
    "pocket-dit": _FOLDER / "dit_weights",
}
"""The few-step student, which is the default model, its teacher, and a diffusion transformer."""
