"""Checkpoint folders that somebody damaged or made up: good ones of every family, and what may be wrong with them."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.support import hf, padded_codecs
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.moss import tiny as tiny_moss
from tests.support.moss import write_moss_checkpoint
from tests.support.onnx_layouts import write_community, write_nano
from tests.support.qwen3_tts import write_qwen3_tts_checkpoint
from tests.support.s3tokenizer import random_tensors as s3_tensors
from tests.support.s3tokenizer import write_s3_checkpoint, write_s3_graph

#: Makes something of a copied checkpoint folder wrong.
Fault = Callable[[Path], None]

#: Texts of JSON values that may stand in any place.
VALUES = (
    "10000000", "1000000000000", "9" * 400, "9" * 5000, "1e999", "-1", "0", "0.5", "NaN", "Infinity", "-Infinity",
    '"7"', "null", "true", "[]", "{}", "[1000000000000]", '"x\\u0000y"', "[" * 100_000 + "]" * 100_000,
    "[" * 900 + "]" * 900, "[" + "2," * 2000 + "2]",
)  # fmt: skip

#: Heads of safetensors files, and what is wrong with each.
HEADERS: dict[str, Any] = {
    "unknown dtype": {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
    "overlapping": {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    },
    "shape that overflows": {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}},
    "negative shape": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "offsets backwards": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "offsets beyond the end": {"a": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}},
    "no tensors": {},
    "list": [1, 2],
}


def write_checkpoints(root: Path) -> dict[str, Path]:
    """A small good checkpoint of every family, by name."""
    made = {
        "mimo": write_mimo_checkpoint(root / "mimo"),
        "moss": write_moss_checkpoint(root / "moss"),
        "moss stereo": write_moss_checkpoint(
            root / "moss stereo", tiny_moss(downsample_rate=320, number_channels=2, enable_channel_interleave=True)
        ),
        "qwen3_tts": write_qwen3_tts_checkpoint(root / "qwen3_tts"),
        "s3tokenizer": write_s3_checkpoint(root / "s3tokenizer", "v2"),
        **{name: padded_codecs.write_checkpoint(root / name, name) for name in padded_codecs.CONFIGS},
    }
    for name in hf.CONFIGS:
        hf.save_checkpoint(root / name, name)
        made[name] = root / name
    return made


def write_graphs(root: Path, moss: Path) -> dict[str, Path]:
    """Folders of ONNX graphs, by name, exported from a MOSS checkpoint."""
    from batch_tokenizer.codecs.checkpoint import Checkpoint
    from batch_tokenizer.codecs.onnx.export import export_moss

    export_moss(Checkpoint.open(str(moss)), root / "our graphs")
    config = {"sampling_rate": 16000, "downsample_rate": 640, "quantizer_kwargs": {"codebook_size": 32}}
    graph = root / "s3 graph" / "speech_tokenizer_v2.onnx"
    graph.parent.mkdir()
    write_s3_graph(graph, "v2", s3_tensors("v2"))
    return {
        "our graphs": root / "our graphs",
        "community graphs": write_community(root / "our graphs", root / "community", books=5, config=config),
        "nano graphs": write_nano(root / "our graphs", root / "nano", books=5),
        "s3 graph": graph.parent,
    }


def copied(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint folder that may be changed."""
    return Path(shutil.copytree(source, folder))


def faults(folder: Path) -> Iterator[tuple[str, Fault]]:
    """Everything that can be made wrong with the checkpoint in ``folder``, by name."""
    for path in sorted(folder.glob("*.json")):
        if not path.name.endswith(".index.json"):
            yield from json_faults(path.name, json.loads(path.read_text()))
    for path in sorted(folder.iterdir()):
        yield from file_faults(path.name, path.stat().st_size)
    if (folder / "model.safetensors").is_file():
        yield from tensor_faults()


def json_faults(name: str, config: Any) -> Iterator[tuple[str, Fault]]:
    """Every value of a JSON file in turn replaced by each of ``VALUES``, or taken out."""
    for place in places(config):
        for text in (*VALUES, None):
            shown = "absent" if text is None else text[:20]
            yield f"{name}: {'.'.join(map(str, place))} = {shown}", _changed(name, place, text)
    for text in ("[1]", "7", "null", '"x"', "{", "", "\ufeff{}", '{"a":' * 100_000, "[" * 100_000, "\x00" * 100):
        yield f"{name} is {text[:10]!r}", _written(name, text.encode())
    yield f"{name} is not UTF-8", _written(name, b'{"\xff": 1}')


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value there is something that can be replaced."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from places(inner, (*before, key))


