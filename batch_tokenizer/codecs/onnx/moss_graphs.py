"""MOSS as ONNX graphs over padded batches, for every batch size, length and number of codebooks.

A ``MossAudioTokenizer`` becomes four graphs:

    encoder       audio (B, S), lengths (B), num_quantizers ()                    → codes (B, K', T), code_lengths (B)
    decoder       codes (B, K', T), code_lengths (B)                              → audio (B, S), lengths (B)
    encoder_step  audio (B, S), frames_before (B), num_quantizers (), past_0 …    → codes (B, K', T), present_0 …
    decoder_step  codes (B, K', T), frames_before (B), past_0 …                   → audio (B, S), present_0 …

With the layout of a published graph (``layouts.py``), for programs that were written for these:

    community   input_values (B, 1, S)              → audio_codes (K, B, T), audio_codes_lengths (B),
                                                      encoder_hidden_states (B, d, T)
                audio_codes int32 (K', B, T)        → audio (B, S)
    official    input_values (1, 1, S), n_quantizers → audio_codes (K', 1, T), audio_codes_lengths (1)
                audio_codes (K', 1, T), n_quantizers → audio (1, 1, S), audio_lengths (1)

Audio and pasts are float32, all else int64. The model is causal, so what is beyond an utterance's length changes
nothing before it; outputs are zero there. A step continues utterances by equally many whole frames; its past is, for
each transformer stage, the rotated keys and the values of the last ``context`` - 1 rows, (layers, 2, B, context - 1,
heads, head size), zeros before the utterance's start. Attention is done in blocks of queries against the slice of keys
that their window reaches, so memory grows with the length and not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn

from batch_tokenizer.codecs.moss.config import TransformerStage
from batch_tokenizer.codecs.moss.layers import PatchDown, PatchUp, Transformer
from batch_tokenizer.codecs.moss.model import MossAudioTokenizer
from batch_tokenizer.codecs.moss.quantizer import Codebook, Projection
from batch_tokenizer.codecs.onnx.builder import GraphBuilder, WeightFile

PublishedLayout = Literal["community", "official"]

#: Queries that share one slice of keys.
BLOCK = 128


def encoder_graph(
    model: MossAudioTokenizer, metadata: Mapping[str, str], weights: WeightFile | None, *, step: bool
) -> onnx.ModelProto:
    """The encoder and quantizer; with ``step`` the graph that continues utterances."""
    assert model.encoder is not None
    builder = GraphBuilder("encoder_step" if step else "encoder", weights)
    audio = builder.input("audio", "float32", ("batch", "samples"))
    lengths = None if step else builder.input("lengths", "int64", ("batch",))
    before = builder.input("frames_before", "int64", ("batch",)) if step else None
    num_quantizers = builder.input("num_quantizers", "int64", ())
    stages = _Stages(builder, model.encoder, before)

    samples = builder.size(audio, 1)
    if lengths is not None:
        valid = builder.op("Less", builder.arange(samples), builder.unsqueeze(lengths, 1))
        audio = builder.op("Where", valid, audio, builder.number(0.0))
    frame_size = model.config.downsample_rate
    hidden = _hidden(builder, model, stages, audio)
    codes = _quantize(builder, model, hidden)
    used = builder.reshape(num_quantizers, 1)
    codes = builder.slice(codes, 1, builder.integers(0), used)
    if lengths is not None:
        frames = builder.ceil_div(lengths, frame_size)
        valid = builder.op("Less", builder.arange(builder.size(codes, 2)), builder.unsqueeze(frames, 1, 2))
        codes = builder.op("Where", valid, codes, builder.integer(0))
        builder.output("codes", codes, "int64", ("batch", "codebooks", "frames"))
        builder.output("code_lengths", frames, "int64", ("batch",))
    else:
        builder.output("codes", codes, "int64", ("batch", "codebooks", "frames"))
    stages.output_present()
    return builder.model(metadata)


def _hidden(builder: GraphBuilder, model: MossAudioTokenizer, stages: _Stages, audio: str) -> str:
    """Samples (B, S), zero-padded to whole frames, to (B, T, d) before quantization."""
    frame_size, samples = model.config.downsample_rate, builder.size(audio, 1)
    whole = builder.op("Mul", builder.ceil_div(samples, frame_size), builder.integer(frame_size))
    audio = builder.pad(audio, 2, 1, after=builder.op("Sub", whole, samples))
    return stages(builder.reshape(audio, 0, -1, 1), 1)


def published_encoder_graph(
    model: MossAudioTokenizer, layout: PublishedLayout, weights: WeightFile | None
) -> onnx.ModelProto:
    """The encoder and quantizer with the inputs and outputs of a published layout.

    Lengths count an utterance's last frame, which is zero-padded here, whether it is whole or not.
    """
    assert model.encoder is not None
    builder = GraphBuilder("encoder", weights)
    books = model.config.quantizer.num_quantizers
    batch: int | str = "batch" if layout == "community" else 1
    waves = builder.input("input_values", "float32", (batch, 1, "samples"))
    hidden = _hidden(
        builder, model, _Stages(builder, model.encoder, None), builder.op("Squeeze", waves, builder.integers(1))
    )
    codes = builder.op("Transpose", _quantize(builder, model, hidden), perm=[1, 0, 2])  # (K, B, T)
    if layout == "official":
        used = builder.reshape(builder.input("n_quantizers", "int64", ()), 1)
        codes = builder.slice(codes, 0, builder.integers(0), used)
    builder.output("audio_codes", codes, "int64", (books if layout == "community" else "codebooks", batch, "frames"))
    lengths = builder.op("Expand", builder.size(codes, 2), builder.size(codes, 1))
    builder.output("audio_codes_lengths", lengths, "int64", (batch,))
    if layout == "community":
        width = model.config.quantizer.input_dim
        builder.output(
            "encoder_hidden_states",
            builder.op("Transpose", hidden, perm=[0, 2, 1]),
            "float32",
            (batch, width, "frames"),
        )
    return builder.model({})


def published_decoder_graph(
    model: MossAudioTokenizer, layout: PublishedLayout, weights: WeightFile | None
) -> onnx.ModelProto:
    """The codebooks and the decoder with the inputs and outputs of a published layout, for fewer codebooks too."""
    assert model.decoder is not None
    builder = GraphBuilder("decoder", weights)
    batch: int | str = "batch" if layout == "community" else 1
    dtype = "int32" if layout == "community" else "int64"
    codes = builder.input("audio_codes", dtype, ("codebooks", batch, "frames"))
    if layout == "official":
        used = builder.reshape(builder.input("n_quantizers", "int64", ()), 1)
        codes = builder.slice(codes, 0, builder.integers(0), used)
    else:
        codes = builder.op("Cast", codes, to=onnx.TensorProto.INT64)
    codes = builder.op("Transpose", codes, perm=[1, 0, 2])
    stages = _Stages(builder, model.decoder, None)
    audio = builder.reshape(stages(_dequantize(builder, model, codes), model.config.quantizer.output_dim), 0, -1)
    if layout == "community":
        builder.output("audio", audio, "float32", (batch, "samples"))
    else:
        builder.output("audio", builder.unsqueeze(audio, 1), "float32", (1, 1, "samples"))
        builder.output("audio_lengths", builder.size(audio, 1), "int64", (1,))
    return builder.model({})


def decoder_graph(
    model: MossAudioTokenizer, metadata: Mapping[str, str], weights: WeightFile | None, *, step: bool
) -> onnx.ModelProto:
    """The codebooks and the decoder; with ``step`` the graph that continues utterances."""
    assert model.decoder is not None
    builder = GraphBuilder("decoder_step" if step else "decoder", weights)
    codes = builder.input("codes", "int64", ("batch", "codebooks", "frames"))
    lengths = None if step else builder.input("code_lengths", "int64", ("batch",))
    before = builder.input("frames_before", "int64", ("batch",)) if step else None
    stages = _Stages(builder, model.decoder, before)

    audio = builder.reshape(stages(_dequantize(builder, model, codes), model.config.quantizer.output_dim), 0, -1)
    if lengths is not None:
        samples = builder.op("Mul", lengths, builder.integer(model.config.downsample_rate))
        valid = builder.op("Less", builder.arange(builder.size(audio, 1)), builder.unsqueeze(samples, 1))
        builder.output("audio", builder.op("Where", valid, audio, builder.number(0.0)), "float32", ("batch", "samples"))
        builder.output("lengths", samples, "int64", ("batch",))
    else:
        builder.output("audio", audio, "float32", ("batch", "samples"))
    stages.output_present()
    return builder.model(metadata)


class _Stages:
    """The encoder's or the decoder's stages; with ``before`` (B,) they continue utterances from a past."""

    def __init__(self, builder: GraphBuilder, stages: nn.ModuleList, before: str | None) -> None:
        self._builder = builder
        self._stages = stages
        self._before = before
        transformers = [module.stage for module in stages if isinstance(module, Transformer)]
        self._shapes = [_past_shape(stage) for stage in transformers]
        self._past = [
            builder.input(f"past_{index}", "float32", shape)
            for index, shape in enumerate(self._shapes if before else ())
        ]
        self._present: list[str] = []

    def __call__(self, x: str, channels: int) -> str:
        """(B, L, channels) to the output of the last stage."""
        builder = self._builder
        transformers = 0
        for index, module in enumerate(self._stages):
            if isinstance(module, PatchDown):
                x = builder.op("Transpose", builder.reshape(x, 0, -1, module.size, channels), perm=[0, 1, 3, 2])
                channels *= module.size
                x = builder.reshape(x, 0, -1, channels)
            elif isinstance(module, PatchUp):
                channels //= module.size
                x = builder.op("Transpose", builder.reshape(x, 0, -1, channels, module.size), perm=[0, 1, 3, 2])
                x = builder.reshape(x, 0, -1, channels)
            elif isinstance(module, Transformer):
                past = self._past[transformers] if self._past else None
                stage = _TransformerStage(builder, module, f"{index}.", self._before, past)
                x = stage(x)
                channels = module.stage.output_dimension
                if past is not None:
                    self._present.append(builder.op("Concat", *stage.present, axis=0))
                transformers += 1
            else:
                raise TypeError(f"stage {index} is a {type(module).__name__}")
        return x

    def output_present(self) -> None:
        """Declares the past after these rows."""
        for index, (value, shape) in enumerate(zip(self._present, self._shapes, strict=False)):
            self._builder.output(f"present_{index}", value, "float32", shape)


def _past_shape(stage: TransformerStage) -> tuple[int | str, ...]:
    return stage.num_layers, 2, "batch", stage.context - 1, stage.num_heads, stage.d_model // stage.num_heads


@dataclass
class _Places:
    """Values that all layers of a stage share: rows, rotation, and the keys of each block of queries and their mask."""

    length: str
    fill: str
    cos: str
    sin: str
    keys: str
    bias: str


class _TransformerStage:
    """One transformer stage."""

    def __init__(
        self, builder: GraphBuilder, module: Transformer, name: str, before: str | None, past: str | None
    ) -> None:
        self._builder = builder
        self._module = module
        self._name = name
        self._before = before
        self._past = past
        self.present: list[str] = []

    def __call__(self, x: str) -> str:
        builder, name = self._builder, self._name
        places = self._places(x)
        x = _linear(builder, f"{name}input_proj", self._module.input_proj, x)
        for index, layer in enumerate(self._module.transformer.layers):  # type: ignore[arg-type]
            x = self._layer(x, layer, f"{name}{index}.", index, places)
        return _linear(builder, f"{name}output_proj", self._module.output_proj, x)

    def _places(self, x: str) -> _Places:
        builder, stage = self._builder, self._module.stage
        past, span = stage.context - 1, stage.context - 1 + BLOCK
        length = builder.size(x, 1)
        positions = builder.unsqueeze(builder.arange(length), 0)
        blocks = builder.ceil_div(length, BLOCK)
        first = builder.unsqueeze(builder.op("Mul", builder.arange(blocks), builder.integer(BLOCK)), 1)
        keys = builder.op("Add", first, builder.weight(f"span_{span}", torch.arange(span)))  # (blocks, span)
        since = builder.unsqueeze(builder.op("Sub", keys, builder.integer(past)), 0)
        if self._before is not None:
            rows = builder.unsqueeze(builder.op("Mul", self._before, builder.integer(stage.rate)), 1)
            positions = builder.op("Add", positions, rows)
            since = builder.op("Add", since, builder.unsqueeze(rows, 2))
        started = builder.unsqueeze(builder.op("GreaterOrEqual", since, builder.integer(0)), 2, 3)
        query, key = torch.arange(BLOCK)[:, None], torch.arange(span)[None]
        window = torch.where((key >= query) & (key <= query + past), 0.0, -math.inf)
        never = builder.number(-math.inf)
        bias = builder.op(
            "Where", started, builder.weight(f"window_{span}", window), never
        )  # (B, blocks, 1, BLOCK, span)
        pair = torch.arange(stage.d_model // stage.num_heads // 2, dtype=torch.float32)
        speed = torch.exp(pair * (-math.log(stage.max_period) * 2 / (2 * len(pair))))
        places = builder.unsqueeze(builder.op("Cast", positions, to=onnx.TensorProto.FLOAT), 2)
        angles = builder.op("Mul", places, builder.weight(f"{self._name}speed", speed))
        angles = builder.unsqueeze(angles, 2, 3, 5)  # (B, L, 1, 1, D / 2, 1)
        fill = builder.op("Sub", builder.op("Mul", blocks, builder.integer(BLOCK)), length)
        return _Places(length, fill, builder.op("Cos", angles), builder.op("Sin", angles), keys, bias)

    def _layer(self, x: str, layer: Any, name: str, index: int, places: _Places) -> str:
        builder = self._builder
        attended = self._attention(_norm(builder, f"{name}norm1", layer.norm1, x), layer, name, index, places)
        x = builder.op("Add", x, _scaled(builder, f"{name}scale_1", layer.layer_scale_1, attended))
        wide = _linear(builder, f"{name}linear1", layer.linear1, _norm(builder, f"{name}norm2", layer.norm2, x))
        narrow = _linear(builder, f"{name}linear2", layer.linear2, _gelu(builder, wide))
        return builder.op("Add", x, _scaled(builder, f"{name}scale_2", layer.layer_scale_2, narrow))

    def _attention(self, x: str, layer: Any, name: str, index: int, places: _Places) -> str:
        builder, stage = self._builder, self._module.stage
        heads, head_dim, past = stage.num_heads, stage.d_model // stage.num_heads, stage.context - 1
        projected = _linear(builder, f"{name}in_proj", layer.self_attn.in_projs[0], x)
        projected = builder.reshape(projected, 0, 0, 3, heads, head_dim // 2, 2)
        rotating, values = builder.split_op("Split", 2, projected, builder.integers(2, 1), axis=2)
        real, imaginary = builder.split_op("Split", 2, rotating, builder.integers(1, 1), axis=5)
        turned_real = builder.op("Sub", builder.op("Mul", real, places.cos), builder.op("Mul", imaginary, places.sin))
        turned_imaginary = builder.op(
            "Add", builder.op("Mul", real, places.sin), builder.op("Mul", imaginary, places.cos)
        )
        turned = builder.op("Concat", turned_real, turned_imaginary, axis=5)
        queries, keys = builder.split_op("Split", 2, turned, builder.integers(1, 1), axis=2)
        queries, keys, values = (builder.reshape(part, 0, -1, heads, head_dim) for part in (queries, keys, values))
        if self._past is None:
            keys, values = (builder.pad(part, 4, 1, before=past) for part in (keys, values))
        else:
            both = builder.op("Gather", self._past, builder.integer(index), axis=0)  # (2, B, past, H, D)
            earlier = builder.split_op("Split", 2, both, builder.integers(1, 1), axis=0)
            keys, values = (
                builder.op("Concat", builder.op("Squeeze", old, builder.integers(0)), new, axis=1)
                for old, new in zip(earlier, (keys, values), strict=True)
            )
            last = [builder.unsqueeze(builder.slice(part, 1, places.length), 0, 1) for part in (keys, values)]
            self.present.append(builder.op("Concat", *last, axis=1))

        blocks = builder.reshape(builder.pad(queries, 4, 1, after=places.fill), 0, -1, BLOCK, heads, head_dim)
        blocks = builder.op("Mul", blocks, builder.number(1 / math.sqrt(head_dim)))
        blocks = builder.op("Transpose", blocks, perm=[0, 1, 3, 2, 4])
        keys, values = (
            builder.op("Gather", builder.pad(part, 4, 1, after=places.fill), places.keys, axis=1)
            for part in (keys, values)
        )  # (B, blocks, span, H, D)
        scores = builder.op("MatMul", blocks, builder.op("Transpose", keys, perm=[0, 1, 3, 4, 2]))
        weights = builder.op("Softmax", builder.op("Add", scores, places.bias), axis=-1)
        attended = builder.op("MatMul", weights, builder.op("Transpose", values, perm=[0, 1, 3, 2, 4]))
        attended = builder.op("Transpose", attended, perm=[0, 1, 3, 2, 4])
        attended = builder.reshape(attended, 0, -1, heads * head_dim)
        attended = builder.slice(attended, 1, builder.integers(0), places.length)
        return _linear(builder, f"{name}out_proj", layer.self_attn.out_projs[0], attended)


def _quantize(builder: GraphBuilder, model: MossAudioTokenizer, hidden: str) -> str:
    """Hidden (B, T, d) to codes (B, K, T)."""
    quantizer = model.quantizer
    residual = _projected(builder, "quantizer.input_proj", quantizer.input_proj, hidden)
    codes = []
    for index, codebook in enumerate(quantizer.codebooks):
        name = f"quantizer.{index}."
        query = _projected(builder, f"{name}in_proj", codebook.in_proj, residual)
        norm = builder.op("ReduceL2", query, builder.integers(-1), keepdims=1)
        query = builder.op("Div", query, builder.op("Max", norm, builder.number(1e-12)))
        rows = codebook.codebook
        scores = builder.op("MatMul", query, builder.weight(f"{name}directions", rows.compared.t()))
        halves = builder.weight(f"{name}halves", rows.offsets)
        nearest = builder.op("ArgMax", builder.op("Add", scores, halves), axis=-1, keepdims=0)
        # Two equal rows may score unequally; the first of them is meant.
        nearest = builder.op("Gather", builder.weight(f"{name}first", rows.first), nearest, axis=0)
        residual = builder.op("Sub", residual, _looked_up(builder, name, codebook, nearest))
        codes.append(builder.unsqueeze(nearest, 1))
    return builder.op("Concat", *codes, axis=1)


def _dequantize(builder: GraphBuilder, model: MossAudioTokenizer, codes: str) -> str:
    """Codes (B, K', T) to (B, T, d); codebooks that are not used add nothing."""
    quantizer = model.quantizer
    used = builder.size(codes, 1)
    shape = (
        builder.size(codes, 0),
        builder.op("Sub", builder.integers(quantizer.config.num_quantizers), used),
        builder.size(codes, 2),
    )
    filler = builder.op("Expand", builder.integer(quantizer.unused), builder.op("Concat", *shape, axis=0))
    every = builder.op("Concat", codes, filler, axis=1)
    total: str | None = None
    for index, codebook in enumerate(quantizer.codebooks):
        chosen = builder.op("Gather", every, builder.integer(index), axis=1)
        added = _looked_up(builder, f"quantizer.{index}.", codebook, chosen)
        total = added if total is None else builder.op("Add", total, added)
    assert total is not None
    return _projected(builder, "quantizer.output_proj", quantizer.output_proj, total)


def _looked_up(builder: GraphBuilder, name: str, codebook: Codebook, codes: str) -> str:
    return builder.op("Gather", builder.weight(f"{name}codebook", codebook.table), codes, axis=0)


def _linear(builder: GraphBuilder, name: str, module: nn.Module, x: str) -> str:
    """A linear layer without bias, or nothing."""
    if isinstance(module, nn.Identity):
        return x
    assert isinstance(module, nn.Linear)
    return builder.op("MatMul", x, builder.weight(name, module.weight.t()))


def _projected(builder: GraphBuilder, name: str, module: nn.Module, x: str) -> str:
    """A projection of the quantizer, or nothing."""
    if isinstance(module, nn.Identity):
        return x
    assert isinstance(module, Projection)
    product = builder.op("MatMul", x, builder.weight(f"{name}.weight", module.weight.t()))
    return builder.op("Add", product, builder.weight(f"{name}.bias", module.bias))


def _norm(builder: GraphBuilder, name: str, module: nn.LayerNorm, x: str) -> str:
    weight, bias = builder.weight(f"{name}.weight", module.weight), builder.weight(f"{name}.bias", module.bias)
    return builder.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=module.eps)


def _scaled(builder: GraphBuilder, name: str, module: nn.Module, x: str) -> str:
    scale: Sequence[Tensor] = list(module.parameters())
    return builder.op("Mul", x, builder.weight(name, scale[0])) if scale else x


def _gelu(builder: GraphBuilder, x: str) -> str:
    """The exact form, x · (1 + erf(x / √2)) / 2."""
    erf = builder.op("Erf", builder.op("Div", x, builder.number(math.sqrt(2))))
    return builder.op("Mul", builder.op("Mul", x, builder.op("Add", erf, builder.number(1.0))), builder.number(0.5))
