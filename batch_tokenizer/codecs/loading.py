"""``LoadRequest``: what a family's ``load_codec`` takes, and the steps of loading that families share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import nn

from batch_tokenizer.codecs.base import PARTS, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.kernels.attention import BackendUnavailable, choose_backend
from batch_tokenizer.records import RunError, Task

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")

Part = Literal["encoder", "decoder"]
Spec = TypeVar("Spec", bound=CodecSpec)
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class LoadRequest(Generic[Spec]):
    """A codec to load.

    Attributes:
        spec: of the checkpoint, with the run's settings.
        task: decides which parts are loaded.
        attention: backend of the attention kernel, as ``--attention`` names it.
        threads: processor cores of this process.
    """

    checkpoint: Checkpoint
    spec: Spec
    task: Task = "wav2token2wav"
    device: torch.device = _CPU
    dtype: torch.dtype = torch.float32
    attention: str = "auto"
    threads: int = 1

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that the task needs."""
        return PARTS[self.task]

    def load_folded(
        self,
        build: Callable[[Sequence[str]], Model],
        rename: Callable[[str], str | None],
        *,
        whole: Callable[[], Model] | None = None,
    ) -> tuple[Model, int]:
        """A model with the parts that the task needs, on the device, in float32, frozen, its ``fold`` called; and how
        many parameters the model has with all parts.

        Args:
            build: the model with some parts. ``fold()`` makes what its layers need of the published tensors: it
                multiplies weight norms out and prepares codebooks.
            rename: as ``Checkpoint.load`` takes it.
            whole: the model with all of the checkpoint's tensors, where that is not ``build`` with both parts.

        Raises:
            RunError: the checkpoint is not what its ``config.json`` implies.
        """
        with self.checkpoint.empty_weights():
            complete = build(PARTS["wav2token2wav"]) if whole is None else whole()
        model = load_parts(
            self.checkpoint, build, self.parts, complete, device=self.device, dtype=torch.float32, rename=rename
        )
        model.fold()  # type: ignore[operator]  # nn.Module's attributes are untyped
        return model, sum(parameter.numel() for parameter in complete.parameters())


def load_parts(
    checkpoint: Checkpoint,
    build: Callable[[Sequence[str]], Model],
    parts: Sequence[str],
    whole: Model | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rename: Callable[[str], str | None],
    strip: str = "",
) -> Model:
    """A frozen model with ``parts`` of a checkpoint's weights, which go to the device one by one.

    Args:
        build: the model with some parts.
        whole: the model with all of the checkpoint's tensors, without values; ``build`` of all parts where absent.
        rename, strip: as in ``Checkpoint.load``.

    Raises:
        RunError: the checkpoint is not what its ``config.json`` implies.
    """
    with checkpoint.empty_weights():
        complete = build(PARTS["wav2token2wav"]) if whole is None else whole
        model = build(parts)
    checkpoint.load(complete, model, device=device, dtype=dtype, strip=strip, rename=rename)
    return model.requires_grad_(False).eval()


def log_attention(head_sizes: Mapping[str, int], backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Logs which attention backend each stack of layers will run.

    Args:
        head_sizes: of the stacks, by their names.
        backend: as ``--attention`` names it.

    Raises:
        RunError: the one that ``--attention`` forces cannot run here.
    """
    chosen: dict[tuple[str, str], list[str]] = {}
    for stack, head_size in head_sizes.items():
        try:
            chosen.setdefault(choose_backend(backend, device, dtype, head_size), []).append(stack)
        except BackendUnavailable as error:
            raise RunError(f"--attention {backend}: {error} (in the {stack})") from error
    for (name, reason), stacks in chosen.items():
        log.info("attention of the %s: %s (%s)", ", ".join(stacks), name, reason)
