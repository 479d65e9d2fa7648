"""What ``--model_path`` may be: folders with a codec's folder inside, hub ids with a folder and a revision."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.records import RunError


class Hub:
    """A hub with one repository; it takes note of what is asked for."""

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        self.folder, self.names = folder, names
        self.asked: list[tuple[str, str | None]] = []
        self.given: set[str] = set()

    def snapshot_download(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repository, revision))
        for name, text in self.names.items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                self.given.add(name)
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text(text)
        return str(self.folder)


CODEC = json.dumps({"model_type": "codec"})
MODEL = json.dumps({"model_type": "language_model"})
LANGUAGE_MODEL = {
    "config.json": MODEL,
    "model.safetensors": "large",
    "speech_tokenizer/config.json": CODEC,
    "speech_tokenizer/model.safetensors": "small",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(names: dict[str, str]) -> Hub:
        made = Hub(tmp_path / "cache", names)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        monkeypatch.chdir(tmp_path)
        return made

    return make


@pytest.mark.parametrize("inner", ["speech_tokenizer", "audio_tokenizer"])
def test_folder_of_a_language_model(tmp_path, inner):
    (tmp_path / "model" / inner).mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text(MODEL)
    (tmp_path / "model" / inner / "config.json").write_text(CODEC)
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    assert (checkpoint.config["model_type"], checkpoint.folder.name, checkpoint.name) == ("codec", inner, "model")


@pytest.mark.parametrize(
    ("asked", "revision", "name"),
    [
        ("owner/name", None, "name"),
        ("owner/name@v1.0", "v1.0", "name"),
        ("owner/name@refs/pr/3", "refs/pr/3", "name"),
        ("owner/name/speech_tokenizer", None, "speech_tokenizer"),
        ("owner/name/speech_tokenizer@main", "main", "speech_tokenizer"),
    ],
)
def test_hub_gives_the_codec_and_not_the_language_model(hub, asked, revision, name):
    place = hub(LANGUAGE_MODEL)
    checkpoint = Checkpoint.open(asked)
    assert (checkpoint.config["model_type"], checkpoint.name) == ("codec", name)
    assert set(place.asked) == {("owner/name", revision)}
    assert "model.safetensors" not in place.given
    assert "speech_tokenizer/model.safetensors" in place.given


def test_hub_without_an_inner_folder(hub):
    place = hub({"config.json": CODEC, "model.safetensors": "weights"})
    assert Checkpoint.open("owner/name").config["model_type"] == "codec"
    assert place.given == {"config.json", "model.safetensors"}
    with pytest.raises(RunError, match="owner/name has no folder codec"):
        Checkpoint.open("owner/name/codec")


@pytest.mark.parametrize("asked", ["name", "/no/where", "owner/name@", "owner/na me"])
def test_neither_a_folder_nor_a_hub_id(asked):
    with pytest.raises(RunError, match="no such folder, and not a hub id"):
        Checkpoint.open(asked)
