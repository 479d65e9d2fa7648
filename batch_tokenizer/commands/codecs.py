"""``batch_tokenizer codecs``: the families of codecs and what they need, and what a checkpoint is.

Of a checkpoint's weights only shapes and a sample of bytes, for the fingerprint, are read.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from batch_tokenizer.codecs.base import Batching, CodecInfo
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.registry import FAMILIES, open_spec
from batch_tokenizer.records import RunError

#: What only some families need: the distributions that provide it, and the extra that installs it.
LIBRARIES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "transformers": (("transformers",), "transformers"),
    "onnxruntime": (("onnxruntime-gpu", "onnxruntime"), "onnx"),
}

#: How utterances share a batch, as text.
BATCHING: Mapping[Batching, str] = {
    "packed": "any lengths, end to end on one axis; on a CPU at most short ones",
    "padded": "any lengths, padded and masked before each layer that looks sideways; on a CPU only small models",
    "equal lengths": "utterances of one length, as the model has norms or attention over padding; on a CPU one by one",
    "one by one": "one utterance at a time",
}

#: Number formats of weights, and bytes per number.
_FORMATS = (("float32", 4), ("bfloat16", 2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--model_path", metavar="MODEL", help="checkpoint folder or hub id to describe")


def main(arguments: argparse.Namespace) -> int:
    """Prints the families, or one checkpoint. Returns 0.

    Raises:
        RunError: the checkpoint cannot be found or read, or is of no known family.
    """
    if arguments.model_path is None:
        lines = describe_families()
    else:
        lines = describe_checkpoint(Checkpoint.open(arguments.model_path))
    print("\n".join(lines))
    return 0


def describe_families() -> list[str]:
    """A line a family, in the order in which they are asked, and a line a library."""
    width = max(map(len, [*FAMILIES, *LIBRARIES])) + 2
    lines = ["families"]
    lines += [f"  {name:<{width}}{_about(module)}" for name, module in FAMILIES.items()]
    lines.append("libraries")
    lines += [f"  {name:<{width}}{_installed(*library)}" for name, library in LIBRARIES.items()]
    return lines


def describe_checkpoint(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint is: rates, codebooks, size, and the bit rate that each number of codebooks makes.

    Raises:
        RunError: it cannot be read, or is of no known family.
    """
    spec = open_spec(checkpoint)
    info = spec.info
    rate = f"{info.sample_rate:,} Hz"
    if info.output_sample_rate != info.sample_rate:
        rate += f" in, {info.output_sample_rate:,} Hz out"
    longest = "no limit but memory" if info.max_samples is None else f"{info.max_samples / info.sample_rate:,.1f} s"
    rows = {
        "checkpoint": str(checkpoint.folder),
        "family": info.family,
        "sample rate": rate,
        "frame rate": f"{info.frame_rate:g} Hz ({info.samples_per_frame:,} samples a frame)",
        "codebooks": f"{info.num_codebooks} ({_sizes(info.codebook_sizes)})",
        **({"columns": "; ".join(info.columns)} if info.columns else {}),
        "batches": f"{BATCHING[spec.batching]}; tokens are those of each utterance alone",
        "longest audio": longest,
        **_weights(checkpoint),
        "fingerprint": info.fingerprint,
    }
    width = max(map(len, rows)) + 2
    return [f"{name:<{width}}{value}" for name, value in rows.items()] + ["", *_bit_rates(info)]


def _about(module: str) -> str:
    """The first line of a module's docstring, read from its source: importing it may need what is not installed."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ValueError(f"the registry names {module}, which is no module")
    text = ast.get_docstring(ast.parse(Path(found.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _installed(distributions: Sequence[str], extra: str) -> str:
    for name in distributions:
        try:
            return f"{version(name)}" + (f" ({name})" if name != distributions[-1] else "")
        except PackageNotFoundError:
            continue
    return f"not installed: pip install 'batch_tokenizer[{extra}]'"


def _weights(checkpoint: Checkpoint) -> dict[str, str]:
    """Number of parameters, from shapes, and the memory that they take in each number format."""
    try:
        count = sum(tensor.numel() for _, tensor in checkpoint.tensors() if tensor.is_floating_point())
    except RunError:
        return {"parameters": "not known: there are no safetensors or torch weights"}
    in_float32, in_bfloat16 = (f"{_memory(count * size)} in {name}" for name, size in _FORMATS)
    return {"parameters": f"{count:,}", "weights": f"{in_float32}, {in_bfloat16}; activations come on top"}


def _memory(size: int) -> str:
    """Bytes in binary units."""
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.2f} MiB"


def _sizes(sizes: Sequence[int]) -> str:
    """Codebook sizes with repetitions counted: 1024 codes, or 2 x 1024 + 6 x 128 codes."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    if len(runs) == 1:
        return f"{sizes[0]} codes" + (" each" if len(sizes) > 1 else "")
    return " + ".join(f"{count} x {size}" for count, size in runs) + " codes"


def _bit_rates(info: CodecInfo) -> list[str]:
    lines = [f"{'--num_quantizers':>16}  {'kbit/s':>8}  {'bits a frame':>12}  {'tokens a second':>15}"]
    for used in range(1, info.num_codebooks + 1):
        bits = sum(math.log2(size) for size in info.codebook_sizes[:used])
        lines.append(
            f"{used:>16}  {bits * info.frame_rate / 1000:>8.3f}  {bits:>12.1f}  {used * info.frame_rate:>15.1f}"
        )
    return lines
