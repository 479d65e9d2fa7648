"""``--hidden_states``: the encoder's output before quantization beside the codes, in every sink, and read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from batch_tokenizer.cli import main
from batch_tokenizer.codecs.base import Codec
from batch_tokenizer.codecs.mimo.codec import MiMoCodec
from batch_tokenizer.codecs.opening import open_codec
from batch_tokenizer.records import RowError
from batch_tokenizer.runs.indexed_rows import IndexedRows, stored_rows
from batch_tokenizer.sources.folder_rows import walk_folder
from batch_tokenizer.sources.tar_rows import tar_rows
from batch_tokenizer.storage.parquet_rows import read_audio
from batch_tokenizer.writers.row_encoding import RowEncoder
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.command import write_manifest
from tests.support.moss import tiny, write_moss_checkpoint
from tests.support.padded_codecs import write_checkpoint
from tests.support.shards import RUN_INFO, tokenized

LENGTHS = (9000, 700, 4321, 16000, 1)
FAMILIES = ("mimo", "moss", "moss stereo")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    stereo = tiny(downsample_rate=320, number_channels=2, enable_channel_interleave=True)
    return {
        "mimo": write_mimo_checkpoint(folder / "mimo"),
        "moss": write_moss_checkpoint(folder / "moss"),
        "moss stereo": write_moss_checkpoint(folder / "stereo", stereo),
    }


def features(codec: Codec) -> list[np.ndarray]:
    channels = () if codec.info.channels == 1 else (codec.info.channels,)
    wavs = [
        np.random.default_rng(number).normal(0, 0.2, (*channels, length)).astype(np.float32)
        for number, length in enumerate(LENGTHS)
    ]
    return [codec.spec.features(wav) for wav in wavs]


def corpus(folder: Path, rate: int, suffix: str = "json") -> Path:
    rows = []
    for number, length in enumerate(LENGTHS):
        wav = folder / f"{number}.wav"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(wav, np.random.default_rng(number).normal(0, 0.2, length), rate, subtype="FLOAT")
        rows.append(
            {"key": f"k{number}", "wav": str(wav), "quantized_tokens": str(folder / "out" / f"{number}.{suffix}")}
        )
    return write_manifest(folder / "rows.jsonl", rows)


def run(manifest: Path, checkpoint: Path, *flags: object) -> int:
    words = ["--data_list", manifest, "--model_path", checkpoint, "--device", "cpu", "--num_workers", 0, *flags]
    return main([*map(str, words)])


def quantize(codec: Codec, hidden: torch.Tensor) -> np.ndarray:
    quantizer = codec.model.encoder.quantizer if isinstance(codec, MiMoCodec) else codec.model.quantizer
    return quantizer.encode(hidden, codec.info.num_codebooks).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_what_the_quantizer_is_given(checkpoints, family):
    codec = open_codec(str(checkpoints[family]), "cpu")
    codec.model.capacity = None  # as ``model.hidden`` computes it, to the bit
    inputs = features(codec)
    codes, hidden_states = codec.encode_hidden(inputs, codec.info.num_codebooks)
    for plain, code in zip(codec.encode(inputs, codec.info.num_codebooks), codes, strict=True):
        np.testing.assert_array_equal(plain, code)
    for number, (code, hidden) in enumerate(zip(codes, hidden_states, strict=True)):
        assert hidden.dtype == np.float16
        [alone] = codec.encode_hidden([inputs[number]], codec.info.num_codebooks)[1]
        np.testing.assert_array_equal(hidden, alone)
        given = torch.from_numpy(inputs[number])
        exact = codec.model.hidden(given if family == "mimo" else given.t().reshape(-1))
        np.testing.assert_array_equal(hidden, exact.half().numpy())
        np.testing.assert_array_equal(quantize(codec, exact), code)
    # Rounded to float16 they still give the first codebook's codes, but where two rows are almost as near.
    rounded = np.concatenate([quantize(codec, torch.from_numpy(one).float())[:, 0] for one in hidden_states])
    assert np.mean(rounded == np.concatenate(codes)[:, 0]) > 0.97


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_on_one_axis_give_the_same(checkpoints, family):
    codec = open_codec(str(checkpoints[family]), "cpu")
    inputs = features(codec)
    codes, hidden_states = codec.encode_hidden(inputs, 2)
    codec._runner._pool = None  # all utterances in one call of the model, as on a device
    codec.model.capacity = 64
    order = [3, 0, 4, 1, 2]
    packed_codes, packed = codec.encode_hidden([inputs[index] for index in order], 2)
    for index, code, hidden in zip(order, packed_codes, packed, strict=True):
        np.testing.assert_array_equal(code, codes[index])
        np.testing.assert_allclose(hidden.astype(np.float32), hidden_states[index].astype(np.float32), atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sink", ["json", "npy", "tar", "parquet"])
def test_every_sink_has_them(tmp_path, checkpoints, family, sink, capsys, caplog):
    codec = open_codec(str(checkpoints[family]), "cpu")
    manifest = corpus(tmp_path, codec.info.sample_rate, "npy" if sink == "npy" else "json")
    out = tmp_path / "shards"
    run_dir = tmp_path / "run"
    flags = ["--run_dir", run_dir, "--sink", sink, *(["--output_dir", out] if sink in ("tar", "parquet") else [])]
    assert run(manifest, checkpoints[family], *flags, "--hidden_states", "--strict") == 0
    rows = {row.key: row for row in stored_rows(str(run_dir))}
    wavs = [soundfile.read(tmp_path / f"{number}.wav", dtype="float32")[0] for number in range(len(LENGTHS))]
    wavs = [wav if codec.info.channels == 1 else np.stack([wav, wav]) for wav in wavs]
    expected = codec.encode_hidden([codec.spec.features(wav) for wav in wavs], codec.info.num_codebooks)
    for number, (code, hidden) in enumerate(zip(*expected, strict=True)):
        row = rows[f"k{number}"]
        np.testing.assert_array_equal(row.codes, code)
        np.testing.assert_array_equal(row.hidden_states, hidden)
        assert row.info["hidden_states"] is True
    if sink in ("json", "npy"):
        path = tmp_path / "out" / f"0.{sink}.hidden.npy"
        np.testing.assert_array_equal(np.load(path), expected[1][0])
        assert not [
            found for found, *_ in walk_folder(str(tmp_path / "out"), "quantized_tokens", print) if "hidden" in found
        ]  # type: ignore[arg-type]
    if sink == "tar":
        [shard] = out.glob("*.tar")
        assert [row["key"] for row in tar_rows(str(shard), "quantized_tokens", print)] == list(rows)  # type: ignore[arg-type]

    def verify() -> int:
        words = [
            "verify",
            "--data_list",
            manifest,
            "--run_dir",
            run_dir,
            "--model_path",
            checkpoints[family],
            "--content",
            "--workers",
            1,
        ]
        return main([*map(str, words)])

    assert verify() == 0
    # A run goes on with the same setting only.
    assert run(manifest, checkpoints[family], *flags, "--hidden_states") == 0
    assert run(manifest, checkpoints[family], *flags) == 2
    assert "hidden_states" in caplog.text
    # Damage is found.
    if sink in ("json", "npy"):
        content = path.read_bytes()
        for damaged in (content[:-2], content[:-1] + bytes([content[-1] ^ 1]), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert verify() == 1
            assert path.name in capsys.readouterr().out


@pytest.mark.parametrize("form", ["json", "npy", "tar", "parquet"])
def test_convert_takes_them_along(tmp_path, checkpoints, form):
    manifest = corpus(tmp_path, 16000)
    assert run(manifest, checkpoints["moss"], "--hidden_states", "--strict") == 0
    source = tmp_path / "rows.wav2token.run"
    for name, flags in (("all", []), ("tokens", ["--tokens_only"])):
        assert main(["convert", str(source), "--to", form, "--out", str(tmp_path / name), *flags]) == 0
    before = {row.key: row for row in stored_rows(str(source))}
    by_number = IndexedRows.open(str(tmp_path / "all"))
    for number, row in enumerate(stored_rows(str(tmp_path / "all"))):
        np.testing.assert_array_equal(row.hidden_states, before[row.key].hidden_states)
        np.testing.assert_array_equal(by_number.read(number).hidden_states, row.hidden_states)
    if form == "parquet":
        [path] = (tmp_path / "all").glob("*.parquet")
        with pytest.raises(RowError, match="has no audio"):
            read_audio(str(path), 0)
    for row in stored_rows(str(tmp_path / "tokens")):
        np.testing.assert_array_equal(row.codes, before[row.key].codes)
        assert (row.hidden_states, row.info.get("hidden_states")) == (None, None)


@pytest.mark.parametrize("policy", ["segment", "stream"])
def test_long_rows_have_those_of_their_pieces(tmp_path, checkpoints, policy):
    manifest = corpus(tmp_path, 16000)
    flags = ("--hidden_states", "--strict", "--long_audio", policy, "--max_seconds", 0.2)
    assert run(manifest, checkpoints["moss"], *flags) == 0
    codec = open_codec(str(checkpoints["moss"]), "cpu")
    for row in stored_rows(str(tmp_path / "rows.wav2token.run")):
        wav = soundfile.read(tmp_path / f"{row.key[1:]}.wav", dtype="float32")[0]
        step = round(0.2 * 16000)
        parts = [wav] if policy == "stream" else [wav[start : start + step] for start in range(0, len(wav), step)]
        hidden = np.concatenate(codec.encode_hidden([part[None] for part in parts], 5)[1])
        np.testing.assert_allclose(row.hidden_states.astype(np.float32), hidden.astype(np.float32), atol=2e-3)


class TestRefusals:
    def test_other_families(self, tmp_path, caplog):
        checkpoint = write_checkpoint(tmp_path / "model", "nanocodec")
        assert run(corpus(tmp_path, 16000), checkpoint, "--hidden_states") == 2
        assert "--hidden_states: not a setting of nanocodec; it has none" in caplog.text

    def test_json_lines(self, tmp_path, checkpoints, caplog):
        flags = ("--hidden_states", "--sink", "jsonl", "--output_dir", tmp_path / "out")
        assert run(corpus(tmp_path, 16000), checkpoints["moss"], *flags) == 2
        assert "--sink jsonl holds tokens and fields" in caplog.text

    def test_decoding(self, tmp_path, checkpoints, caplog):
        assert run(corpus(tmp_path, 16000), checkpoints["moss"], "--hidden_states", "--task", "token2wav") == 2
        assert "--hidden_states needs a task that encodes" in caplog.text

    def test_a_token_file_in_the_place_of_hidden_states(self, tmp_path, checkpoints):
        rows = [json.loads(line) for line in corpus(tmp_path, 16000).read_text().splitlines()]
        rows[1]["quantized_tokens"] = rows[0]["quantized_tokens"] + ".hidden.npy"
        manifest = write_manifest(tmp_path / "rows.jsonl", rows)
        assert run(manifest, checkpoints["moss"], "--hidden_states") == 0
        [failure] = (tmp_path / "rows.wav2token.run" / "failures.jsonl").read_text().splitlines()
        assert "no token file may end in .hidden.npy" in json.loads(failure)["reason"]

    def test_what_float16_does_not_hold(self):
        hidden = np.full((1, 3), np.inf, np.float16)
        with pytest.raises(RowError, match="65,504"):
            RowEncoder("wav2token", RUN_INFO, 16000)(replace(tokenized(0), hidden_states=hidden))
