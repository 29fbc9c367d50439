# SPDX-License-Identifier: Apache-2.0
"""Which operators of a program become one delegate of XNNPACK."""

from typing import Any

from ....runtimes.executorch.imported import executorch_module


def partitioner() -> Any:
    """XNNPACK's partitioner, but each convolution that rounds its input is a delegate of its own.

    XNNPACK moves the channels of such an input not where it is rounded but where the delegate's chain of first
    arguments begins (`ChannelsLastTaggedReshapePass` of ExecuTorch 1.5.1). With a transformer block before the
    convolution in its delegate these are rows of features, which have no channels to move, and lowering fails; with
    other operators before it their values change layout after their other arguments were laid out.
    """
    canonical = executorch_module("exir.backend.canonical_partitioners.pattern_op_partitioner")
    xnnpack = executorch_module("backends.xnnpack.partition.xnnpack_partitioner")

    class Partitioner(xnnpack.XnnpackPartitioner):  # type: ignore[misc,name-defined]
        def generate_partitions(self, ep: Any) -> list[Any]:
            groups = [group for group in self.get_matched_nodes_from_configs(ep) if not _sums_vectors(group)]
            alone = [group for group in groups if _rounds_for_convolution(group)]
            rest = [group for group in groups if not _rounds_for_convolution(group)]
            found = list(canonical.generate_grouped_partitions_from_list_of_nodes(ep.graph_module, rest))
            first = 1 + max((each.id for each in found), default=-1)
            return found + [
                xnnpack.Partition(id=first + index, nodes=dict.fromkeys(group)) for index, group in enumerate(alone)
            ]

    return Partitioner()


def _rounds_for_convolution(group: list[Any]) -> bool:
    targets = [str(node.target) for node in group]
    return any("convolution" in target for target in targets) and any("choose_qparams" in target for target in targets)


def _sums_vectors(group: list[Any]) -> bool:
    """Whether it makes a weight of a codebook's vectors: a delegate more for each layer, where an addition does."""
    return len(group) == 1 and _is_of_vectors(group[0])


def _is_of_vectors(node: Any) -> bool:
    target = str(node.target)
    return "embedding" in target or (
        ("add.Tensor" in target or "view_copy" in target) and any(map(_is_of_vectors, node.all_input_nodes))
    )
