"""MiMo's layers under ``torch.compile``, for axes of one fixed length. Importing it takes seconds.

Compiled are the two halves of a layer, before and after its attention: norms, rotation, GELU and residuals become part
of few kernels instead of a dozen passes over memory. Attention stays a call of its own, as its kernels are not to be
improved on, and what varies from pack to pack (where utterances begin and end) goes to it alone. All layers of a stack
share what is compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from batch_tokenizer.codecs.mimo.layers import Rotation, TransformerLayer
from batch_tokenizer.kernels.segments import Segments

log = logging.getLogger(__name__)


class CompiledLayers:
    """Runs layers compiled. Where compiling fails they run as they are from then on, and the log says why.

    Attributes:
        failed: why they do, or None.
    """

    def __init__(self, backend: str = "inductor") -> None:
        """``backend`` as ``torch.compile`` knows it."""
        self._before: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.compile(
            TransformerLayer.before, dynamic=False, fullgraph=True, backend=backend
        )
        self._after: Callable[..., Tensor] = torch.compile(
            TransformerLayer.after, dynamic=False, fullgraph=True, backend=backend
        )
        self.failed: str | None = None

    def __call__(
        self, layer: TransformerLayer, x: Tensor, rotate: Rotation, segments: Segments, backend: str
    ) -> Tensor:
        """As ``TransformerLayer.forward``."""
        if self.failed is None:
            try:
                attended = layer.self_attn.attend(*self._before(layer, x, rotate), segments, backend)
                return self._after(layer, x, attended)
            except (TorchDynamoException, InductorError) as error:
                self.failed = (str(error).strip().splitlines() or [type(error).__name__])[0]
                log.warning("layers run without torch.compile, which failed here: %s", self.failed)
        out: Tensor = layer(x, rotate, segments, backend)
        return out
