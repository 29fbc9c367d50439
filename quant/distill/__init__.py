# SPDX-License-Identifier: Apache-2.0
"""Distillation to a few steps: what is trained against what. Knows tensors and denoisers, no model family."""
