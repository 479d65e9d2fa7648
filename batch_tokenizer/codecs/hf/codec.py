"""One adapter for the codecs of transformers: Mimi, EnCodec, DAC, X-Codec, X-Codec 2, Higgs Audio v2, NeuCodec.

The library is imported when a checkpoint of it is opened, which takes seconds, and never in loader workers.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batch_tokenizer.codecs.base import Batching, CodecInfo, CodecSpec
from batch_tokenizer.codecs.checkpoint import Checkpoint, check_values
from batch_tokenizer.codecs.config_keys import MOST_COUNT, MOST_SIZE, ConfigKeys
from batch_tokenizer.codecs.hf.exact import replace_convolutions
from batch_tokenizer.codecs.hf.families import KINDS, MOST_SAMPLES, WITHOUT_TOKENS, ModelKind
from batch_tokenizer.codecs.hf.lengths import Chunks, Lengths, PaddedConvs
from batch_tokenizer.codecs.layers.padded import PaddedBatch
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.memory import is_out_of_memory
from batch_tokenizer.codecs.padded_codec import Codes, PaddedCodec
from batch_tokenizer.records import RunError, first_line

log = logging.getLogger(__name__)

#: ``--attention`` to the library's name; ``auto`` leaves the choice to the library.
_ATTENTION = {"sdpa": "sdpa", "reference": "eager", "flash_attn": "flash_attention_2"}

#: Greatest number in a configuration; the bases of rotary angles are among the greatest.
_MOST_NUMBER = 1 << 20

#: Codes are stored as uint16.
_LARGEST_CODEBOOK = 1 << 16


def recognises(config: Mapping[str, Any]) -> bool:
    """By ``model_type``. Asks the library itself, if it is installed, only about types that no other family has."""
    kind = config.get("model_type")
    return isinstance(kind, str) and (kind in KINDS or kind in WITHOUT_TOKENS or _is_audio_tokenizer(kind))


def _is_audio_tokenizer(kind: str) -> bool:
    try:
        names = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_AUDIO_TOKENIZATION_NAMES
    except (ImportError, AttributeError):  # not installed, or a version without audio tokenizers
        return False
    return kind in names


@dataclass(frozen=True)
class HfSpec(CodecSpec):
    """A checkpoint of transformers without its weights. Features are (1, L), as ``lengths`` makes them.

    Attributes:
        kind: its ``model_type``.
        batching: ``padded`` where a batch of mixed lengths is exact (``hf/exact.py``), else ``equal lengths``.
        channels: of the model; the one channel of our audio goes into all of them, and decoded ones are averaged.
    """

    info: CodecInfo
    #: The library looks codes up in the model's own dtype, where 16 bits change many of them.
    cuda_dtype: ClassVar[Literal["float32", "bfloat16"]] = "float32"

    kind: str
    lengths: Lengths
    channels: int
    batching: Batching

    def features(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return self.lengths.features(samples)

    def is_feature_length(self, length: int) -> bool:
        return length >= 1 and self.lengths.takes(length)

    def num_frames(self, num_samples: int) -> int:
        return self.lengths.frames(self.lengths.input_length(num_samples))

    def num_output_samples(self, num_frames: int) -> int:
        return self.lengths.output_samples(num_frames)


def open_spec(checkpoint: Checkpoint) -> HfSpec:
    """Reads the configuration with the library, and samples the weights for the fingerprint.

    Raises:
        RunError: the library is not installed or does not have this model, the model has no tokens, or
            ``config.json`` or the weights are not as they should be.
    """
    kind_name = str(checkpoint.config.get("model_type"))
    if kind_name in WITHOUT_TOKENS:
        raise RunError(f"{checkpoint.folder}: {WITHOUT_TOKENS[kind_name]}, not tokens; it cannot be used here")
    if kind_name not in KINDS:
        raise RunError(
            f"{checkpoint.folder}: transformers knows {kind_name} as an audio tokenizer, but how it is called is not "
            f"known here; known: {', '.join(KINDS)}"
        )
    kind = KINDS[kind_name]
    config = _read_config(checkpoint, kind)
    settings = checkpoint.preprocessor()
    try:
        lengths = kind.lengths(config, settings)
        input_rate, output_rate = kind.sample_rates(config)
        sizes = kind.codebook_sizes(config)
        if not 1 <= lengths.hop <= MOST_SIZE:
            raise RunError(f"config.json: a frame has {lengths.hop:.6g} samples, must have 1 to {MOST_SIZE}")
        for num_samples in (1, *range(8 * lengths.hop, 9 * lengths.hop)):  # lengths repeat themselves with each frame
            lengths.input_length(num_samples)
        channels = int(getattr(config, "audio_channels", 1))
    except RunError as error:
        raise RunError(f"{checkpoint.folder}: {error}") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise RunError(f"{checkpoint.folder}: config.json is of no usable {kind_name}: {first_line(error)}") from error
    if not sizes or max(sizes) > _LARGEST_CODEBOOK:
        raise RunError(f"{checkpoint.folder}: codebooks must have 1 to {_LARGEST_CODEBOOK} codes; they have {sizes}")
    if settings.get("sampling_rate", input_rate) != input_rate:
        raise RunError(
            f"{checkpoint.folder}: config.json says {input_rate} Hz, preprocessor_config.json "
            f"{settings['sampling_rate']} Hz"
        )
    fingerprinted = checkpoint
    if lengths.multiple > 1:  # another file says so, and tokens depend on it
        fingerprinted = replace(checkpoint, config={**checkpoint.config, "padded_to_multiple_of": lengths.multiple})
    info = CodecInfo(
        family=kind_name,
        name=checkpoint.name,
        sample_rate=input_rate,
        samples_per_frame=lengths.hop,
        codebook_sizes=sizes,
        fingerprint=fingerprinted.fingerprint(),
        max_samples=MOST_SAMPLES if kind.limited and isinstance(lengths, PaddedConvs) else None,
        decoded_sample_rate=None if output_rate == input_rate else output_rate,
    )
    batching: Batching = "padded" if kind.replaced and kind.mixed_lengths(config) else "equal lengths"
    return HfSpec(info=info, kind=kind_name, lengths=lengths, channels=channels, batching=batching)


def blank_model(config: Mapping[str, Any]) -> Any:
    """The library's model of a configuration, whose tensors have no trained values."""
    model_class = getattr(importlib.import_module("transformers"), KINDS[config["model_type"]].model_class)
    settings = {name: value for name, value in config.items() if name != "model_type"}
    return model_class(model_class.config_class(**settings))


