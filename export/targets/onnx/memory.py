# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime takes of memory beside values: for the session, its nodes and its tensors, and for convolutions.

Measured in ONNX Runtime 1.31 on x86-64 as what a session of 3,000 nodes, or nodes and tensors, holds more than one of a
single node (`benchmarks/memory.py --terms`). Pages of its own code are not counted: they are the app's, and can be
dropped.
"""

import math

from ..layer import LayerUse

SESSION_BYTES = 1_300_000
"""Of a session with one node, after its first run."""
NODE_BYTES = 3_400
"""Of a node that has no name, which is what those between layers are."""
NAMED_NODE_BYTES = 4_300
"""Of a node that is named by a layer's module path, whether it stays or is folded when the graph is opened."""
INLINED_NODE_BYTES = 3_300
"""Of a node of a function's body, in the place of the node that called it."""
TENSOR_BYTES = 2_600
"""Of an initializer in the data file, beside its values."""
PAGE_BYTES = 4_096
"""Each mapped tensor begins and ends within a page."""
NODES_PER_OPERATOR = 0.5
"""Of PyTorch's operators, between layers: views of views become one node or none. Of the demo's four graphs 0.43 to
0.53."""
NODES_PER_NORM = 8
"""Of a GroupNorm, see `norm.py`."""
_SEGMENT_BYTES = 4 * 128 * 128


def unfolding_bytes(shape: tuple[int, ...], use: LayerUse) -> int:
    """Bytes of the pixels under the taps of a convolution [O, I, kh, kw], in float32: of all where there are more
    outputs than pixels, else of a part (`MlasConvPrepare`); none where there is one tap."""
    if len(shape) < 4 or math.prod(shape[2:]) == 1:
        return 0
    return 4 * math.prod(shape[1:]) * use.vectors if shape[0] > use.vectors else _SEGMENT_BYTES
