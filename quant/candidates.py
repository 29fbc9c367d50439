# SPDX-License-Identifier: Apache-2.0
"""Each vector of a weight as a mixture of a few codebook entries, of which training leaves one.

Deng et al. 2024, "VQ4DiT: Efficient Post-Training Vector Quantization for Diffusion Transformers" (arXiv 2408.17131),
section 3.2: n candidates for each vector, the entries nearest to it, mixed by ratios that are the softmax of logits.

G groups that share a codebook, N vectors of a group, n candidates, P entries of a codebook, D length of a vector, O
outputs, K columns of the matrix view.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from .finetune import Trained
from .fit.grids import VectorCodes
from .formats import CompressedTensor
from .formats.base import from_matrix_view, matrix_view
from .options import Schedule, Start

FROZEN_RATIO = 0.99
"""From here on a vector has one candidate, in the schedule `freeze`."""
_DISTANCES = 2**24
"""Distances that are held at once while candidates are looked for."""
_LEAST_DISTANCE = 1e-5


def has_candidates(stored: CompressedTensor) -> bool:
    """Whether a stored weight is made of vectors of a codebook, one or a sum."""
    return bool(stored.format.vector_codes(stored))


class SoftWeight:
    """A weight whose vectors are mixtures of candidates, until `harden`; codes of a sum have candidates each."""

    def __init__(self, weight: Tensor, stored: CompressedTensor, count: int, start: Start) -> None:
        """From the float weight, and codes for it that are the first candidates."""
        self.stored = stored
        codes = stored.format.vector_codes(stored)
        self.scale = Trained(codes[0].scale_O)
        self.trains_codebook = not stored.format.shared_parts  # those stay equal in all layers
        scale_O1 = codes[0].scale_O.float().unsqueeze(1)
        values = [each.grid.rows_of(each.codes_RC, each.codebook_GPD) for each in codes]
        left_OK = matrix_view(weight.detach().float()) - scale_O1 * torch.stack(values).sum(0)
        self.planes = [
            _Plane(left_OK + scale_O1 * own_OK, each, count, start) for own_OK, each in zip(values, codes, strict=True)
        ]

    @property
    def logits(self) -> list[nn.Parameter]:
        """Of all codes that have more than one candidate."""
        return [plane.logits for plane in self.planes if plane.logits is not None]

    @property
    def values(self) -> list[nn.Parameter]:
        """Of codebooks and the scale, as far as they are the layer's own."""
        own = [plane.codebook.parameter for plane in self.planes] if self.trains_codebook else []
        return [*own, self.scale.parameter]

    @property
    def is_hard(self) -> bool:
        """Whether each vector has one candidate."""
        return not self.logits

    def __call__(self) -> Tensor:
        """The weight in its own shape, float32, as a function of what is trained."""
        rows_OK = torch.stack([plane() for plane in self.planes]).sum(0)
        return from_matrix_view(rows_OK * self.scale().unsqueeze(1), self.stored.shape)

    def indecision(self, schedule: Schedule) -> Tensor:
        """How far ratios are from 0 and 1, averaged: 1 - |2R - 1| (the paper's L_r), or R (1 - R) n as released."""
        ratios = torch.cat([plane.ratios().flatten() for plane in self.planes if plane.logits is not None])
        if schedule == "joint":
            return (1 - (2 * ratios - 1).abs()).mean()
        return (ratios * (1 - ratios)).mean() * self.planes[0].count

    def freeze(self) -> float:
        """Ratios above `FROZEN_RATIO` become 1 for good; returns the share of vectors of which that holds."""
        frozen = [plane.freeze() for plane in self.planes if plane.logits is not None]
        return float(torch.cat(frozen).float().mean()) if frozen else 1.0

    @torch.no_grad()
    def harden(self) -> None:
        """Each vector keeps the candidate of the largest ratio."""
        for plane in self.planes:
            plane.harden()

    @torch.no_grad()
    def compressed(self) -> CompressedTensor:
        """As it is stored, codebooks and scale in fp16; where training left the range of fp16 it stays what it was."""
        scale_O = _as_fp16(self.scale(), self.planes[0].codes.scale_O)
        codes = [replace(plane.stored(self.trains_codebook), scale_O=scale_O) for plane in self.planes]
        return self.stored.format.with_vector_codes(self.stored, codes)


