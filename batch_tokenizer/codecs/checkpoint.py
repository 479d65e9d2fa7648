"""A checkpoint on disk: its ``config.json``, its tensors (read one by one, never all twice in memory), its fingerprint.

``--model_path`` is a folder, one ``.onnx`` or ``.nemo`` file, a hub id such as ``XiaomiMiMo/MiMo-Audio-Tokenizer``,
with a folder in the repository (``owner/name/speech_tokenizer``) and a revision (``owner/name@v1.0``) where wanted, or
absent, which means the bundled default. For a language model with its codec in
a subfolder, that subfolder is used.
Weights are ``model.safetensors``, sharded safetensors with an index, ``pytorch_model.bin`` or its sharded form.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from batch_tokenizer.codecs import nemo_archive
from batch_tokenizer.codecs.config_keys import read_json
from batch_tokenizer.codecs.nemo_archive import read_archive_config
from batch_tokenizer.codecs.weight_files import WEIGHT_FILES, find_weight_files, opened
from batch_tokenizer.records import RunError, first_line

Config = TypeVar("Config")

#: Key of ``Checkpoint.config`` for the ONNX graphs of a folder without torch weights.
GRAPHS_KEY = "onnx_graphs"

#: Folders of the codec in checkpoints of language models: Qwen3-TTS, MiMo-V2.5.
CODEC_FOLDERS = ("speech_tokenizer", "audio_tokenizer")

#: Files of a repository, or of one of its folders, that are downloaded.
_DOWNLOADED = ("*.json", "*.safetensors", "*.bin", "*.onnx*", "*.data", "*.nemo")

#: owner/name, then maybe /folder/in/it, then maybe @revision.
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)((?:/[\w.-]+)*)(?:@([\w./-]+))?")

#: Bytes of weights that are mapped at a time.
_MAPPED_BYTES = 1 << 27

#: Bytes sampled of each tensor for the fingerprint: this many blocks of this many bytes, evenly spread.
_BLOCKS, _BLOCK_BYTES = 16, 1024


def default_checkpoint() -> Path:
    """The folder of the checkpoint that ships with the package."""
    return Path(str(resources.files("batch_tokenizer") / "checkpoints" / "default"))


def find_checkpoint(model_path: str | None) -> Path:
    """The folder, or the ``.onnx`` or ``.nemo`` file, that ``--model_path`` means; a hub id is downloaded first.

    Raises:
        RunError: there is no such folder, or the hub cannot give it.
    """
    if model_path is None:
        return default_checkpoint()
    folder = Path(model_path).expanduser()
    if not folder.exists():
        hub_id = _HUB_ID.fullmatch(model_path)
        if not hub_id:
            raise RunError(
                f"--model_path {model_path}: no such folder, and not a hub id (owner/name, owner/name/folder, "
                f"owner/name@revision)"
            )
        repository, inner, revision = hub_id.groups()
        folder = _downloaded(model_path, repository, inner.strip("/"), revision)
    inner_folders = (folder / name for name in CODEC_FOLDERS if (folder / name / "config.json").is_file())
    archives = [] if (folder / "config.json").exists() else list(folder.glob(f"*{nemo_archive.SUFFIX}"))
    return next(inner_folders, archives[0] if len(archives) == 1 else folder)


def _downloaded(model_path: str, repository: str, inner: str, revision: str | None) -> Path:
    """The local copy of a repository, or of its folder ``inner``; where it has a codec's folder, no more than that."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: Iterable[str]) -> Path:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns))) / inner

    try:
        if inner:
            folder = fetch(f"{inner}/{pattern}" for pattern in _DOWNLOADED)
            if not folder.is_dir():
                raise RunError(f"--model_path {model_path}: {repository} has no folder {inner}")
            return folder
        folder = fetch(["*.json"])  # small, and enough to see whether the codec is in a subfolder
        for name in CODEC_FOLDERS:
            if (folder / name / "config.json").is_file():
                return fetch(f"{name}/{pattern}" for pattern in _DOWNLOADED)
        return fetch(_DOWNLOADED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise RunError(
            f"--model_path {model_path}: no folder of that name here, and the hub did not give it ({reason}); download "
            f"the checkpoint and pass its folder, or set HF_HOME to a cache that has it",
            exit_code=1,
        ) from error


@contextmanager
def empty_weights() -> Iterator[None]:
    """Builds models on the meta device, so that parameters and buffers take no memory until they are loaded."""
    from accelerate import init_empty_weights  # imported here, as loader processes build no models

    with init_empty_weights(include_buffers=True):
        yield


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that has a readable ``config.json``, or graphs, beside which it may be absent.

    Attributes:
        folder: where it is; of an archive of NeMo's the archive itself.
        name: the last component of ``--model_path``.
        config: the mapping in ``config.json``; of a folder with graphs and no torch weights also their names.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]

    @classmethod
    def open(cls, model_path: str | None) -> Checkpoint:
        """Finds the folder and reads its configuration.

        Raises:
            RunError: no folder, no ``config.json``, or not a JSON object; the hub cannot give it.
        """
        folder = find_checkpoint(model_path)
        name = "default" if model_path is None else _name(model_path)
        if folder.suffix == nemo_archive.SUFFIX and folder.is_file():
            return cls(folder=folder, name=name.removesuffix(folder.suffix), config=read_archive_config(folder))
        if folder.suffix.lower() == ".onnx" and folder.is_file():
            graphs, folder = [folder.name], folder.parent
        else:
            has_weights = any((folder / weights).is_file() for weights in WEIGHT_FILES)
            graphs = [] if has_weights else sorted(graph.name for graph in folder.glob("*.onnx"))
        path = folder / "config.json"
        try:
            config = read_json(path) if path.exists() or not graphs else {}
        except FileNotFoundError as error:
            raise RunError(f"{folder}: has no config.json, so it is no checkpoint") from error
        except NotADirectoryError as error:
            raise RunError(f"{folder}: is a file; pass the checkpoint's folder") from error
        config.pop(GRAPHS_KEY, None)  # a name of ours, which no file has
        return cls(folder=folder, name=name, config=config | {GRAPHS_KEY: graphs} if graphs else config)

    def parse_config(self, parse: Callable[[Mapping[str, Any]], Config]) -> Config:
        """``parse(config)``; its errors then name the folder.

        Raises:
            RunError: ``parse`` refuses the configuration.
        """
        try:
            return parse(self.config)
        except RunError as error:
            raise RunError(f"{self.folder}: {error}") from error

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the tensors.

        Raises:
            RunError: there are none, or the index names a file that is absent.
        """
        return find_weight_files(self.folder)

    def preprocessor(self) -> Mapping[str, Any]:
        """``preprocessor_config.json``, or an empty mapping where there is none.

        Raises:
            RunError: it cannot be read, or is not a JSON object.
        """
        try:
            return read_json(self.folder / "preprocessor_config.json")
        except FileNotFoundError:
            return {}

    def tensors(self, strip: str = "") -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, one file after the other, mapped from disk and read only where they are touched.

        Args:
            strip: a prefix that exports of this family put before every name; removed where present.

        Raises:
            RunError: a file is truncated, corrupt or of another format.
        """
        for path in self.weight_files:
            names: list[str] | None = None
            while names is None or names:
                # Mapped pages count as this process's memory until the file is closed: open it anew now and then.
                with opened(path) as (stored, get):
                    names = stored if names is None else names
                    mapped = 0
                    while names and mapped < _MAPPED_BYTES:
                        name = names.pop(0)
                        tensor = get(name)
                        mapped += tensor.nbytes
                        yield name.removeprefix(strip), tensor
                        del tensor

    def names(self, strip: str = "") -> frozenset[str]:
        """Names of all tensors, without reading them."""
        return frozenset(name for name, _ in self.tensors(strip))

    def fingerprint(self, strip: str = "") -> str:
        """32 hexadecimal digits over the configuration and a sample of every tensor's bytes.

        The same weights give the same digest however they are split into files.
        """
        digests = {}
        for name, tensor in self.tensors(strip):
            data = tensor.detach().contiguous().flatten().view(torch.uint8)
            digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            step = max(len(data) // _BLOCKS, _BLOCK_BYTES)
            for start in range(0, len(data), step):
                digest.update(data[start : start + _BLOCK_BYTES].numpy().tobytes())
            digests[name] = digest.hexdigest()
        text = json.dumps([self.config, digests], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @contextmanager
    def bounded_model(self) -> Iterator[None]:
        """Builds models of about this checkpoint's size and no far larger ones, which would take memory and minutes.

        Raises:
            RunError: a model gets several times as many parameters, or numbers in them, as the checkpoint has.
        """
        sizes = [tensor.numel() for _, tensor in self.tensors()]
        # A task's part and the whole are built, and a weight norm replaces one parameter by two.
        room = [8 * len(sizes) + 1000, 8 * sum(sizes) + (1 << 20)]

        def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            room[0] -= 1
            room[1] -= 0 if parameter is None else parameter.numel()
            if min(room) < 0:
                raise RunError(
                    f"{self.folder}: config.json implies a far larger model than the {len(sizes)} tensors of "
                    f"{sum(sizes):,} numbers that are there"
                )

        handle = register_module_parameter_registration_hook(count)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def empty_weights(self) -> Iterator[None]:
        """``empty_weights`` for models of this checkpoint, ``bounded_model``."""
        with self.bounded_model(), empty_weights():
            yield

    def load(
        self,
        whole: nn.Module,
        part: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        strip: str = "",
        rename: Callable[[str], str | None] = lambda name: name,
    ) -> None:
        """Assigns the checkpoint's tensors to ``part``, after checking all of them against ``whole``.

        Args:
            whole: the complete model on the meta device; its names and shapes are what the checkpoint must have.
            part: the model to fill, on the meta device; it may lack some of ``whole``.
            dtype: of floating-point parameters; buffers stay as they are stored, in float32. None keeps parameters
                as they are stored.
            rename: published name to the model's name; None for a tensor that has no effect.

        Raises:
            RunError: tensors are missing, unexpected or of another shape, or a value is no finite number or does not
                fit into ``dtype``; the message names them.
        """
        model = whole.state_dict()
        expected = {name: tuple(tensor.shape) for name, tensor in model.items()}
        parameters = {name for name, _ in whole.named_parameters()}
        wanted = set(part.state_dict())
        state: dict[str, Tensor] = {}
        seen, unexpected = set(), []
        for stored, tensor in self.tensors(strip):
            name = rename(stored)
            if name is None:
                continue
            if name in seen:
                raise RunError(f"{self.folder}: has {stored} twice")
            if name not in expected:
                unexpected.append(stored)
                continue
            if tuple(tensor.shape) != expected[name]:
                raise RunError(
                    f"{self.folder}: {stored} has shape {tuple(tensor.shape)}, config.json implies {expected[name]}"
                )
            if model[name].is_floating_point() != tensor.is_floating_point():
                raise RunError(f"{self.folder}: {stored} is of {tensor.dtype}, must be of {model[name].dtype}")
            seen.add(name)
            if name in wanted:
                kept = dtype if name in parameters else torch.float32
                check_values(tensor, f"{self.folder}: {stored}", kept)
                state[name] = tensor.to(device, kept if tensor.is_floating_point() else None, copy=True)
        missing = sorted(expected.keys() - seen)
        if missing:
            raise RunError(f"{self.folder}: lacks {_some(missing)}, which config.json implies")
        if unexpected:
            raise RunError(f"{self.folder}: has {_some(sorted(unexpected))}, which config.json does not imply")
        part.load_state_dict(state, assign=True)


def check_values(tensor: Tensor, name: str, dtype: torch.dtype | None) -> None:
    """
    Raises:
        RunError: a value is NaN or infinite, or would be in ``dtype``; codes would come out, but mean nothing.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    least, most = (float(value) for value in tensor.aminmax())  # both NaN if a value is
    if not math.isfinite(least) or not math.isfinite(most):
        remedy = "choose --dtype float32, or " if tensor.dtype == torch.float16 else ""
        raise RunError(f"{name} has values that are NaN or infinite; {remedy}download the checkpoint again")
    if dtype is not None and max(-least, most) > torch.finfo(dtype).max:
        raise RunError(f"{name} has values that do not fit into {dtype}: choose --dtype bfloat16 or float32")


def _name(model_path: str) -> str:
    """The last component of ``--model_path``, without a revision."""
    path = Path(model_path).expanduser()
    return path.resolve().name if path.exists() else model_path.partition("@")[0].rpartition("/")[2]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
