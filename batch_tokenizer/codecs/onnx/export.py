"""Writes a MOSS checkpoint as a folder of ONNX graphs, each checked after it is written."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx
import torch

from batch_tokenizer import __version__
from batch_tokenizer.codecs.base import CodecInfo
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.moss.codec import load_model, open_spec
from batch_tokenizer.codecs.moss.codec import recognises as is_moss
from batch_tokenizer.codecs.moss.model import MossAudioTokenizer
from batch_tokenizer.codecs.onnx.builder import WeightFile
from batch_tokenizer.codecs.onnx.layouts import Role, our_metadata
from batch_tokenizer.codecs.onnx.moss_graphs import (
    PublishedLayout,
    decoder_graph,
    encoder_graph,
    published_decoder_graph,
    published_encoder_graph,
)
from batch_tokenizer.records import RunError

log = logging.getLogger(__name__)

#: Inputs and outputs of the graphs: our own, or those of published graphs, for programs that were written for them.
ExportLayout = Literal["ours", "community", "official"]

#: Bytes of weights above which they go to a file beside the graph. A graph's own file must stay below 2 GB.
EXTERNAL_ABOVE = 1 << 30


def export_moss(
    checkpoint: Checkpoint, folder: Path, *, layout: ExportLayout = "ours", external_above: int = EXTERNAL_ABOVE
) -> list[Path]:
    """Writes ``encoder.onnx``, ``decoder.onnx``, ``encoder_step.onnx`` and ``decoder_step.onnx`` in float32.

    Large weights go to ``encoder.onnx.data`` and ``decoder.onnx.data``, which a graph and its step graph share. The
    encoder is written before the decoder is loaded. In a published layout there are no step graphs, files are called as
    published, and ``config.json`` is put beside them, as those graphs do not state rates and sizes.

    Returns:
        the graphs' paths.

    Raises:
        RunError: the checkpoint is no MOSS checkpoint, is stereo, or is not what its ``config.json`` implies, or the
            folder cannot be written.
    """
    if not is_moss(checkpoint.config):
        kind = checkpoint.config.get("model_type", "absent")
        raise RunError(f"{checkpoint.folder}: only MOSS checkpoints are exported, this is none (model_type {kind})")
    info = open_spec(checkpoint).info
    if info.channels > 1:
        raise RunError(f"{checkpoint.folder}: only mono models are exported, this one has {info.channels} channels")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if layout == "ours":
            return list(_write(checkpoint, info, folder, external_above))
        return list(_write_published(checkpoint, folder, layout, external_above))
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be written: {error.strerror}", exit_code=1) from error


def _write(checkpoint: Checkpoint, info: CodecInfo, folder: Path, external_above: int) -> Iterator[Path]:
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
        weights = _weight_file(model, folder / f"{part}.onnx.data", external_above)
        build = encoder_graph if part == "encoder" else decoder_graph
        for role in roles:
            metadata = our_metadata(role, info=described, codes="(batch, codebooks, frames) int64")
            yield _save(build(model, metadata, weights, step=role.endswith("_step")), folder / f"{role}.onnx")
        del model


def _write_published(
    checkpoint: Checkpoint, folder: Path, layout: PublishedLayout, external_above: int
) -> Iterator[Path]:
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config), indent=2), encoding="utf-8")
    prefix = "audio_tokenizer_" if layout == "community" else ""
    for part, build in (("encoder", published_encoder_graph), ("decoder", published_decoder_graph)):
        model = load_model(checkpoint, parts=(part,), device=torch.device("cpu"))
        path = folder / f"{prefix}{part}.onnx"
        weights = _weight_file(model, path.with_name(f"{path.name}.data"), external_above)
        yield _save(build(model, layout, weights), path)
        del model


def _weight_file(model: MossAudioTokenizer, path: Path, external_above: int) -> WeightFile | None:
    """The file of the weights, if they are too large for the graph's own file."""
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    log.info("%s: %.1f MB of weights", path.stem, total / 1e6)
    if total > external_above:
        return WeightFile(path)
    path.unlink(missing_ok=True)
    return None


def _save(proto: onnx.ModelProto, path: Path) -> Path:
    onnx.save(proto, path)
    onnx.checker.check_model(path, full_check=True)
    log.info("%s: %d nodes", path, len(proto.graph.node))
    return path