class _Plane:
    """One codebook's vectors: what each is a mixture of, and how much of each candidate is in it."""

    def __init__(self, target_OK: Tensor, codes: VectorCodes, count: int, start: Start) -> None:
        grid = codes.grid
        self.codes, self.count = codes, min(count, 2**grid.bits)
        self.codebook = Trained(codes.codebook_GPD)
        scale_OK = codes.scale_O.float().unsqueeze(1).expand_as(target_OK)
        points_GND, scales_GND = grid.vectors(target_OK), grid.vectors(scale_OK)
        codes_GN = codes.codes_RC.reshape(len(points_GND), -1)
        groups = zip(points_GND, scales_GND, codes.codebook_GPD.float(), codes_GN, strict=True)
        found = [_nearest(*group, self.count) for group in groups]
        # Candidates lead: a softmax over few neighbouring numbers takes ten times as long.
        self.candidates_nGN = torch.stack([each.T for each, _ in found], 1)
        distances_nGN = torch.stack([each.T for _, each in found], 1)
        self.frozen_GN = torch.zeros(self.candidates_nGN.shape[1:], dtype=torch.bool)
        self.logits: nn.Parameter | None = None
        if self.count > 1:
            farthest_1GN = distances_nGN.amax(0, keepdim=True).clamp(min=_LEAST_DISTANCE)
            by_distance = torch.log(farthest_1GN / (distances_nGN + _LEAST_DISTANCE))
            self.logits = nn.Parameter(by_distance if start == "distance" else torch.zeros_like(distances_nGN))

    def ratios(self) -> Tensor:
        """[n, G, N], of which each vector's add up to 1."""
        assert self.logits is not None
        soft = softmax(self.logits, 0)
        if not self.frozen_GN.any():
            return soft
        chosen = torch.arange(self.count).reshape(-1, 1, 1) == self.logits.detach().argmax(0)
        return torch.where(self.frozen_GN, chosen.to(soft.dtype), soft)

    def __call__(self) -> Tensor:
        """[O, K], not yet scaled."""
        entries = self._entries()
        flat = self.codebook().flatten(0, 1)
        if self.logits is None:
            vectors = flat.index_select(0, entries[0])
        else:
            vectors = _Mixture.apply(flat, self.ratios().flatten(1), entries)
        return self.codes.grid.placed(vectors, *self.codes.codes_RC.shape)

    def _entries(self) -> Tensor:
        """int64 [n, G * N] among the entries of all codebooks."""
        first_G1 = self.codes.codebook_GPD.shape[1] * torch.arange(self.candidates_nGN.shape[1]).unsqueeze(1)
        return (self.candidates_nGN + first_G1).flatten(1)

    def freeze(self) -> Tensor:
        self.frozen_GN |= self.ratios().detach().amax(0) > FROZEN_RATIO
        return self.frozen_GN

    def harden(self) -> None:
        if self.logits is not None:
            best_1GN = self.logits.argmax(0, keepdim=True)
            self.candidates_nGN = self.candidates_nGN.gather(0, best_1GN)
            self.logits = None

    def stored(self, trains_codebook: bool) -> VectorCodes:
        assert self.logits is None
        codes_RC = self.candidates_nGN.reshape(self.codes.codes_RC.shape).to(torch.uint8)
        before = self.codes.codebook_GPD
        return replace(
            self.codes,
            codes_RC=codes_RC,
            codebook_GPD=_as_fp16(self.codebook(), before) if trains_codebook else before,
        )


class _Mixture(torch.autograd.Function):
    """[N, D] from entries [P, D] in ratios [n, N]; `embedding_bag` and its gradients take four times as long."""

    @staticmethod
    def forward(ctx: Any, codebook_PD: Tensor, ratios_nN: Tensor, entries_nN: Tensor) -> Tensor:
        ctx.save_for_backward(codebook_PD, ratios_nN, entries_nN)
        parts = zip(entries_nN, ratios_nN.unsqueeze(-1), strict=True)
        return sum((codebook_PD.index_select(0, entries) * ratios for entries, ratios in parts), torch.tensor(0.0))

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        codebook_PD, ratios_nN, entries_nN = ctx.saved_tensors
        of_ratios = [(codebook_PD.index_select(0, entries) * gradient_ND).sum(1) for entries in entries_nN]
        of_codebook_DP = codebook_PD.new_zeros(codebook_PD.T.shape)
        gradient_DN = gradient_ND.T.contiguous()
        for entries, ratios in zip(entries_nN, ratios_nN, strict=True):
            for sums, gradient in zip(of_codebook_DP, gradient_DN, strict=True):
                sums.scatter_add_(0, entries, gradient * ratios)
        return of_codebook_DP.T, torch.stack(of_ratios), None


def _as_fp16(values: Tensor, before: Tensor) -> Tensor:
    rounded = values.to(torch.float16)
    return torch.where(torch.isfinite(rounded), rounded, before)


def _nearest(
    points_ND: Tensor, scales_ND: Tensor, codebook_PD: Tensor, codes_N: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Candidates, int64 [N, n], and their distances [N, n] to the points: the code that is stored, then the nearest
    others, nearest first. A point is compared with its scale times an entry."""
    parts = []
    for points, scales, codes in zip(*_in_chunks(len(codebook_PD), points_ND, scales_ND, codes_N), strict=True):
        # Σ (x - s c)² = Σ x² - 2 Σ s x c + Σ s² c²
        square = scales.square() @ codebook_PD.square().T - 2 * (scales * points) @ codebook_PD.T
        distance = (square + points.square().sum(1, keepdim=True)).clamp_(min=0).sqrt_()
        stored_N1 = codes.to(torch.int64).unsqueeze(1)
        others = distance.scatter(1, stored_N1, torch.inf).topk(count - 1, largest=False).indices
        chosen = torch.cat([stored_N1, others], 1)
        parts.append((chosen, distance.gather(1, chosen)))
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([distance for _, distance in parts])


def _in_chunks(entries: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for each in tensors:
        yield each.split(max(1, _DISTANCES // entries))
