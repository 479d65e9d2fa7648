"""Hostile rows beside good ones: the run goes on, every good row comes out, every bad one is named with its reason."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
import soundfile

from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.command import batch_tokenizer, contents, failures, output_row, run_here, write_manifest


def tone(seconds, rate=24000, channels=1):
    time = np.arange(int(seconds * rate)) / rate
    return np.repeat((0.3 * np.sin(2 * np.pi * 440 * time))[:, None], channels, axis=1)


def float_wav(samples):
    """A 32-bit float wav of any values, infinities among them."""
    data = np.asarray(samples, "<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 24000, 96000, 4, 32)
    head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + struct.pack("<I", 16) + form
    return head + b"data" + struct.pack("<I", len(data)) + data


@pytest.fixture(scope="module")
def wav_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    audio, out = folder / "audio", folder / "out"
    audio.mkdir()
    good = {
        "mono": ("mono.wav", tone(0.5), 24000),
        "stereo": ("stereo.flac", tone(0.4, 44100, 2), 44100),
        "surround": ("5.1.wav", tone(0.3, 48000, 6), 48000),
        "unicode": ("猪八戒 é.ogg", tone(0.4, 16000), 16000),
        "one sample": ("one.wav", tone(1)[:1], 24000),
        "odd rate": ("odd.wav", tone(0.2, 44099), 44099),
    }
    for name, samples, rate in good.values():
        soundfile.write(audio / name, samples, rate)
    whole = (audio / "mono.wav").read_bytes()
    bad_files = {
        "empty file": b"",
        "junk": os.urandom(5000),
        "header only": whole[:20],
        "zero samples": whole[:40] + struct.pack("<I", 0),
        "nan": float_wav([0.1, np.nan, 0.1] * 300),
        "infinite": float_wav([0.1, np.inf, 0.1] * 300),
        "text": b"not audio at all",
    }
    for key, content in bad_files.items():
        (audio / f"{key}.wav").write_bytes(content)
    (audio / "folder.wav").mkdir()
    os.mkfifo(audio / "fifo.wav")
    (out / "is a folder.json").mkdir(parents=True)

    rows = [output_row(key, audio / name, out) for key, (name, *_) in good.items()]
    rows += [output_row(key, audio / f"{key}.wav", out) for key in (*bad_files, "folder", "fifo", "missing")]
    first = rows[0]["wav"]
    rows += [
        output_row("is a folder", first, out),
        {**output_row("no wav", first, out), "wav": None},
        {k: v for k, v in output_row("no tokens field", first, out).items() if k != "quantized_tokens"},
        {**output_row("number", first, out), "wav": 7},
        output_row("mono", first, folder / "elsewhere"),
        {**output_row("same output", first, out), "quantized_tokens": str(out / "mono.json")},
        {**output_row("not a folder", first, out), "quantized_tokens": first + "/x.json"},
        b'{"key": "torn", "wav": "a.wav"',
        b'["a", "list"]',
        b"\xff\xfe",
        b"",
        {"wav": first},
    ]
    manifest = write_manifest(folder / "data.jsonl", rows)
    model = write_mimo_checkpoint(folder / "model")
    done = batch_tokenizer(
        "--model_path", model, "--data_list", manifest, "--task", "wav2token2wav", "--run_dir", folder / "run"
    )
    return folder, good, done


def test_every_good_row_comes_out(wav_run):
    folder, good, done = wav_run
    assert done.returncode == 0, done.stderr
    files = contents(folder / "out")
    assert set(files) == {f"{key}.{kind}" for key in good for kind in ("json", "wav")}
    for key in good:
        document = json.loads(files[f"{key}.json"])
        samples = soundfile.info(folder / "out" / f"{key}.wav").frames
        assert samples == len(document["quantized_tokens"]) * 960
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("key", "stage", "reason"),
    [
        ("empty file", "load", "empty"),
        ("junk", "load", "junk.wav"),
        ("text", "load", "text.wav"),
        ("header only", "load", "header only.wav"),
        ("zero samples", "load", "no samples|zero samples|empty"),
        ("nan", "load", "NaN|finite"),
        ("infinite", "load", "infin|finite"),
        ("folder", "load", "folder|directory"),
        ("fifo", "load", "regular file|pipe|fifo"),
        ("missing", "load", "no such file|missing|not there|does not exist"),
        ("is a folder", "write", "folder|directory"),
        ("not a folder", "write", "folder|directory"),
        ("no wav", "manifest", "wav"),
        ("no tokens field", "manifest", "quantized_tokens"),
        ("number", "manifest", "wav"),
        ("same output", "manifest", "mono.json"),
        ("mono", "manifest", "duplicate key"),
    ],
)
def test_every_bad_row_is_named(wav_run, key, stage, reason):
    import re

    folder, _, _ = wav_run
    failed = failures(folder / "run")
    assert failed[key]["stage"] == stage
    assert re.search(reason, failed[key]["reason"], re.IGNORECASE), failed[key]["reason"]
    assert "\n" not in failed[key]["reason"]


def test_rows_without_a_key_are_named_by_their_line(wav_run):
    folder, good, done = wav_run
    lines = [json.loads(line) for line in (folder / "run" / "failures.jsonl").read_text().splitlines()]
    total = len((folder / "data.jsonl").read_bytes().splitlines()) - 1
    assert len(lines) == total - len(good)
    assert len({row["line"] for row in lines}) == len(lines)
    assert f"{len(good)} rows done, {len(lines)} failed, 0 to do" in done.stdout
    assert sum(row["key"] is None for row in lines) >= 3


def test_strict_and_all_failed_end_in_status_one(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.2), 24000)
    model = write_mimo_checkpoint(tmp_path / "model")
    rows = [
        output_row("a", tmp_path / "a.wav", tmp_path / "out"),
        output_row("b", tmp_path / "b.wav", tmp_path / "out"),
    ]
    mixed = write_manifest(tmp_path / "mixed.jsonl", rows)
    assert run_here("--model_path", model, "--data_list", mixed, "--strict", "--num_workers", 0).returncode == 1
    bad = write_manifest(tmp_path / "bad.jsonl", rows[1:])
    done = run_here("--model_path", model, "--data_list", bad, "--num_workers", 0)
    assert done.returncode == 1
    assert "0 rows done, 1 failed" in done.stdout


def test_hostile_token_files(tmp_path):
    model = write_mimo_checkpoint(tmp_path / "model")  # 5 codebooks: 32, then 16 each
    tokens, out = tmp_path / "tokens", tmp_path / "out"
    tokens.mkdir()
    frame = [31, 15, 0, 1, 2]
    documents = {
        "good": {"quantized_tokens": [frame] * 4},
        "fewer codebooks": {"quantized_tokens": [frame[:2]] * 4},
        "ragged": {"quantized_tokens": [frame, frame[:4]]},
        "negative": {"quantized_tokens": [frame, [0, -1, 0, 0, 0]]},
        "out of range": {"quantized_tokens": [frame, [0, 16, 0, 0, 0]]},
        "too many codes": {"quantized_tokens": [[*frame, 3]]},
        "no frames": {"quantized_tokens": []},
        "floats": {"quantized_tokens": [[0.5] * 5]},
        "strings": {"quantized_tokens": [["1"] * 5]},
        "no field": {"tokens": [frame]},
        "other codec": {"quantized_tokens": [frame], "info": {"codec": "moss", "fingerprint": "0" * 32}},
    }
    for key, document in documents.items():
        (tokens / f"{key}.json").write_text(json.dumps(document))
    (tokens / "torn.json").write_text('{"quantized_tokens": [[1, 2')
    keys = [*documents, "torn", "missing"]
    rows = [
        {"key": key, "quantized_tokens": str(tokens / f"{key}.json"), "reconstructed_wav": str(out / f"{key}.wav")}
        for key in keys
    ]
    manifest = write_manifest(tmp_path / "data.jsonl", rows)
    done = run_here(
        "--model_path", model, "--data_list", manifest, "--task", "token2wav", "--run_dir", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert set(contents(out)) == {"good.wav", "fewer codebooks.wav"}
    failed = failures(tmp_path / "run")
    assert set(failed) == set(keys) - {"good", "fewer codebooks"}
    assert all(row["stage"] == "load" and row["reason"] for row in failed.values())
    assert "moss" in failed["other codec"]["reason"]
