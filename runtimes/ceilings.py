# SPDX-License-Identifier: Apache-2.0
"""How much of anything a manifest may ask for: far above what is published, far below what fills a machine's memory."""

MOST_CHANNELS = 256
"""Of latents: published models have 4 to 16."""
MOST_LETTERS = 1_000_000
"""Of the text that a token stands for: a token has at most 10,000 vectors, each with a name."""
MOST_VALUES = 2**29
"""Of one tensor: 2 GiB in float32, more than any that goes into or comes out of a component for the largest picture."""
