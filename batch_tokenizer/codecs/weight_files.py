"""The files that hold a checkpoint's tensors: which they are, and each one as names and tensors, within bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

from batch_tokenizer.codecs import nemo_archive
from batch_tokenizer.codecs.config_keys import read_json
from batch_tokenizer.records import RunError, first_line, short_repr

#: Names of weight files, in order of preference: a file, or an index of several.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

#: Tensors of a file, and bytes of a safetensors header. Published codecs have some thousand tensors of 100 bytes each.
MOST_TENSORS = 1 << 16
_MOST_HEADER_BYTES = 1 << 25


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of a checkpoint folder that hold tensors.

    Raises:
        RunError: there are none, or an index is none, or names a file that is absent or not in the folder.
    """
    if folder.suffix == nemo_archive.SUFFIX:
        return (folder,)
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return tuple(folder / shard for shard in _shards(path)) if name.endswith(".index.json") else (path,)
    raise RunError(f"{folder}: has none of {', '.join(WEIGHT_FILES)}")


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RunError(f"{index}: is not an index of weight files: weight_map must be an object that is not empty")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or "\0" in shard:
            raise RunError(f"{index}: weight_map: {tensor!r}: {short_repr(shard)} is not a file's name")
        place = PurePosixPath(shard)
        if place.is_absolute() or ".." in place.parts:
            raise RunError(f"{index}: weight_map: {tensor!r}: {short_repr(shard)} is not inside the folder")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise RunError(f"{index}: names {shard}, which is not there; download the checkpoint again")
    return shards


@contextmanager
def opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """Names in one weight file, and a function that maps a tensor.

    Raises:
        RunError: the file is truncated, corrupt or of another format.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            _check_header(path)
            with safe_open(path, framework="pt") as file:
                yield list(file.keys()), file.get_tensor
        except (SafetensorError, OSError) as error:
            reason = first_line(error)
            raise RunError(f"{path}: cannot be read as safetensors ({reason}); download it again") from error
    else:
        if path.suffix == nemo_archive.SUFFIX:
            with nemo_archive.open_archive_weights(path) as file:
                tensors = _torch_tensors(path, file)
        else:
            tensors = _torch_tensors(path)
        yield list(tensors), tensors.__getitem__


def _check_header(path: Path) -> None:
    """Before the library parses it: eight bytes of length, then JSON with an entry for each tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise RunError(
                f"{path}: cannot be read as safetensors (it has {size:,} bytes, and a header of {length:,} by its "
                "first 8); download it again"
            )
        if length > _MOST_HEADER_BYTES:
            raise RunError(f"{path}: its header has {length:,} bytes; at most {_MOST_HEADER_BYTES:,} are read")
        tensors = file.read(length).count(b'"data_offsets"')
    if tensors > MOST_TENSORS:
        raise RunError(f"{path}: its header lists {tensors:,} tensors; at most {MOST_TENSORS:,} are read")


def _torch_tensors(path: Path, file: IO[bytes] | None = None) -> dict[str, Tensor]:
    """The state dict in a file of torch's own format, or in a ``file`` that lies inside ``path``."""
    try:
        state: Any = torch.load(file or path, map_location="cpu", mmap=file is None, weights_only=True)
    except Exception as error:  # a damaged pickle makes torch's reader raise errors of almost any type
        raise RunError(f"{path}: cannot be read as torch weights ({first_line(error)}); download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RunError(f"{path}: must hold a mapping of names to tensors")
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not isinstance(name, str) or not plain or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise RunError(f"{path}: {short_repr(name)} is not a tensor that has all of its elements in the file")
    return state
