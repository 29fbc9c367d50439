# SPDX-License-Identifier: Apache-2.0
"""Commands on recipes."""

from typing import Annotated

import typer

from .door import emit
from .options import DISTILL_RECIPES, RECIPE_HELP, AsJson, Assigned

recipe_app = typer.Typer(no_args_is_help=True, help="Recipes: what a build asks for.")


@recipe_app.command("show")
def recipe_show(
    name: Annotated[str | None, typer.Argument(help=f"{RECIPE_HELP} Of `distill`: {DISTILL_RECIPES}.")] = None,
    assigned: Assigned = None,
    of_distill: Annotated[bool, typer.Option("--distill", help="A recipe of `distill`, not of `build`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prints a recipe with every default filled in."""
    from .export.settings import Section, with_values

    shown: Section
    if of_distill:
        from . import DistillRecipe, load_distill_recipe

        shown = load_distill_recipe(name) if name else DistillRecipe()
    else:
        from . import Recipe, load_recipe

        shown = load_recipe(name) if name else Recipe()
    shown = with_values(shown, {}, assigned or ())
    unset = shown.keys_without_value()
    also = f"# without a value unless one is given: {', '.join(unset)}\n" if unset else ""
    emit(shown.model_dump(mode="json"), as_json, lambda _: print(shown.to_toml() + also, end=""))
