"""Writes a MOSS checkpoint as a folder of ONNX graphs, each checked after it is written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch

from batch_tokenizer import __version__
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.moss.codec import load_model, open_spec
from batch_tokenizer.codecs.moss.codec import recognises as is_moss
from batch_tokenizer.codecs.onnx.builder import WeightFile
from batch_tokenizer.codecs.onnx.layouts import Role, our_metadata
from batch_tokenizer.codecs.onnx.moss_graphs import decoder_graph, encoder_graph
from batch_tokenizer.records import RunError

log = logging.getLogger(__name__)

#: Bytes of weights above which they go to a file beside the graph. A graph's own file must stay below 2 GB.
EXTERNAL_ABOVE = 1 << 30


def export_moss(checkpoint: Checkpoint, folder: Path, *, external_above: int = EXTERNAL_ABOVE) -> list[Path]:
    """Writes ``encoder.onnx``, ``decoder.onnx``, ``encoder_step.onnx`` and ``decoder_step.onnx`` in float32.

    Large weights go to ``encoder.onnx.data`` and ``decoder.onnx.data``, which a graph and its step graph share. The
    encoder is written before the decoder is loaded.

    Returns:
        the graphs' paths.

    Raises:
        RunError: the checkpoint is no MOSS checkpoint or is not what its ``config.json`` implies, or the folder cannot
            be written.
    """
    if not is_moss(checkpoint.config):
        kind = checkpoint.config.get("model_type", "absent")
        raise RunError(f"{checkpoint.folder}: only MOSS checkpoints are exported, this is none (model_type {kind})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return list(_write(checkpoint, folder, external_above))
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be written: {error.strerror}", exit_code=1) from error


def _write(checkpoint: Checkpoint, folder: Path, external_above: int) -> Iterator[Path]:
    info = open_spec(checkpoint).info
    if info.channels > 1:
        raise RunError(
            f"{checkpoint.folder}: only mono checkpoints are exported, this one has {info.channels} channels"
        )
    described = {
        "name": info.name,
        "sample_rate": info.sample_rate,
        "samples_per_frame": info.samples_per_frame,
        "num_codebooks": info.num_codebooks,
        "codebook_sizes": info.codebook_sizes,
        "fingerprint": info.fingerprint,
        "version": __version__,
    }
    parts: tuple[tuple[str, tuple[Role, Role]], ...] = (
        ("encoder", ("encoder", "encoder_step")),
        ("decoder", ("decoder", "decoder_step")),
    )
    for part, roles in parts:
        model = load_model(checkpoint, parts=(part,), device=torch.device("cpu"))
        total = sum(tensor.nbytes for tensor in model.state_dict().values())
        weights = WeightFile(folder / f"{part}.onnx.data") if total > external_above else None
        if weights is None:
            (folder / f"{part}.onnx.data").unlink(missing_ok=True)
        build = encoder_graph if part == "encoder" else decoder_graph
        for role in roles:
            metadata = our_metadata(role, info=described, codes="(batch, codebooks, frames) int64")
            proto = build(model, metadata, weights, step=role.endswith("_step"))
            path = folder / f"{role}.onnx"
            onnx.save(proto, path)
            onnx.checker.check_model(path, full_check=True)
            log.info("%s: %d nodes, %.1f MB of weights", path, len(proto.graph.node), total / 1e6)
            yield path
        del model
