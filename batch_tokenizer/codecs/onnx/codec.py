"""MOSS as a folder of ONNX graphs, in our, the official or the community's layout, through onnxruntime.

Each utterance is computed alone, so a result cannot depend on a batch; on a CPU several run at a time, one thread each.
Long utterances are computed by our own step graphs in pieces, exactly and in constant memory. Published graphs have no
streaming state: they decode long utterances in pieces with context before each, and refuse to encode very long ones, as
tokens from pieces would not be those of the whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.codecs.base import Codec, CodecInfo, CodecSpec, as_channels
from batch_tokenizer.codecs.checkpoint import GRAPHS_KEY, Checkpoint
from batch_tokenizer.codecs.execution import BatchRunner
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.onnx.graph_file import GraphFile
from batch_tokenizer.codecs.onnx.layouts import Layout, Role, by_role
from batch_tokenizer.codecs.onnx.session import Session
from batch_tokenizer.codecs.onnx.sizes import GraphSizes, Layouts, our_info
from batch_tokenizer.records import RunError

log = logging.getLogger(__name__)

Samples = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]

#: Seconds of audio above which an utterance is computed in pieces.
PIECES_ABOVE_SECONDS = 60.0

#: Seconds of audio per call of a step graph.
STEP_SECONDS = 10.0

#: Seconds of audio that a published encoder takes: its attention's memory grows with the square of the length.
LONGEST_SECONDS = 120.0

#: The part of a published decoder's piece that is context; a piece is as long as the longest utterance of one pass.
CONTEXT_SHARE = 1 / 3


def recognises(config: Mapping[str, Any]) -> bool:
    """A folder with graphs and without torch weights."""
    return GRAPHS_KEY in config


@dataclass(frozen=True)
class OnnxSpec(CodecSpec):
    """A folder of graphs. Features are the samples themselves, (channels, S).

    Attributes:
        layouts: how to run each graph.
        faults: why graphs of the folder that are of no known layout are not.
    """

    #: Graphs compute in float32 wherever they run.
    cuda_dtype: ClassVar[Literal["float32", "bfloat16"]] = "float32"

    info: CodecInfo
    layouts: Layouts
    faults: tuple[str, ...] = ()

    def features(self, samples: Samples) -> Samples:
        return as_channels(samples, self.info.channels)


def open_spec(checkpoint: Checkpoint) -> OnnxSpec:
    """Reads the graphs, and a sample of their weights for the fingerprint.

    Raises:
        RunError: no graph is of a known layout, a file that one needs is absent, or a size is not known.
    """
    graphs = {name: GraphFile.open(checkpoint.folder / name) for name in checkpoint.config[GRAPHS_KEY]}
    sizes = GraphSizes.read(checkpoint)
    layouts, faults = by_role(graphs.values(), sizes.num_codebooks)
    if not layouts:
        raise RunError("; ".join(faults))
    used = {role: graphs[layout.path.name] for role, layout in layouts.items()}
    for graph in used.values():
        graph.check_external_files()
    ours = [layout for layout in layouts.values() if layout.source == "ours"]
    if ours and len(ours) < len(layouts):
        raise RunError(f"{checkpoint.folder}: has our own graphs and others; leave one kind in the folder")
    if ours:
        info = our_info(checkpoint, list(used.values()))
    else:
        sample_rate, samples_per_frame, codebook_sizes = sizes.complete(layouts, used)
        digests = [graph.digest().hex() for _, graph in sorted(used.items())]
        text = json.dumps([sample_rate, samples_per_frame, codebook_sizes, digests])
        info = CodecInfo(
            family="moss_onnx",
            name=checkpoint.name,
            sample_rate=sample_rate,
            samples_per_frame=samples_per_frame,
            codebook_sizes=codebook_sizes,
            fingerprint=hashlib.sha256(text.encode()).hexdigest()[:32],
            max_samples=int(LONGEST_SECONDS * sample_rate),
            channels=sizes.audio_channels(layouts),
        )
    return OnnxSpec(info=info, layouts=layouts, faults=tuple(faults))


def load_codec(request: LoadRequest[OnnxSpec]) -> OnnxCodec:
    """The graphs that the task needs. Their number formats are fixed in the graphs.

    Raises:
        RunError: there is no graph for a part that the task needs.
    """
    spec = request.spec
    for role in request.parts:
        if role not in spec.layouts:
            reasons = f" ({'; '.join(spec.faults)})" if spec.faults else ""
            raise RunError(
                f"{request.checkpoint.folder}: {request.task} needs a graph with the role {role}, and there is "
                f"none{reasons}"
            )
    if request.dtype != torch.float32:
        log.info("the graphs compute in the types that they were exported with; --dtype changes nothing")
    return OnnxCodec(spec, request.parts, request.device, request.threads)


class OnnxCodec(Codec):
    """Graphs in onnxruntime.

    Attributes:
        pieces_above: token frames; a longer utterance is computed in pieces.
        step: token frames per call of a step graph.
    """

    spec: OnnxSpec

    def __init__(self, spec: OnnxSpec, roles: Sequence[Role], device: torch.device, threads: int = 1) -> None:
        self.spec = spec
        self._device = device
        # As with torch models, a thread an utterance, so that results do not depend on how many cores there are.
        self._threads_a_call = 1 if device.type == "cpu" else threads
        self._run = BatchRunner(device, threads)
        self._lock = threading.Lock()
        self._sessions: dict[Role, Session] = {}
        self._measured = False
        for role in roles:
            self._session(role)
        rate = spec.info.frame_rate
        self.pieces_above = max(3, int(PIECES_ABOVE_SECONDS * rate))
        self.step = max(1, int(STEP_SECONDS * rate))

    def encode_batch(self, features: Sequence[Samples], num_quantizers: int) -> list[Codes]:
        return self._run(
            lambda members: [self._encode(samples, num_quantizers) for samples in members],
            features,
            lambda samples: samples.shape[1],
        )

    def decode_batch(self, codes: Sequence[Codes]) -> list[Samples]:
        return self._run(lambda members: [self._decode(member) for member in members], codes, len)

    def seam_error(self, codes: Codes) -> float:
        """Greatest difference between audio decoded in pieces and in one pass, where a piece begins.

        Args:
            codes: (T, K), T >= 3; as long as a pass may be.
        """
        frames, context = len(codes), int(len(codes) * CONTEXT_SHARE)
        size = self.info.samples_per_frame
        whole = self._decode_pass(codes)[..., (frames - context) * size :]
        piece = self._decode_pass(codes[frames - 2 * context :])[..., context * size :]
        return float(np.abs(whole - piece).max())

    def _session(self, role: Role) -> Session:
        """The graph's session, loaded when it is first needed: steps are for long utterances only."""
        with self._lock:
            if role not in self._sessions:
                self._sessions[role] = Session(self.spec.layouts[role].path, self._device, self._threads_a_call)
            return self._sessions[role]

    def _encode(self, channels: Samples, num_quantizers: int) -> Codes:
        """Samples (channels, S) to codes (T, ``num_quantizers``); our own graphs are mono."""
        samples = channels[0]
        frames = self.spec.num_frames(len(samples))
        count = np.array(num_quantizers, dtype=np.int64)
        if frames > self.pieces_above and "encoder_step" in self.spec.layouts:
            size = self.step * self.info.samples_per_frame
            pieces = (samples[None, start : start + size] for start in range(0, len(samples), size))
            table = np.empty((num_quantizers, frames), dtype=np.int64)
            self._in_steps("encoder_step", "audio", pieces, "codes", table, {"num_quantizers": count})
            codes = table.T
        elif self.spec.layouts["encoder"].source == "ours":
            feeds = {"audio": samples[None], "lengths": np.array([len(samples)]), "num_quantizers": count}
            codes = self._session("encoder")(feeds, ["codes"])[0][0][0].T
        else:
            codes = self._encode_published(channels, frames, num_quantizers)
        return self._checked_codes(codes, frames, num_quantizers)

    def _encode_published(self, channels: Samples, frames: int, num_quantizers: int) -> npt.NDArray[np.int64]:
        """(T, K) of a graph that may not count an utterance's last frame unless it is whole."""
        layout = self.spec.layouts["encoder"]
        padded = np.zeros((1, len(channels), frames * self.info.samples_per_frame), dtype=np.float32)
        padded[0, :, : channels.shape[1]] = channels
        feeds: dict[str, Any]
        if layout.source == "nano":
            lengths = np.array([padded.shape[2]], dtype=layout.dtypes["input_lengths"])
            feeds = {"waveform": padded, "input_lengths": lengths}
        else:
            feeds = {"input_values": padded, **self._count(layout, num_quantizers)}
        codes = self._session("encoder")(feeds, [layout.output])[0][0]
        if codes.ndim != 3 or codes.shape[layout.axes.index("B")] != 1:
            raise RunError(f"{layout.path}: gave codes of shape {codes.shape} for one utterance", exit_code=1)
        by_frame: npt.NDArray[np.int64] = codes.transpose([layout.axes.index(axis) for axis in "BTK"])[0]
        return by_frame[:frames, :num_quantizers]

    def _checked_codes(self, codes: npt.NDArray[np.int64], frames: int, num_quantizers: int) -> Codes:
        path = self.spec.layouts["encoder"].path
        if codes.shape != (frames, num_quantizers):
            raise RunError(
                f"{path}: gave {codes.shape[0]} frames of {codes.shape[1]} codebooks where {frames} of "
                f"{num_quantizers} are due; check sampling_rate and downsample_rate in config.json",
                exit_code=1,
            )
        sizes = np.array(self.info.codebook_sizes[:num_quantizers])
        if (codes < 0).any() or (codes >= sizes).any():
            raise RunError(f"{path}: gave a code outside its codebook; check codebook_size in config.json", exit_code=1)
        return np.ascontiguousarray(codes, dtype=np.uint16)

    def _decode(self, codes: Codes) -> Samples:
        frames = len(codes)
        if frames <= self.pieces_above:
            return self._decode_pass(codes)
        if "decoder_step" in self.spec.layouts:
            table = codes.T[None].astype(np.int64)
            pieces = (table[:, :, start : start + self.step] for start in range(0, frames, self.step))
            samples = np.empty(self.spec.num_output_samples(frames), dtype=np.float32)
            self._in_steps("decoder_step", "codes", pieces, "audio", samples, {})
            return samples
        if self.spec.layouts["decoder"].source == "ours":
            return self._decode_pass(codes)  # its memory grows with the length only
        self._report_seams(codes)
        context = int(self.pieces_above * CONTEXT_SHARE)
        fresh, size = self.pieces_above - context, self.info.samples_per_frame
        parts = [self._decode_pass(codes[: self.pieces_above])]
        for start in range(self.pieces_above, frames, fresh):
            parts.append(self._decode_pass(codes[start - context : start + fresh])[..., context * size :])
        return np.concatenate(parts, axis=-1)

    def _report_seams(self, codes: Codes) -> None:
        """Logs the difference of pieces from one pass, once, on the first utterance that needs pieces."""
        with self._lock:
            if self._measured:
                return
            self._measured = True
        error = self.seam_error(codes[: self.pieces_above])
        rate = self.info.frame_rate
        log.warning(
            "utterances above %.0f s are decoded in pieces with %.0f s of context, as these graphs have no streaming "
            "state: where pieces join, samples differ from one pass by at most %.1e; graphs of `onnx export` are exact",
            self.pieces_above / rate,
            int(self.pieces_above * CONTEXT_SHARE) / rate,
            error,
        )

    def _decode_pass(self, codes: Codes) -> Samples:
        """One run of the decoder over codes (T, K')."""
        layout, (frames, used) = self.spec.layouts["decoder"], codes.shape
        if layout.source == "ours":
            feeds: dict[str, Any] = {"codes": codes.T[None].astype(np.int64), "code_lengths": np.array([frames])}
        else:
            wide = codes
            if layout.fixed_codebooks is not None and used < layout.fixed_codebooks:
                if "n_quantizers" not in layout.dtypes:
                    raise RunError(
                        f"{layout.path}: decodes {layout.fixed_codebooks} codebooks and no fewer, these codes have "
                        f"{used}; use a graph with that axis free, or `onnx export`"
                    )
                wide = np.pad(codes, ((0, 0), (0, layout.fixed_codebooks - used)))
            by_axis = wide[None].transpose(["BTK".index(axis) for axis in layout.axes])
            feeds = {"audio_codes": by_axis.astype(layout.dtypes["audio_codes"]), **self._count(layout, used)}
            if layout.source == "nano":
                feeds["audio_code_lengths"] = np.array([frames], dtype=layout.dtypes["audio_code_lengths"])
        audio = self._session("decoder")(feeds, [layout.output])[0][0]
        due, channels = self.spec.num_output_samples(frames), self.info.channels
        if audio.size != due * channels:
            raise RunError(
                f"{layout.path}: gave {audio.size} samples for {frames} frames where {due * channels} are due; "
                "check downsample_rate and the number of channels in config.json",
                exit_code=1,
            )
        return audio.reshape(-1 if channels == 1 else (channels, due)).astype(np.float32, copy=False)

    def _count(self, layout: Layout, num_quantizers: int) -> dict[str, npt.NDArray[Any]]:
        """The input for the number of codebooks, if the graph has one."""
        if "n_quantizers" not in layout.dtypes:
            return {}
        value = np.array(num_quantizers, dtype=layout.dtypes["n_quantizers"])
        return {"n_quantizers": value.reshape(layout.count_shape)}

    def _in_steps(
        self,
        role: Role,
        name: str,
        pieces: Iterable[npt.NDArray[Any]],
        output: str,
        into: npt.NDArray[Any],
        more: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        """A step graph over the pieces of one utterance; its past stays on the device.

        Args:
            name, pieces: the input, and its value in each step, (1, …, n).
            output, into: the output, and where it goes, (…, N): it is filled along the last axis.
            more: inputs that are the same in each step.
        """
        session, layout = self._session(role), self.spec.layouts[role]
        past = [session.to_device(np.zeros(shape, dtype=np.float32)) for shape in layout.past]
        present = [f"present_{index}" for index in range(len(past))]
        frames = done = 0
        for piece in pieces:
            feeds = {
                name: piece,
                "frames_before": np.array([frames]),
                **more,
                **{f"past_{index}": value for index, value in enumerate(past)},
            }
            (result,), past = session(feeds, [output], present)
            into[..., done : done + result.shape[-1]] = result[0]
            done += result.shape[-1]
            frames += self.step
