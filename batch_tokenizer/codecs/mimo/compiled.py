"""Transformer layers of MiMo under ``torch.compile``; no other module imports torch's compiler, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import InductorError

from batch_tokenizer.codecs.layers.packed import Rotation
from batch_tokenizer.codecs.mimo.layers import CompilationFailed, TransformerLayer
from batch_tokenizer.kernels.segments import Segments
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
