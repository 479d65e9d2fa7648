"""``PackedCodec``: the shared codec class of models that run on packed rows."""

from __future__ import annotations

from typing import Any

from batch_tokenizer.codecs.base import Codec, CodecSpec
from batch_tokenizer.codecs.execution import BatchRunner


class PackedCodec(Codec):
    """A model whose utterances are packed on one axis on CUDA, and computed one by one on a CPU.

    Args:
        model: has a ``device``, and a ``capacity``, which on CUDA is the ``frame_budget``.
        threads: as in ``BatchRunner``.
        frame_budget: token frames computed at once.
    """

    def __init__(self, spec: CodecSpec, model: Any, threads: int, frame_budget: int) -> None:
        self.spec = spec
        self.model = model
        self.frame_budget = frame_budget
        self._run = BatchRunner(model.device, threads)
        self.batch_limit = self._run.batch_limit

    @property
    def frame_budget(self) -> int:
        """Token frames computed at once; on CUDA the axis of a pack."""
        return self._frame_budget

    @frame_budget.setter
    def frame_budget(self, frames: int) -> None:
        self._frame_budget = max(1, frames)
        if self.model.device.type == "cuda":
            self.model.capacity = self._frame_budget
            self.on_capacity_change()

    def on_capacity_change(self) -> None:
        """Called when packs have another size."""
