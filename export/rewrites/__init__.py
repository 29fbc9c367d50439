# SPDX-License-Identifier: Apache-2.0
"""Changes of a PyTorch module before any target sees it: a new one is a file here and its entry in `REWRITES`."""
