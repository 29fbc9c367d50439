# SPDX-License-Identifier: Apache-2.0
"""Core ML packages without Core ML: read, checked and run on any computer, bit by bit what the file says."""
