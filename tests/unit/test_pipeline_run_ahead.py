"""A codec that runs ahead: the next batch is begun before the last is waited for, and nothing of it is lost."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from batch_tokenizer.codecs.base import Codec, Computed
from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.opening import CodecSetup, with_front_end
from batch_tokenizer.commands.bench_workload import FreeSpec, write_manifest
from batch_tokenizer.config import RunConfig
from batch_tokenizer.pipeline.run import run_job
from batch_tokenizer.pipeline.setup import RunContext
from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.devices import ComputeDevice, choose_device
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.signals import StopRequest

SAMPLES = 9600  # ten frames
FRAMES = 10


@dataclass
class Device:
    """What happened, in order, and how much fits into one batch."""

    most_frames: int = 10**6
    fails_at: int | None = None  # the batch that the device dies of
    events: list[tuple[str, int]] = field(default_factory=list)
    begun: int = 0


class AheadCodec(Codec):
    """Codes tell the row: every code is its first sample. Each batch has a number."""

    runs_ahead = True

    def __init__(self, device: Device) -> None:
        self.spec = FreeSpec()
        self.frame_budget = 1000
        self.device = device

    def begin(self, task: str, inputs: Sequence[np.ndarray], num_quantizers: int) -> AheadComputation:
        frames = sum(self.spec.num_frames(part.shape[1]) for part in inputs) if task != "token2wav" else 0
        if frames > self.device.most_frames:
            self.device.events.append(("full", frames))
            raise torch.OutOfMemoryError("no memory")
        number, self.device.begun = self.device.begun, self.device.begun + 1
        self.device.events.append(("begin", number))
        return AheadComputation(self, task, list(inputs), num_quantizers, number)

    def encode_batch(self, features: Any, num_quantizers: int) -> Any:
        raise AssertionError("a codec that runs ahead is not asked to wait")

    def decode_batch(self, codes: Any) -> Any:
        raise AssertionError("a codec that runs ahead is not asked to wait")


class AheadComputation:
    def __init__(self, codec: AheadCodec, task: str, inputs: list[np.ndarray], num_quantizers: int, number: int):
        self.codec, self.task, self.inputs = codec, task, inputs
        self.num_quantizers, self.number = num_quantizers, number

    def finish(self) -> Computed:
        device, spec = self.codec.device, self.codec.spec
        device.events.append(("finish", self.number))
        if self.number == device.fails_at:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore of it")
        codes = [
            part if self.task == "token2wav"
            else np.full((spec.num_frames(part.shape[1]), self.num_quantizers), round(1000 * part[0, 0]), np.uint16)
            for part in self.inputs
        ]  # fmt: skip
        samples = None
        if self.task != "wav2token":
            samples = [np.full(spec.num_output_samples(len(code)), code[0, 0] / 1000, np.float32) for code in codes]
        return Computed(codes, samples, {"encode": 0.25})


@dataclass
class AheadFamily:
    device: Device

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return False

    def open_spec(self, checkpoint: Checkpoint) -> FreeSpec:
        return FreeSpec()

    def load_codec(self, request: LoadRequest[Any]) -> Codec:
        return AheadCodec(self.device)


def run_rows(folder: Path, device: Device, count: int, **settings: Any) -> tuple[int, Mapping[str, Any]]:
    """A run over ``count`` rows of which number n has samples of n/1000; its exit status and summary."""
    wavs = []
    for number in range(count):
        wavs.append(folder / f"{number}.wav")
        soundfile.write(wavs[-1], np.full(SAMPLES, number / 1000, np.float32), 24000, subtype="FLOAT")
    manifest = write_manifest(folder / "data.jsonl", wavs, folder / "out", folder / "out")
    config = RunConfig(data_list=manifest, task="wav2token2wav", num_workers=0, **{"batch_size": 4, **settings})
    family = AheadFamily(device)
    codec = CodecSetup.open(Checkpoint(folder=folder, name="free", config={}), family, device="cpu")
    with StopRequest() as stop:
        context = RunContext(config, ProcessGroup.from_environment({}), codec, 8, stop, time.monotonic())
        status = run_job(context)
    return status, json.loads(((config.run_dir or config.default_run_dir()) / "summary.json").read_text())


def check_rows(folder: Path, count: int) -> None:
    for number in range(count):
        codes = json.loads((folder / "out" / f"{number:06d}.json").read_text())["quantized_tokens"]
        assert np.shape(codes) == (FRAMES, 8)
        assert np.unique(codes) == number
        samples, _ = soundfile.read(folder / "out" / f"{number:06d}.wav")
        np.testing.assert_allclose(samples, number / 1000, atol=1e-4)


def test_a_batch_is_begun_before_the_one_before_it_is_waited_for(tmp_path: Path) -> None:
    device = Device()
    status, summary = run_rows(tmp_path, device, 14)
    assert status == 0
    assert summary["done"] == 14
    check_rows(tmp_path, 14)
    starts = {number: place for place, (what, number) in enumerate(device.events) if what == "begin"}
    ends = {number: place for place, (what, number) in enumerate(device.events) if what == "finish"}
    assert len(starts) == len(ends) >= 4
    for number in range(1, len(starts)):
        assert starts[number] < ends[number - 1] < ends[number]
        assert number < 2 or ends[number - 2] < starts[number]  # never more than two at once
    assert summary["rtf_per_stage"]["encode"] == pytest.approx(0.25 * len(ends) / (14 * SAMPLES / 24000), rel=1e-3)


@pytest.mark.parametrize("most_frames", [2 * FRAMES, FRAMES])
def test_what_does_not_fit_is_halved_and_the_batch_before_it_is_kept(tmp_path: Path, caplog, most_frames: int) -> None:
    device = Device(most_frames=most_frames)
    status, summary = run_rows(tmp_path, device, 14)
    assert (status, summary["done"], summary["failed"]) == (0, 14, 0)
    check_rows(tmp_path, 14)
    budgets = [int(words[1]) for words in re.findall(r"(frame budget now) (\d+)", caplog.text)]
    assert budgets
    assert set(budgets) <= {1000 >> times for times in range(1, 10)}, "halved, and nothing else"
    assert sum(what == "full" for what, _ in device.events) <= 4, "later batches keep to the smaller budget"
    assert {what for what, _ in device.events} == {"full", "begin", "finish"}


def test_a_row_that_does_not_fit_alone_fails_and_no_other(tmp_path: Path) -> None:
    device = Device(most_frames=FRAMES - 1)
    status, summary = run_rows(tmp_path, device, 3)
    assert (status, summary["failed"]) == (1, 3)
    failures = [json.loads(line) for line in Path(summary["failures"]).read_text().splitlines()]
    assert all("does not fit in memory, even alone" in failure["reason"] for failure in failures)


def test_a_device_that_dies_ends_the_run_in_a_line_and_rows_before_are_kept(tmp_path: Path) -> None:
    device = Device(fails_at=2)
    with pytest.raises(RunError, match=r"the device failed \(CUDA error: an illegal memory access was encountered\)"):
        run_rows(tmp_path, device, 14)
    device.fails_at = None
    status, summary = run_rows(tmp_path, device, 14)
    assert (status, summary["done"]) == (0, 14)
    check_rows(tmp_path, 14)
    # Four batches of four rows, of which the first two were not computed again.
    assert sum(what == "begin" for what, _ in device.events) <= 4 + 3


def test_the_front_end_is_where_it_was_asked_for() -> None:
    class DeviceSpec(FreeSpec):
        def with_device_front_end(self) -> FreeSpec:
            return FreeSpec(info=self.info)

    host, both = FreeSpec(), DeviceSpec()
    cpu = choose_device("cpu", "auto", 0)
    cuda = ComputeDevice(torch.device("cuda", 0), torch.bfloat16, 8, "")
    assert with_front_end(both, "auto", cpu) is both
    assert with_front_end(both, "host", cuda) is both
    assert type(with_front_end(both, "auto", cuda)) is FreeSpec
    assert type(with_front_end(both, "device", cpu)) is FreeSpec
    assert with_front_end(host, "auto", cuda) is host
    with pytest.raises(RunError, match="--front_end device"):
        with_front_end(host, "device", cuda)


@pytest.mark.parametrize(("device", "asked", "expected"), [
    ("cpu", None, 64), ("cuda", None, 1024), ("cuda", 64, 64), ("cpu", 7, 7),
])  # fmt: skip
def test_batches_of_short_utterances_fill_a_pack_on_cuda(device: str, asked: int | None, expected: int) -> None:
    assert ComputeDevice(torch.device(device), torch.float32, 2, "").batch_size(asked) == expected


@pytest.mark.parametrize(("device", "cores", "asked", "expected"), [
    ("cpu", 64, None, 2), ("cuda", 16, None, 12), ("cuda", 12, None, 10), ("cuda", 3, None, 2), ("cuda", 12, 0, 0),
])  # fmt: skip
def test_loader_processes_follow_the_cores_of_a_rank(device: str, cores: int, asked: int | None, expected: int) -> None:
    assert ComputeDevice(torch.device(device), torch.float32, cores, "").loaders(asked) == expected


def test_files_of_a_run_with_other_settings_are_named(tmp_path: Path, caplog) -> None:
    assert run_rows(tmp_path, Device(), 6, run_dir=tmp_path / "first")[0] == 0
    assert run_rows(tmp_path, Device(), 6, run_dir=tmp_path / "second")[0] == 0
    assert "other settings" not in caplog.text
    assert run_rows(tmp_path, Device(), 6, run_dir=tmp_path / "third", resampler="soxr")[0] == 0
    assert "000000.json is of a run with other settings (resampler reference there, soxr here)" in caplog.text