def load_codec(request: LoadRequest[HfSpec]) -> HfCodec:
    """The whole model, encoder and decoder, whatever the task.

    Raises:
        RunError: the library or the checkpoint cannot be used; the message names what is wrong.
    """
    checkpoint, spec = request.checkpoint, request.spec
    kind = KINDS[spec.kind]
    library = _library(checkpoint)
    _needs(checkpoint, "encoder", request.task != "token2wav")
    _needs(checkpoint, "decoder", request.task != "wav2token")
    if isinstance(spec.lengths, Chunks) and request.dtype != torch.float32:
        raise RunError(
            f"{checkpoint.folder}: transformers joins this codec's chunks in float32 only; pass --dtype float32"
        )
    chosen: dict[str, Any] = {}
    if request.attention != "auto":
        if request.attention not in _ATTENTION:
            raise RunError(
                f"--attention {request.attention}: transformers has no such backend; choose {', '.join(_ATTENTION)}"
            )
        chosen["attn_implementation"] = _ATTENTION[request.attention]
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    try:
        with checkpoint.bounded_model():
            model, report = _class(library, kind.model_class, checkpoint).from_pretrained(
                checkpoint.folder, local_files_only=True, dtype=request.dtype, output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **chosen,
            )  # fmt: skip
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, ImportError, NameError) as error:
        raise RunError(f"{checkpoint.folder}: transformers cannot load it: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise RunError(f"{checkpoint.folder}: lacks {names}, which config.json implies; download it again")
    for name, stored, implied in sorted(report["mismatched_keys"]):
        raise RunError(
            f"{checkpoint.folder}: {name} has shape {tuple(stored)}, config.json implies {tuple(implied)}; download it "
            f"again"
        )
    for name, tensor in model.state_dict().items():
        check_values(tensor, f"{checkpoint.folder}: {name}", None)
    if kind.front_end is not None:
        _check_front_end(checkpoint, spec, _class(library, kind.front_end, checkpoint))
    if spec.channels > 1:
        log.info(
            "the model has %d channels: each gets the mean of the file's, and decoded ones are averaged", spec.channels
        )
    if request.dtype != torch.float32:
        log.warning(
            "%s in %s: transformers also looks up codes in that format, so many tokens differ from float32's; "
            "pass --dtype float32 for the published ones",
            spec.kind,
            str(request.dtype).removeprefix("torch."),
        )
    codec = HfCodec(spec, model.to(request.device).eval().requires_grad_(False), request.threads)
    how = spec.batching if codec.batch_frames else "one by one"
    log.info("transformers %s: %s, encoder and decoder loaded; batches: %s", library.__version__, kind.model_class, how)
    return codec


class HfCodec(PaddedCodec):
    """A model of transformers behind the codec protocol.

    Where the model allows it, its convolutions are replaced by exact ones, and batches have mixed lengths. Else only
    utterances of one length share a batch. On a CPU each utterance is computed alone.
    """

    spec: HfSpec

    def __init__(self, spec: HfSpec, model: Any, threads: int = 1) -> None:
        # On a CPU each utterance goes alone, for the library's own bits: a batch rounds in another way, which changes
        # one code in some hundred thousand, where two codebook rows are equally near.
        equal_lengths = spec.batching != "padded"
        super().__init__(spec, model, model.device, threads, parameters=None, equal_lengths=equal_lengths)
        self._kind: ModelKind = KINDS[spec.kind]
        parts = [getattr(model, name) for name in self._kind.replaced]
        self._lengths = replace_convolutions([part for part in parts if part is not None])

    def frames_of(self, length: int) -> int:
        return self.spec.lengths.feature_frames(length)

    def encode_padded(self, batch: PaddedBatch, num_quantizers: int) -> Tensor:
        samples, *others = self.spec.lengths.inputs(batch.values)
        spread = samples.to(self.model.dtype).expand(-1, self.spec.channels, -1)
        with self._lengths.of(batch), self._failures():
            codes = self._kind.encode(self.model, spread, num_quantizers, *others)
        self._expect("frames", codes.shape[1], self.frames_of(batch.size))
        return codes

    def decode_padded(self, codes: PaddedBatch, utterances: Sequence[Codes]) -> Tensor:
        with self._lengths.of(codes), self._failures():
            audio = self._kind.decode(self.model, codes.values.mT).float()
        audio = audio.reshape(len(audio), -1, audio.shape[-1]).mean(1)
        self._expect("samples", audio.shape[-1], self.spec.num_output_samples(codes.size))
        return audio

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """The library does not check what its layers are made of, such as a dilation of 0, before it computes."""
        try:
            yield
        except (RuntimeError, ValueError, LookupError) as error:
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            raise RunError(
                f"{self.spec.info.name}: transformers cannot compute with it: {first_line(error)}"
            ) from error

    def _expect(self, what: str, found: int, expected: int) -> None:
        if found != expected:
            raise RunError(
                f"{self.spec.info.name}: the model made {found} {what} where its configuration implies {expected}; "
                f"this version of transformers computes {self.spec.kind} in another way than is known here"
            )


def _check_front_end(checkpoint: Checkpoint, spec: HfSpec, extractor_class: Any) -> None:
    """Compares the features of loader workers with those of the library's own extractor, on a short noise.

    Raises:
        RunError: they are others, as of a version or with settings that are not known here.
    """
    if checkpoint.preprocessor():
        extractor = extractor_class.from_pretrained(checkpoint.folder, local_files_only=True)
    else:
        extractor = extractor_class(sampling_rate=spec.info.sample_rate, hop_length=spec.info.samples_per_frame)
    samples = np.random.default_rng(0).normal(0, 0.1, spec.lengths.input_length(1000)).astype(np.float32)
    theirs = extractor(samples, sampling_rate=spec.info.sample_rate, return_tensors="pt")
    ours = spec.lengths.inputs(torch.from_numpy(spec.features(samples)[None]))
    for name, tensor in zip(("input_values", "input_features", "input_features_mask"), ours, strict=True):
        if theirs[name].shape != tensor.shape or not torch.allclose(theirs[name].to(tensor), tensor, atol=1e-4):
            raise RunError(
                f"{checkpoint.folder}: its feature extractor (preprocessor_config.json, in this version of "
                f"transformers) makes other {name} than are known here"
            )


def _library(checkpoint: Checkpoint) -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise RunError(
            f"{checkpoint.folder}: {checkpoint.config.get('model_type')} runs on the transformers library, which is "
            f"not installed: pip install 'batch_tokenizer[transformers]' ({first_line(error)})"
        ) from error


def _class(library: ModuleType, name: str, checkpoint: Checkpoint) -> Any:
    try:
        return getattr(library, name)
    except (AttributeError, ImportError, RuntimeError) as error:
        raise RunError(
            f"{checkpoint.folder}: transformers {library.__version__} has no usable {name} ({first_line(error)}); "
            f"install a newer one: pip install -U transformers"
        ) from error


def _read_config(checkpoint: Checkpoint, kind: ModelKind) -> Any:
    config_class = _class(_library(checkpoint), kind.model_class, checkpoint).config_class
    from huggingface_hub.errors import StrictDataclassError

    try:
        _check_numbers(checkpoint.config, config_class().to_dict(), "")
        return config_class.from_pretrained(checkpoint.folder, local_files_only=True)
    except RunError as error:
        raise RunError(f"{checkpoint.folder}: {error}") from error
    except (
        StrictDataclassError, OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, MemoryError,
        RecursionError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]  # the first line alone does not say what is wrong
        raise RunError(f"{checkpoint.folder}: transformers refuses config.json: {reason}") from error


def _check_numbers(config: Mapping[str, Any], known: Mapping[str, Any], place: str) -> None:
    """Bounds for the numbers under the keys that the library's class has, which takes any.

    Raises:
        RunError: a list is too long, or a number is beyond ``_MOST_NUMBER`` or not finite.
    """
    for key in sorted(config.keys() & known.keys()):
        value = config[key]
        if isinstance(value, Mapping) and isinstance(known[key], Mapping):
            _check_numbers(value, known[key], f"{place}{key}.")
            continue
        listed = value if isinstance(value, list) else [value]
        if len(listed) > MOST_COUNT:
            raise ConfigKeys(config, place).wrong(key, f"must not have more than {MOST_COUNT} entries")
        if not all(abs(item) <= _MOST_NUMBER for item in listed if isinstance(item, (int, float))):
            raise ConfigKeys(config, place).wrong(key, f"must not be beyond {_MOST_NUMBER}")


def _needs(checkpoint: Checkpoint, half: str, needed: bool) -> None:
    """Mimi checkpoints may come without one half."""
    if needed and checkpoint.config.get("model_type") == "mimi" and checkpoint.config.get(f"{half}_config", {}) is None:
        raise RunError(f"{checkpoint.folder}: has no {half} ({half}_config is null), which this task needs")
