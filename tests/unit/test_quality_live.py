"""Scoring beside a run: what is offered is scored without waiting, and only a threshold stops anything."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest
import soundfile

from batch_tokenizer.config import RunConfig
from batch_tokenizer.quality import live
from batch_tokenizer.quality.live import LiveQuality
from batch_tokenizer.records import ManifestRow, RunError, TokenizedRow

RATE = 16000


@pytest.fixture
def clip(tmp_path):
    samples = 0.1 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    return tmp_path / "a.wav", samples


def row(path, samples, key="a"):
    fields = {"key": key, "wav": str(path)}
    manifest_row = ManifestRow(0, "0" * 16, key, str(path), "a.json", "out.wav", fields)
    return TokenizedRow(manifest_row, np.zeros((25, 1), np.uint16), samples, len(samples))


def offer_all(quality, rows):
    for one in rows:
        quality.offer(one)
        while not quality._rows.empty():
            time.sleep(0.005)
    quality.close(30)


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    monkeypatch.setattr(live, "CHEAP_METRICS", ("si_sdr", "level_change", "clipped"))


def test_one_of_every_n_rows_is_scored_and_logged(clip, caplog):
    path, samples = clip
    with caplog.at_level(logging.INFO), LiveQuality(3, {}, RATE, RATE, "soxr") as quality:
        offer_all(quality, [row(path, samples / 2, f"r{number}") for number in range(7)])
        quality.check()
    lines = [record.message for record in caplog.records if record.message.startswith("quality of row")]
    assert [line.split()[3] for line in lines] == ["r0:", "r3:", "r6:"]
    assert "SI-SDR 100.0 dB, Level change -6.0 dB, Clipped 0.00 %" in lines[0]


def test_a_mean_below_the_threshold_stops_the_run_with_one_line(clip):
    path, samples = clip
    noise = np.random.default_rng(1).standard_normal(RATE).astype(np.float32)
    with LiveQuality(1, {"si_sdr": 3.0}, RATE, RATE, "soxr") as quality:
        offer_all(quality, [row(path, noise)] * 2)
        quality.check()  # two are too few to stop a run
        with pytest.raises(RunError, match="over the last 2 rows scored, up to a; look"):
            quality.check_at_end()  # but enough to judge one that is over
    with LiveQuality(1, {"si_sdr": 3.0}, RATE, RATE, "soxr") as quality:
        offer_all(quality, [row(path, noise, "last")] * 3)
        with pytest.raises(RunError, match=r"--stop_below si_sdr=3: SI-SDR is .* rows scored, up to last") as error:
            quality.check()
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    with LiveQuality(1, {"si_sdr": 3.0}, RATE, RATE, "soxr") as quality:
        offer_all(quality, [row(path, noise)] + [row(path, samples)] * 3)
        quality.check()


def test_trouble_with_a_row_is_told_and_the_next_is_scored(clip, caplog):
    path, samples = clip
    with caplog.at_level(logging.INFO), LiveQuality(1, {"si_sdr": 0.0}, RATE, RATE, "soxr") as quality:
        offer_all(
            quality,
            [
                row(path.with_name("gone.wav"), samples, "gone"),
                row(path, samples[:100], "half"),
                row(path, samples, "c"),
            ],
        )
        quality.check()
    messages = [record.message for record in caplog.records]
    assert any("gone" in line and "no such file" in line for line in messages)
    assert any("half" in line and "sample rate" in line for line in messages)
    assert any(line.startswith("quality of row c: SI-SDR 100") for line in messages)


def test_offering_never_waits_and_a_fault_ends_the_scoring_only(clip, monkeypatch, caplog):
    path, samples = clip

    offered = threading.Event()

    def slow_and_wrong(*words):
        offered.wait(300)
        raise ZeroDivisionError

    monkeypatch.setattr(live, "align", slow_and_wrong)
    with LiveQuality(1, {"si_sdr": 0.0}, RATE, RATE, "soxr") as quality:
        for _ in range(2000):  # while the first of them is being scored
            quality.offer(row(path, samples))
        offered.set()
        deadline = time.monotonic() + 300
        while "the run continues" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        quality.offer(row(path, samples))
        quality.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "wav2token", "evaluate_every": 5}, "wav2token2wav"),
        ({"task": "wav2token2wav", "stop_below": [("stoi", 0.5)]}, "--evaluate_every"),
        ({"task": "wav2token2wav", "evaluate_every": 5, "stop_below": [("loudness", 0.5)]}, "stoi"),
        ({"task": "wav2token2wav", "evaluate_every": -1}, "at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(RunError, match=message):
        RunConfig(data_list=tmp_path / "data.jsonl", **settings)
