"""Graphs of the published layouts, made from our own: their inputs and outputs renamed, reshaped and wrapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


def wrap(
    graph: Path,
    *,
    inputs: list[tuple[str, int, list[Any]]],
    before: list[onnx.NodeProto],
    after: list[onnx.NodeProto],
    outputs: list[tuple[str, int, list[Any]]],
    renamed: tuple[str, ...] = (),
    constants: dict[str, Any] | None = None,
) -> onnx.ModelProto:
    """Our graph between other inputs and outputs, without metadata.

    Args:
        before: nodes that compute our inputs from these ones.
        after: nodes that compute these outputs from ours.
        renamed: outputs of ours that nodes of ``after`` know as ``our_NAME``.
        constants: int64 values that the nodes use.
    """
    model = onnx.load(graph)
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name in renamed:
                node.output[index] = f"our_{name}"
    nodes = [*before, *model.graph.node, *after]
    weights = [*model.graph.initializer]
    weights += [
        numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in (constants or {}).items()
    ]
    made = helper.make_graph(
        nodes,
        "published",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        weights,
    )
    wrapped = helper.make_model(made, opset_imports=model.opset_import, ir_version=8, producer_name="pytorch")
    onnx.checker.check_model(wrapped, full_check=True)
    return wrapped


def _node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], **attributes)


def _waves() -> list[onnx.NodeProto]:
    """``input_values`` (B, 1, S) to ``audio`` and ``lengths``."""
    return [
        _node("Squeeze", ["input_values", "one"], "audio"),
        _node("Shape", ["audio"], "samples", start=1, end=2),
        _node("Shape", ["audio"], "batch_size", start=0, end=1),
        _node("Expand", ["samples", "batch_size"], "lengths"),
    ]


def _codes() -> list[onnx.NodeProto]:
    """``chosen`` int64 (K, B, T) to ``codes`` and ``code_lengths``."""
    return [
        _node("Transpose", ["chosen"], "codes", perm=[1, 0, 2]),
        _node("Shape", ["codes"], "frames", start=2, end=3),
        _node("Shape", ["codes"], "batch_size", start=0, end=1),
        _node("Expand", ["frames", "batch_size"], "code_lengths"),
    ]


def write_community(
    ours: Path,
    folder: Path,
    *,
    books: int,
    config: dict[str, Any] | None,
    codes_dims: tuple[Any, ...] = ("a", "b", "c"),
) -> Path:
    """``audio_tokenizer_{encoder,decoder}.onnx``: all codebooks, codes int32 to the decoder."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = wrap(
        ours / "encoder.onnx",
        inputs=[("input_values", FLOAT, ["batch", 1, "samples"])],
        before=[*_waves(), _node("Identity", ["books"], "num_quantizers")],
        after=[
            _node("Transpose", ["codes"], "audio_codes", perm=[1, 0, 2]),
            _node("Identity", ["code_lengths"], "audio_codes_lengths"),
            _node("Cast", ["codes"], "encoder_hidden_states", to=FLOAT),
        ],
        outputs=[
            ("audio_codes", INT64, [books, "batch", "frames"]),
            ("audio_codes_lengths", INT64, ["batch"]),
            ("encoder_hidden_states", FLOAT, ["batch", books, "frames"]),
        ],
        constants={"one": [1], "books": books},
    )
    decoder = wrap(
        ours / "decoder.onnx",
        inputs=[("audio_codes", INT32, list(codes_dims))],
        before=[_node("Cast", ["audio_codes"], "chosen", to=INT64), *_codes()],
        after=[_node("Identity", ["our_audio"], "audio")],
        outputs=[("audio", FLOAT, ["channels", "length"])],
        renamed=("audio",),
    )
    onnx.save(encoder, folder / "audio_tokenizer_encoder.onnx")
    onnx.save(decoder, folder / "audio_tokenizer_decoder.onnx")
    return _configured(folder, config)


