"""Small checkpoints of any family by its name."""

from __future__ import annotations

from pathlib import Path

from tests.support import hf, padded_codecs
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.moss import tiny as tiny_moss
from tests.support.moss import write_moss_checkpoint
from tests.support.qwen3_tts import write_qwen3_tts_checkpoint
from tests.support.s3tokenizer import write_s3_checkpoint

STEREO = {"downsample_rate": 320, "number_channels": 2, "enable_channel_interleave": True}


def write(name: str, folder: Path) -> Path:
    """A small checkpoint of a family."""
    if name in hf.CONFIGS:
        hf.save_checkpoint(folder, name)
        return folder
    if name in padded_codecs.CONFIGS:
        return padded_codecs.write_checkpoint(folder, name)
    match name:
        case "mimo":
            return write_mimo_checkpoint(folder)
        case "s3tokenizer":
            return write_s3_checkpoint(folder, "v1")
        case "qwen3_tts":
            return write_qwen3_tts_checkpoint(folder)
        case _:
            return write_moss_checkpoint(folder, tiny_moss(**STEREO) if "stereo" in name else tiny_moss())
