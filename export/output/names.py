# SPDX-License-Identifier: Apache-2.0
"""What the files are called that a build leaves beside its artifact."""

CHOICES_FILE = "choices.json"
RANGES_FILE = "ranges.json"
RECIPE_FILE = "recipe.toml"
WEIGHTS_FILE = "weights.safetensors"
