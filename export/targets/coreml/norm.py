# SPDX-License-Identifier: Apache-2.0
"""GroupNorm for number types that end at 65504.

The square of a deviation above 255.9 is no fp16 number, and neither is the sum of a picture's worth of large values.
A normalised value does not change when its group is scaled, so each group is divided by its largest magnitude first:
no intermediate value, and no partial sum in whatever order a device adds, is then beyond fp16. It needs no fp32,
which would take the norm off the Neural Engine, and no calibration, whose range the next prompt may leave.
"""

import math
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder

from ....runtimes.coreml.file.dtypes import SMALLEST_NORMAL_FP16

SMALLEST_VARIANCE = SMALLEST_NORMAL_FP16
"""Relative to a group's largest value: deviations of 1/128 of it, or an outlier of 128 standard deviations. It also
keeps a constant group from dividing zero by zero."""


def scaled_group_norm(x: Any, groups: int, gamma: Any, beta: Any, epsilon: float, name: str) -> Any:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta of a MIL value [B, C, ...], per group of channels.

    With m = max |x| and y = x / m this is (y - mean y) / sqrt(variance of y + epsilon / m²). m is at least about
    sqrt(epsilon), which keeps epsilon / m² at most 2. Means are taken over the last axis first, so that no sum has
    more than 65504 terms of magnitude 1.
    """
    batch, channels, *spatial = (int(size) for size in x.shape)
    rows = math.prod((channels // groups, *spatial[:-1]))
    grouped = Builder.reshape(x=x, shape=[batch, groups, rows, spatial[-1]])
    root = math.sqrt(epsilon)
    largest = Builder.reduce_max(x=Builder.abs(x=grouped), axes=[2, 3], keep_dims=True)
    largest = Builder.maximum(x=largest, y=np.float32(2.0 ** round(math.log2(root))))
    within_one = Builder.real_div(x=grouped, y=largest)
    deviation = Builder.sub(x=within_one, y=_mean(within_one))
    scaled_epsilon = Builder.square(x=Builder.real_div(x=np.float32(root), y=largest))
    variance = Builder.add(x=_mean(Builder.square(x=deviation)), y=scaled_epsilon)
    variance = Builder.maximum(x=variance, y=np.float32(SMALLEST_VARIANCE))
    normal = Builder.mul(x=deviation, y=Builder.real_div(x=np.float32(1), y=Builder.sqrt(x=variance)))
    per_channel = [1, channels, *(1 for _ in spatial)]
    result = Builder.reshape(x=normal, shape=[batch, channels, *spatial])
    result = Builder.mul(x=result, y=np.reshape(gamma, per_channel))
    return Builder.add(x=result, y=np.reshape(beta, per_channel), name=name)


def _mean(x: Any) -> Any:
    by_row = Builder.reduce_mean(x=x, axes=[3], keep_dims=True)
    return Builder.reduce_mean(x=by_row, axes=[2], keep_dims=True)
