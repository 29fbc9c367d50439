# SPDX-License-Identifier: Apache-2.0
"""Kernels in C++ for weights that stay compressed while they run; `make kernels` builds them into `lib`."""
