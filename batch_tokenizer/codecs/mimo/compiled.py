"""Transformer layers of MiMo under ``torch.compile``; no other module imports torch's compiler, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, _dynamo, _inductor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import InductorError

from batch_tokenizer.codecs.layers.packed import Rotation
from batch_tokenizer.codecs.mimo.layers import CompilationFailed, TransformerLayer, TransformerStack
from batch_tokenizer.kernels.segments import Segments, filler_runs
from batch_tokenizer.records import first_line


class CompiledLayers:
    """Runs the layers of one stack under ``torch.compile``, all but their attention.

    Only packs of ``rows`` rows run compiled. Any other number of rows, such as the axis of a recording that is longer
    than a pack, would be compiled anew: the layers then run as they are.

    Attributes:
        rows: rows of the stack's axis in a full pack.
    """

    def __init__(self, rows: int, backend: str = "inductor") -> None:
        """``backend`` as ``torch.compile`` knows it."""
        self.rows = rows
        self._before: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.compile(
            TransformerLayer.before, dynamic=False, fullgraph=True, backend=backend
        )
        self._after: Callable[..., Tensor] = torch.compile(
            TransformerLayer.after, dynamic=False, fullgraph=True, backend=backend
        )

    def __call__(
        self, layer: TransformerLayer, x: Tensor, rotate: Rotation, segments: Segments, backend: str
    ) -> Tensor:
        """The output of ``layer`` for x (N, width), as ``TransformerLayer.forward``.

        Raises:
            CompilationFailed: the first pack of ``rows`` rows cannot be compiled.
            torch.OutOfMemoryError: there is no memory for the compiled layers to work in.
        """
        if len(x) != self.rows:
            out: Tensor = layer(x, rotate, segments, backend)
            return out
        try:
            attended = layer.self_attn.attend(*self._before(layer, x, rotate), segments, backend)
            return self._after(layer, x, attended)
        except (TorchDynamoException, InductorError, FailOnRecompileLimitHit) as error:
            # The compiler wraps what its own trial runs raise; a lack of memory is not a fault of the compilation.
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                cause = cause.__cause__ or cause.__context__
            raise CompilationFailed(first_line(error)) from error


def compile_stacks(stacks: Sequence[tuple[TransformerStack, int]]) -> None:
    """Compiles the layers of each stack for packs of its number of rows.

    Raises:
        CompilationFailed: one of them cannot be compiled here; all layers then run as they are.
    """
    if _dynamo.config.disable:
        raise CompilationFailed("TORCHDYNAMO_DISABLE is set")
    # One entry for each stack and capacity, and a few more where torch compiles for another global state.
    _dynamo.config.recompile_limit = 64
    _inductor.config.compile_threads = 1  # the few kernels need no pool of processes in every rank
    if hasattr(_inductor.config, "deterministic"):
        _inductor.config.deterministic = True  # kernels are chosen by rule and not by timing
    try:
        for stack, rows in stacks:
            compile_stack(stack, rows)
    except CompilationFailed:
        for stack, _ in stacks:
            stack.run_layer = TransformerLayer.__call__
        raise


def compile_stack(stack: TransformerStack, rows: int, backend: str = "inductor") -> None:
    """Compiles a stack's layers for packs of ``rows`` rows, before it returns, so that bits do not change in a run.

    Raises:
        CompilationFailed: they cannot be compiled here; the layers then run as they are.
    """
    first = stack[0]
    assert isinstance(first, TransformerLayer)
    weight = first.fc1.weight
    stack.run_layer = CompiledLayers(rows, backend)
    try:
        with torch.inference_mode():
            stack(weight.new_zeros(rows, weight.shape[1]), Segments(filler_runs(rows), weight.device))
    except CompilationFailed:
        stack.run_layer = TransformerLayer.__call__
        raise
