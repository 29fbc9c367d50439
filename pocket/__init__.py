# SPDX-License-Identifier: Apache-2.0
"""A small text-to-image model with SDXL's topology, trained from nothing on drawn scenes, and its judge."""
