"""Runs from sink to sink, as a user starts them: tokens and audio come out of shards as they went in."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

import numpy as np
import pytest
import soundfile

from batch_tokenizer.cli import main
from tests.e2e.conftest import Open
from tests.support.shards import read_shards


def test_tokens_go_through_every_sink_and_back_to_the_same_audio(
    open_workspace: Open, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """wav2token2wav to tar, those tokens to parquet without the model, and token2wav from there to flac in tars."""
    workspace = open_workspace(24)
    place, checkpoint = workspace.folder, workspace.corpus.checkpoint
    workspace.finish_here("--sink", "tar", "--output_dir", "tars", "--evaluate_every", 8)
    first = read_shards(place / "tars")
    assert sorted(first) == list(workspace.corpus.keys)
    for key, row in first.items():
        assert np.array_equal(row["codes"], json.loads(undisturbed[f"{key}.json"])["quantized_tokens"])
        assert row["audio"] == undisturbed[f"{key}.wav"]

    monkeypatch.chdir(place)
    run_dir = f"tars/{workspace.run_dir.name}"
    for words in (
        ("verify", "--data_list", "data.jsonl", "--run_dir", run_dir, "--model_path", str(checkpoint)),
        ("convert", run_dir, "--to", "parquet", "--out", "parquet", "--tokens_only"),
        (
            "--task", "token2wav", "--data_list", "parquet/*.parquet", "--model_path", str(checkpoint),
            "--run_dir", "back", "--sink", "tar", "--output_dir", "audio", "--audio_format", "flac",
            "--num_workers", "0",
        ),
    ):  # fmt: skip
        assert main(words) == 0
    back = read_shards(place / "audio")
    assert sorted(back) == sorted(first)
    for key, row in back.items():
        made, rate = soundfile.read(io.BytesIO(row["audio"]), dtype="int16")
        expected, _ = soundfile.read(io.BytesIO(undisturbed[f"{key}.wav"]), dtype="int16")
        assert rate == 24000
        assert np.array_equal(made, expected), key
