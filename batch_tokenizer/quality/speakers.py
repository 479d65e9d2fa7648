"""Speaker embeddings of samples at 16 kHz. Which model makes them is part of every result.

WavLM's speaker-verification model is what publications use, and it needs a download; resemblyzer has its weights in its
wheel and gives higher cosines for the same audio. The two must not be compared with each other.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from batch_tokenizer.records import first_line

#: The model that publications use, taken from the local cache of the hub if it is there.
WAVLM = "microsoft/wavlm-base-plus-sv"

_RATE = 16000

#: Seconds of speech that an embedding needs.
_LEAST_SECONDS = 0.4

_RESEMBLYZER_REMEDY = (
    "pip install 'batch_tokenizer[quality]' && pip install --no-deps resemblyzer (its voice detector comes from "
    "webrtcvad-wheels), or --speaker_model FOLDER with a copy of " + WAVLM
)

#: Samples (S,) at 16 kHz to an embedding, or None where there is too little speech.
SpeakerModel = Callable[[npt.NDArray[np.float32]], "npt.NDArray[np.float32] | None"]


class Unavailable(Exception):
    """A metric cannot run on this machine as it is set up; the message gives the remedy."""


@dataclass(frozen=True, slots=True)
class SpeakerEncoder:
    """A speaker model that was chosen, not loaded yet.

    Attributes:
        name: ``resemblyzer``, or a hub id or folder of a transformers x-vector model.
        available: whether it seems to be here.
    """

    name: str
    available: bool

    @classmethod
    def choose(cls, wanted: str) -> SpeakerEncoder:
        """``auto`` is WavLM if the hub's cache has it, else resemblyzer; anything else is a name as above."""
        if wanted not in ("auto", "resemblyzer"):
            return cls(wanted, True)
        if wanted == "auto" and _is_cached(WAVLM):
            return cls(WAVLM, True)
        needed = ("resemblyzer", "webrtcvad", "librosa")
        return cls("resemblyzer", all(importlib.util.find_spec(name) is not None for name in needed))

    def load(self) -> SpeakerModel:
        """
        Raises:
            Unavailable: its library or weights are not here.
        """
        return _load_resemblyzer() if self.name == "resemblyzer" else _load_xvector(self.name)


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)


def _load_resemblyzer() -> SpeakerModel:
    try:
        from resemblyzer import VoiceEncoder, preprocess_wav
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"resemblyzer cannot be imported ({error}); {_RESEMBLYZER_REMEDY}") from error
    encoder = VoiceEncoder("cpu", verbose=False)

    def embed(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        speech = preprocess_wav(samples)  # levelled, pauses cut
        if len(speech) < _LEAST_SECONDS * _RATE:
            return None
        return np.asarray(encoder.embed_utterance(speech), np.float32)

    return embed


def _load_xvector(name: str) -> SpeakerModel:
    try:
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        here = Path(name).is_dir()
        extractor = AutoFeatureExtractor.from_pretrained(name, local_files_only=here or name == WAVLM)
        model = AutoModelForAudioXVector.from_pretrained(name, local_files_only=here or name == WAVLM).eval()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise Unavailable(f"--speaker_model {name} cannot be loaded ({reason})") from error

    def embed(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        if len(samples) < _LEAST_SECONDS * _RATE:
            return None
        inputs = extractor(samples, sampling_rate=_RATE, return_tensors="pt")
        with torch.inference_mode():
            return np.asarray(model(**inputs).embeddings[0].numpy(), np.float32)

    return embed
