# SPDX-License-Identifier: Apache-2.0
"""Makes text-to-image diffusion models run on phones: plan, build, check, draw, and distil to few steps.

    recipe = turbopocket.load_recipe("demo")
    built = turbopocket.build(recipe, "build/demo")
    picture = turbopocket.Artifact.open(built.folder).generate("a large red circle on a white background")

The names in `__all__` are what users may count on; the command line is a shell over them. Each is imported when it is
first asked for, so that drawing from an artifact needs no PyTorch and `import turbopocket` next to nothing.

TurbopocketError
├── OverBudget: nothing that the recipe allows fits its budget
└── ParityFailed: what was built does not compute what PyTorch computes
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if __name__ == "api":  # `import api` from the repository's root would make a second copy of it
    raise ImportError("import turbopocket, not api")

if sys.platform == "win32":  # locks, signals and memory limits are those of POSIX
    raise ImportError("turbopocket needs Linux or macOS, this system is Windows; the Linux subsystem (WSL) will do")

if TYPE_CHECKING:
    from .export.artifact import Artifact
    from .export.build.build import build
    from .export.build.outcome import Built
    from .export.build.targets import build_targets
    from .export.check import Checked, check
    from .export.checkpoint.load import load
    from .export.distill.distill import Distilled, distill
    from .export.distill.recipe import DistillRecipe, load_distill_recipe
    from .export.families.base import LoadedModel
    from .export.plan import Planned, plan
    from .export.progress import StageProgress
    from .export.recipe import Recipe, load_recipe
    from .ground.errors import OverBudget, ParityFailed, TurbopocketError
    from .quant.workers import Workers

__all__ = [
    "Artifact",
    "Built",
    "Checked",
    "DistillRecipe",
    "Distilled",
    "LoadedModel",
    "OverBudget",
    "ParityFailed",
    "Planned",
    "Recipe",
    "StageProgress",
    "TurbopocketError",
    "Workers",
    "build",
    "build_targets",
    "check",
    "distill",
    "load",
    "load_distill_recipe",
    "load_recipe",
    "plan",
]

_MODULES = {
    "Artifact": "export.artifact",
    "Built": "export.build.outcome",
    "Checked": "export.check",
    "DistillRecipe": "export.distill.recipe",
    "Distilled": "export.distill.distill",
    "LoadedModel": "export.families.base",
    "OverBudget": "ground.errors",
    "ParityFailed": "ground.errors",
    "Planned": "export.plan",
    "Recipe": "export.recipe",
    "StageProgress": "export.progress",
    "TurbopocketError": "ground.errors",
    "Workers": "quant.workers",
    "build": "export.build.build",
    "build_targets": "export.build.targets",
    "check": "export.check",
    "distill": "export.distill.distill",
    "load": "export.checkpoint.load",
    "load_distill_recipe": "export.distill.recipe",
    "load_recipe": "export.recipe",
    "plan": "export.plan",
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