def file_faults(name: str, size: int) -> Iterator[tuple[str, Fault]]:
    """A file that is empty, cut, followed by zeros, or not there."""

    def cut(length: int) -> Fault:
        def fault(folder: Path) -> None:
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[:length])

        return fault

    for length in sorted({0, 1, 7, 8, 9, 100, size // 2, size - 1}):
        yield f"{name}: {length} bytes of it", cut(length)
    yield f"{name}: zeros", _written(name, bytes(size))
    yield f"{name}: gone", lambda folder: (folder / name).unlink()


def tensor_faults() -> Iterator[tuple[str, Fault]]:
    """Weights whose header, index or tensors are wrong."""
    for words, header in HEADERS.items():
        yield f"header: {words}", _written("model.safetensors", safetensors_bytes(header, b"\0" * 16))
    for count in (200_000, 1_000_000):
        yield f"header: {count} tensors", partial(_many, count=count)
    for length in (1 << 62, 1 << 40, (1 << 64) - 1):
        yield f"header: length {length:x}", _written("model.safetensors", struct.pack("<Q", length) + b"{}")
    deep = b'{"a":' * 100_000
    yield "header: nested", _written("model.safetensors", struct.pack("<Q", len(deep)) + deep)
    for place in ("/etc/passwd", "../model.safetensors", "a/../../x", "absent.safetensors", "", "x\0y", 7, None, ["a"]):
        index = json.dumps({"weight_map": {"a": place}})
        yield f"index: {place!r}", _index(index)
    for index in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 7}', "[" * 100_000):
        yield f"index: {index[:30]}", _index(index)
    yield "index: twice the same", _twice
    yield "tensor: one less", _tensors(lambda tensors: tensors.pop(sorted(tensors)[0]))
    yield "tensor: one more", _tensors(lambda tensors: tensors.update(surplus=next(iter(tensors.values()))))
    yield "tensor: integers", _tensors(lambda tensors: tensors.update({k: v.int() for k, v in tensors.items()}))
    yield "tensor: flat", _tensors(lambda tensors: tensors.update({k: v.flatten() for k, v in tensors.items()}))
    yield "tensor: empty", _tensors(lambda tensors: tensors.update({k: v[:0] for k, v in tensors.items() if v.ndim}))
    yield "pickle: expanded", _pickled(lambda tensors: _expanded(tensors))
    yield "pickle: list", _pickled(lambda tensors: list(tensors.values()))
    yield "pickle: inner", _pickled(lambda tensors: {"state_dict": tensors})
    yield "pickle: sparse", _pickled(lambda tensors: {key: _sparse(value) for key, value in tensors.items()})
    yield "pickle: meta", _pickled(lambda tensors: {key: value.to("meta") for key, value in tensors.items()})
    yield "pickle: numbered", _pickled(lambda tensors: dict(enumerate(tensors.values())))


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _written(name: str, data: bytes) -> Fault:
    def fault(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return fault


def _changed(name: str, place: tuple[Any, ...], text: str | None) -> Fault:
    mark = "\u2603 here"

    def fault(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        holder = config
        for key in place[:-1]:
            holder = holder[key]
        if text is None:
            del holder[place[-1]]
        else:
            holder[place[-1]] = mark
        (folder / name).write_text(json.dumps(config).replace(json.dumps(mark), text or ""))

    return fault


def _many(folder: Path, count: int) -> None:
    text = b"{" + b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * count + b'"b":{}}'
    _written("model.safetensors", struct.pack("<Q", len(text)) + text)(folder)


def _index(text: str) -> Fault:
    def fault(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return fault


def _twice(folder: Path) -> None:
    whole = folder / "model.safetensors"
    shutil.copy(whole, folder / "a.safetensors")
    whole.rename(folder / "b.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(change: Callable[[dict[str, Any]], Any]) -> Fault:
    def fault(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        # Copies, as tensors that share memory cannot be saved.
        save_file({key: value.clone() for key, value in tensors.items()}, folder / "model.safetensors")

    return fault


def _pickled(change: Callable[[dict[str, Any]], Any]) -> Fault:
    def fault(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file

        path = folder / "model.safetensors"
        torch.save(change(load_file(path)), folder / "pytorch_model.bin")
        path.unlink()

    return fault


def _expanded(tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {key: torch.zeros(1).expand(math.prod(value.shape), 1 << 30) for key, value in tensors.items()}


def _sparse(tensor: Any) -> Any:
    return tensor.to_sparse() if tensor.ndim else tensor
