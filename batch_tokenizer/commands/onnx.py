"""The command ``onnx``: export a checkpoint as graphs, check graphs, describe a graph.

batch_tokenizer onnx export --model_path M --out DIR     graphs of a MOSS checkpoint
batch_tokenizer onnx check DIR [--model_path M]          valid, complete, and equal to the checkpoint in PyTorch
batch_tokenizer onnx info FILE_OR_DIR                    inputs, outputs, opset, producer, sizes, metadata
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.codecs.base import Codec
from batch_tokenizer.codecs.checkpoint import GRAPHS_KEY, Checkpoint
from batch_tokenizer.codecs.onnx import codec as onnx_codec
from batch_tokenizer.codecs.onnx.graph_file import INSTALL, GraphFile
from batch_tokenizer.codecs.onnx.layouts import Role
from batch_tokenizer.codecs.onnx.session import Session
from batch_tokenizer.codecs.opening import open_codec
from batch_tokenizer.records import RunError, first_line

if TYPE_CHECKING:
    from batch_tokenizer.codecs.onnx.export import ExportLayout

#: What a check asks for: the greatest difference of a sample, and the least share of equal codes.
MOST_AUDIO_ERROR = 1e-3
LEAST_AGREEMENT = 0.999

#: Lengths that a check runs, in frames of audio; the last frame of some is not whole.
_CHECKED_FRAMES = (12.0, 0.4, 5.0, 30.7, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of each action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{export,check,info}")
    export = actions.add_parser("export", help="write a MOSS checkpoint as ONNX graphs")
    export.add_argument("--model_path", required=True, help="checkpoint folder or hub id")
    export.add_argument("--out", type=Path, required=True, help="folder for the graphs")
    export.add_argument("--layout", choices=("ours", "official", "community"), default="ours",
                        help="inputs and outputs: our own, with exact streaming; those of MOSS's own graphs; or those "
                             "of the community's export (default: %(default)s)")  # fmt: skip
    check = actions.add_parser("check", help="are graphs valid, complete, and equal to the checkpoint?")
    check.add_argument("folder", type=Path)
    check.add_argument("--model_path", help="torch checkpoint to compare with; none: the graphs among themselves")
    info = actions.add_parser("info", help="inputs, outputs, opset, producer, sizes, metadata")
    info.add_argument("path", type=Path, help="a graph, or a folder of graphs")


def main(arguments: argparse.Namespace) -> int:
    """Runs one action. Status 1 if a check fails.

    Raises:
        RunError: something is absent or cannot be read; the message names it.
    """
    try:
        import onnx  # noqa: F401 - whether it is there
    except ImportError as error:
        raise RunError(INSTALL) from error
    if arguments.action == "export":
        return _export(arguments.model_path, arguments.out, arguments.layout)
    if arguments.action == "check":
        return _check(arguments.folder, arguments.model_path)
    return _info(arguments.path)


def _export(model_path: str, out: Path, layout: ExportLayout) -> int:
    from batch_tokenizer.codecs.onnx.export import export_moss

    for path in export_moss(Checkpoint.open(model_path), out, layout=layout):
        print(path)
    print(f"check them against the checkpoint: batch_tokenizer onnx check {out} --model_path {model_path}")
    return 0


def _info(path: Path) -> int:
    for index, file in enumerate(_graph_files(path)):
        graph = GraphFile.open(file)
        print("\n" * bool(index) + f"{file}")
        print(f"  opset {graph.opset}, producer {graph.producer}, {len(graph.proto.graph.node)} nodes")
        print(f"  weights {graph.weight_bytes / 1e6:.1f} MB, file {file.stat().st_size / 1e6:.1f} MB")
        for external in graph.external_files:
            size = f"{external.stat().st_size / 1e6:.1f} MB" if external.is_file() else "MISSING"
            print(f"  external {external.name}: {size}")
        for kind, ports in (("input", graph.inputs), ("output", graph.outputs)):
            for port in ports:
                print(f"  {kind} {port}")
        for key, value in graph.metadata.items():
            print(f"  {key} = {value}")
    return 0


def _graph_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.onnx"))
    if not files:
        raise RunError(f"{path}: is no ONNX graph and no folder that has any")
    return files


def _check(folder: Path, model_path: str | None) -> int:
    import onnx

    # 1. Each file is a valid graph with its weights.
    for file in _graph_files(folder):
        GraphFile.open(file).check_external_files()
        try:
            onnx.checker.check_model(file, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise RunError(f"{file}: is not a valid graph: {first_line(error)}") from error
        print(f"{file.name}: valid, weights present")
    # 2. Together they are a codec, and one of the same kind as the checkpoint.
    graphs = Checkpoint.open(str(folder))
    if GRAPHS_KEY not in graphs.config:
        # Torch weights beside the graphs: it is the graphs that are checked.
        names = [file.name for file in _graph_files(folder)]
        graphs = Checkpoint(graphs.folder, graphs.name, {**graphs.config, GRAPHS_KEY: names})
    spec = onnx_codec.open_spec(graphs)
    print(f"{spec.info.sample_rate} Hz, {spec.info.samples_per_frame} samples a frame, "
          f"{spec.info.num_codebooks} codebooks, fingerprint {spec.info.fingerprint}")  # fmt: skip
    for role in ("encoder", "decoder"):
        if role not in spec.layouts:
            reasons = f" ({'; '.join(spec.faults)})" if spec.faults else ""
            raise RunError(f"{folder}: has no graph with the role {role}{reasons}")
    codec = onnx_codec.OnnxCodec(spec, ("encoder", "decoder"), torch.device("cpu"))
    torch_codec = None if model_path is None else open_codec(model_path, "cpu", "float32")
    if torch_codec is not None:
        theirs = torch_codec.info
        if (theirs.sample_rate, theirs.samples_per_frame, theirs.codebook_sizes) != (
            spec.info.sample_rate, spec.info.samples_per_frame, spec.info.codebook_sizes
        ):  # fmt: skip
            raise RunError(f"{model_path}: has another sample rate, frame or codebooks than the graphs in {folder}")
    # 3. Equal codes and audio: alone, in a batch, and in steps.
    report = _Report()
    sessions = _our_sessions(spec)
    waves = _waves(spec.info.sample_rate, spec.info.samples_per_frame)
    features = [spec.features(wave) for wave in waves]
    for count in sorted({spec.info.num_codebooks, max(1, spec.info.num_codebooks // 2), 1}, reverse=True):
        codes = codec.encode(features, count)
        wanted = codes if torch_codec is None else torch_codec.encode(features, count)
        name = f"{count} codebooks, against {'the same codes' if torch_codec is None else 'PyTorch'}"
        if torch_codec is not None:
            report.codes(f"codes alone, {name}", codes, wanted)
            _decode_alone(report, name, codec, torch_codec, wanted)
        if sessions:
            _check_batch(report, sessions, waves, wanted, codec.decode(wanted))
    if "decoder_step" in spec.layouts and "encoder_step" in spec.layouts:
        _check_steps(report, codec)
    elif spec.layouts["decoder"].source != "ours":
        _seams(codec)
    print("all equal within the bounds" if report.good else "NOT EQUAL within the bounds")
    return 0 if report.good else 1


class _Report:
    """Prints each comparison and remembers whether all were within the bounds."""

    def __init__(self) -> None:
        self.good = True

    def codes(
        self, name: str, found: Sequence[npt.NDArray[np.generic]], wanted: Sequence[npt.NDArray[np.generic]]
    ) -> None:
        """The share of codes that are equal."""
        if any(one.shape != other.shape for one, other in zip(found, wanted, strict=True)):
            self._say(name, "numbers of frames differ", False)
            return
        equal = float(np.mean(np.concatenate([(a == b).ravel() for a, b in zip(found, wanted, strict=True)])))
        self._say(name, f"{100 * equal:.3f} % equal", equal >= LEAST_AGREEMENT)

    def audio(
        self, name: str, found: Sequence[npt.NDArray[np.float32]], wanted: Sequence[npt.NDArray[np.float32]]
    ) -> None:
        """The greatest difference of a sample."""
        if any(one.shape != other.shape for one, other in zip(found, wanted, strict=True)):
            self._say(name, "numbers of samples differ", False)
            return
        error = max(float(np.abs(one - other).max()) for one, other in zip(found, wanted, strict=True))
        self._say(name, f"differs by at most {error:.1e}", error <= MOST_AUDIO_ERROR)

    def _say(self, name: str, result: str, good: bool) -> None:
        self.good &= good
        print(f"{name}: {result}{'' if good else '   <- out of bounds'}", flush=True)


def _decode_alone(
    report: _Report, name: str, codec: Codec, torch_codec: Codec, codes: list[npt.NDArray[np.uint16]]
) -> None:
    wanted = torch_codec.decode(codes)
    try:
        report.audio(f"audio alone, {name}", codec.decode(codes), wanted)
    except RunError as error:  # a graph may be fixed to all codebooks
        if codes[0].shape[1] == codec.info.num_codebooks:
            raise
        print(f"audio alone, {name}: not possible: {error}")


def _our_sessions(spec: onnx_codec.OnnxSpec) -> dict[Role, Session]:
    """Our whole-utterance graphs, to be fed as they are; none of others."""
    roles: tuple[Role, Role] = ("encoder", "decoder")
    layouts = [spec.layouts[role] for role in roles if spec.layouts[role].source == "ours"]
    return {layout.role: Session(layout.path, torch.device("cpu"), threads=1) for layout in layouts}


def _check_batch(
    report: _Report,
    sessions: Mapping[Role, Session],
    waves: Sequence[npt.NDArray[np.float32]],
    codes_alone: Sequence[npt.NDArray[np.uint16]],
    audio_alone: Sequence[npt.NDArray[np.float32]],
) -> None:
    """Our graphs fed a padded batch of mixed lengths, as a user of them might."""
    batch = np.zeros((len(waves), max(map(len, waves))), dtype=np.float32)
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = wave
    count = codes_alone[0].shape[1]
    lengths = np.array([len(wave) for wave in waves])
    feeds = {"audio": batch, "lengths": lengths, "num_quantizers": np.array(count)}
    (codes, frames), _ = sessions["encoder"](feeds, ["codes", "code_lengths"])
    members = [code[:, :length].T for code, length in zip(codes, frames, strict=True)]
    report.codes(f"codes in a batch of {len(waves)}, {count} codebooks", members, codes_alone)
    padded = np.zeros_like(codes)
    for row, code in zip(padded, codes_alone, strict=True):
        row[:, : len(code)] = code.T
    (audio, samples), _ = sessions["decoder"]({"codes": padded, "code_lengths": frames}, ["audio", "lengths"])
    members = [row[:length] for row, length in zip(audio, samples, strict=True)]
    report.audio(f"audio in a batch of {len(waves)}, {count} codebooks", members, audio_alone)


def _check_steps(report: _Report, codec: onnx_codec.OnnxCodec) -> None:
    """The step graphs against one pass, over a few steps."""
    frames = 3 * codec.step + 1
    wave = _noise(frames * codec.info.samples_per_frame - 1, codec.info.sample_rate)
    whole = codec.encode([codec.spec.features(wave)], codec.info.num_codebooks)
    audio = codec.decode(whole)
    kept, codec.pieces_above = codec.pieces_above, 1
    started = time.perf_counter()
    report.codes("codes in steps against one pass", codec.encode([wave[None]], codec.info.num_codebooks), whole)
    report.audio("audio in steps against one pass", codec.decode(whole), audio)
    print(f"  {len(wave) / codec.info.sample_rate:.1f} s of audio in {time.perf_counter() - started:.1f} s")
    codec.pieces_above = kept


def _seams(codec: onnx_codec.OnnxCodec) -> None:
    """What decoding in pieces costs, for graphs without streaming state."""
    generator = np.random.default_rng(0)
    for seconds in (15.0, 30.0, onnx_codec.PIECES_ABOVE_SECONDS):
        frames = max(3, int(seconds * codec.info.frame_rate))
        codes = np.stack([generator.integers(0, size, frames) for size in codec.info.codebook_sizes], axis=1)
        error = codec.seam_error(codes.astype(np.uint16))
        context = int(frames * onnx_codec.CONTEXT_SHARE) / codec.info.frame_rate
        print(f"decoding in pieces with {context:.1f} s of context: differs from one pass by at most {error:.1e}")


def _waves(sample_rate: int, samples_per_frame: int) -> list[npt.NDArray[np.float32]]:
    return [_noise(int(frames * samples_per_frame), sample_rate) for frames in _CHECKED_FRAMES]


def _noise(num_samples: int, sample_rate: int) -> npt.NDArray[np.float32]:
    """Noise over a tone, whose level swells and fades."""
    generator = np.random.default_rng(num_samples)
    time_axis = np.arange(num_samples) / sample_rate
    level = 0.15 + 0.1 * np.sin(2 * np.pi * 3 * time_axis)
    tone = np.sin(2 * np.pi * 220 * time_axis)
    return (level * (tone + 0.5 * generator.standard_normal(num_samples))).astype(np.float32)
