"""The arithmetic of a plan: rows of the inputs in, rows of the output out. Knows no threads and writes no file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resafe.engine.layout import Placed
from resafe.engine.plan import Plan
from resafe.engine.sources import read_rows, rows_of
from resafe.engine.spans import ON_DEVICE, PIECE, SUMMARISED, Span


class Computer:
    """Computes spans of a plan.

    Args:
        plan: The plan.
        totals: Totals of the method's first pass over the model.
    """

    def __init__(self, plan: Plan, totals: dict[str, Any]) -> None:
        self.plan, self.totals = plan, totals
        self._traits, self._device = plan.method.traits, plan.device
        self._whole_weights = self._traits["inputs"] == "weights" or not plan.needs_base
        self._part = plan.fusion.part
        self._by_tensor = plan.fusion.rounds("tensor") > 0
        self.undivided = self._by_tensor or self._part == "tensor"

    def deltas(self, piece: Span) -> tuple[Tensor | None, list[Tensor]]:
        """The base's rows (None where they are not needed) and what the method takes of every model, float32."""
        name, start, stop = piece.tensor.name, piece.start, piece.stop
        base = self.plan.base_source.weight(name, start, stop) if self.plan.needs_base else None
        if base is None or self._whole_weights:
            found = [model.source.weight(name, start, stop) for model in self.plan.models]
        else:
            found = [model.source.delta(name, start, stop, base) for model in self.plan.models]
        return None if base is None else base.to(self._device), [part.to(self._device) for part in found]

    def pieces(self, span: Span) -> Iterator[Span]:
        """The parts of a span that are computed at once."""
        whole = self.undivided and span.tensor.fused and self._part == "tensor"
        return iter([span]) if whole else span.pieces(PIECE if self._device.type == "cpu" else ON_DEVICE)

    def statistics(self, span: Span) -> dict[str, Any]:
        """Totals for the tensor of an undivided span: the model's, or its own where the method takes them by tensor."""
        if not self._by_tensor:
            return self.totals
        return self.plan.fusion.gather(lambda: (self.deltas(piece)[1] for piece in span.pieces(SUMMARISED)))

    def summarise(self, span: Span, round_: int) -> Tensor | None:
        """The summary of a span in a round of the first pass over the model; None for tensors that no model changes."""
        if not span.tensor.fused:
            return None
        found = None
        for piece in span.pieces(SUMMARISED):
            summary = self.plan.fusion.summarise(self.deltas(piece)[1], round_, self.totals)
            found = summary if found is None else found + summary
        return None if found is None else found.cpu()

    def fuse(self, piece: Span, statistics: dict[str, Any]) -> Tensor:
        """The output's rows of a piece, float32."""
        base, deltas = self.deltas(piece)
        tensor = piece.tensor
        if not any(model.source.changes(tensor.name) for model in self.plan.models):
            assert base is not None
            return base  # only its dtype changes
        weights = [model.coefficients.at(tensor.name) for model in self.plan.models]
        _, width = rows_of(tensor.shape)
        if self._part == "tensor":
            deltas = [delta.reshape(tensor.shape) for delta in deltas]
        fused = self.plan.fusion.combine(tensor.name, deltas, statistics, weights, piece.start * width, tensor.shape)
        fused = fused.reshape(piece.stop - piece.start, width)
        value = fused if base is None or self._whole_weights else fused.add_(base)
        if self.plan.extended is not None and base is not None:
            self.plan.extended.extension.keep_new(tensor.name, piece.start, piece.stop, value, base)
        return value

    def output(self, piece: Span, statistics: dict[str, Any]) -> tuple[Tensor, float, int, int]:
        """The output's rows in their stored dtype, and of them Σ x², the number of NaN and of infinite values."""
        tensor = piece.tensor
        if not tensor.fused:
            return self._copied(tensor, piece), 0.0, 0, 0
        value = self.fuse(piece, statistics)
        stored = value.to(tensor.dtype).cpu()
        squares = float(torch.dot(value.reshape(-1), value.reshape(-1)))
        if squares == squares and squares != float("inf"):
            # finite in float32; what overflows only in a narrower dtype is seen there
            narrow = tensor.dtype == torch.float16 and bool(torch.isinf(stored).any())
            if not narrow:
                return stored, squares, 0, 0
        return stored, squares, int(torch.isnan(stored).sum()), int(torch.isinf(stored).sum())

    def _copied(self, tensor: Placed, piece: Span) -> Tensor:
        info = self.plan.base.tensors[tensor.name]
        if tensor.name in self.plan.base.unpickled:
            return (
                self.plan.base.read(tensor.name).reshape(rows_of(tensor.shape))[piece.start : piece.stop].contiguous()
            )
        return read_rows(self.plan.files, info, piece.start, piece.stop)
