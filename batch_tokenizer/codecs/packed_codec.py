"""``PackedCodec``: the shared codec class of models that run on packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from batch_tokenizer.codecs.base import Codec, CodecSpec
from batch_tokenizer.codecs.execution import BatchRunner
from batch_tokenizer.codecs.layers.packed import CPU_SHARED_FRAMES

Result = TypeVar("Result")


class PackedCodec(Codec):
    """A model whose utterances are packed on one axis on CUDA. On a CPU they are computed one by one, but for short
    ones where the model packs these there too (``packs_of``).

    Args:
        model: has a ``device``, and a ``capacity``, which on CUDA is the ``frame_budget``.
        threads: as in ``BatchRunner``.
        frame_budget: token frames computed at once.
    """

    def __init__(self, spec: CodecSpec, model: Any, threads: int, frame_budget: int) -> None:
        self.spec = spec
        self.model = model
        self.frame_budget = frame_budget
        self._runner = BatchRunner(model.device, threads)
        self.batch_limit = self._runner.batch_limit

    def run_model(
        self, compute: Callable[[list[Tensor]], list[Result]], batch: Sequence[Tensor], *, axis: int, frame: int = 0
    ) -> list[Result]:
        """``compute``'s result for each member, in order, as ``BatchRunner``.

        Args:
            axis: of a member's tensor, that of time.
            frame: positions on it for each token frame, about, where short utterances share packs on a CPU.
        """
        return self._runner(compute, batch, lambda part: part.shape[axis], shared=CPU_SHARED_FRAMES * frame)

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