def write_official(ours: Path, folder: Path, *, books: int, frame: int, config: dict[str, Any] | None) -> Path:
    """``{encoder,decoder}.onnx`` with ``n_quantizers`` and external weights; lengths leave a partial frame out."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = wrap(
        ours / "encoder.onnx",
        inputs=[("input_values", FLOAT, [1, 1, "samples"]), ("n_quantizers", INT64, [])],
        before=[*_waves(), _node("Identity", ["n_quantizers"], "num_quantizers")],
        after=[
            _node("Transpose", ["codes"], "audio_codes", perm=[1, 0, 2]),
            _node("Div", ["lengths", "frame"], "audio_codes_lengths"),
        ],
        outputs=[("audio_codes", INT64, ["n", 1, "frames"]), ("audio_codes_lengths", INT64, [1])],
        constants={"one": [1], "frame": frame},
    )
    decoder = wrap(
        ours / "decoder.onnx",
        inputs=[("audio_codes", INT64, [books, 1, "frames"]), ("n_quantizers", INT64, [])],
        before=[
            _node("Reshape", ["n_quantizers", "one"], "count"),
            _node("Slice", ["audio_codes", "zero", "count", "zero"], "chosen"),
            *_codes(),
        ],
        after=[
            _node("Unsqueeze", ["our_audio", "one"], "audio"),
            _node("Identity", ["our_lengths"], "audio_lengths"),
        ],
        outputs=[("audio", FLOAT, [1, 1, "length"]), ("audio_lengths", INT64, [1])],
        renamed=("audio", "lengths"),
        constants={"one": [1], "zero": [0]},
    )
    for name, model in (("encoder", encoder), ("decoder", decoder)):
        onnx.save(
            model, folder / f"{name}.onnx", save_as_external_data=True, location=f"{name}.data", size_threshold=256
        )
    return _configured(folder, config)


def write_nano(ours: Path, folder: Path, *, books: int) -> Path:
    """``{encode,decode_full}.onnx`` with codebooks last and lengths as inputs, and the description beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = wrap(
        ours / "encoder.onnx",
        inputs=[("waveform", FLOAT, [1, 1, "samples"]), ("input_lengths", INT32, [1])],
        before=[
            _node("Squeeze", ["waveform", "one"], "audio"),
            _node("Cast", ["input_lengths"], "lengths", to=INT64),
            _node("Identity", ["books"], "num_quantizers"),
        ],
        after=[
            _node("Transpose", ["codes"], "audio_codes", perm=[0, 2, 1]),
            _node("Identity", ["code_lengths"], "audio_code_lengths"),
        ],
        outputs=[("audio_codes", INT64, [1, "frames", books]), ("audio_code_lengths", INT64, [1])],
        constants={"one": [1], "books": books},
    )
    decoder = wrap(
        ours / "decoder.onnx",
        inputs=[("audio_codes", INT32, [1, "frames", books]), ("audio_code_lengths", INT32, [1])],
        before=[
            _node("Cast", ["audio_codes"], "wide", to=INT64),
            _node("Transpose", ["wide"], "codes", perm=[0, 2, 1]),
            _node("Cast", ["audio_code_lengths"], "code_lengths", to=INT64),
        ],
        after=[
            _node("Unsqueeze", ["our_audio", "one"], "audio"),
            _node("Identity", ["our_lengths"], "audio_lengths"),
        ],
        outputs=[("audio", FLOAT, [1, 1, "length"]), ("audio_lengths", INT64, [1])],
        renamed=("audio", "lengths"),
        constants={"one": [1]},
    )
    onnx.save(encoder, folder / "encode.onnx")
    onnx.save(decoder, folder / "decode_full.onnx")
    told = {"sample_rate": 8000, "channels": 1, "num_quantizers": books, "codebook_size": 32}
    (folder / "codec_browser_onnx_meta.json").write_text(json.dumps({"codec_config": told}))
    return folder


def generate_output_names(source: Path, folder: Path) -> Path:
    """A copy whose outputs are called as an exporter calls values: ``view_1``, ``view_2`` …"""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".onnx":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        model = onnx.load(path, load_external_data=False)
        renamed = {output.name: f"view_{number}" for number, output in enumerate(model.graph.output)}
        for output in model.graph.output:
            output.name = renamed[output.name]
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = renamed.get(name, name)
        onnx.save(model, folder / path.name)
    return folder


def _configured(folder: Path, config: dict[str, Any] | None) -> Path:
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
