"""Quality as a user sees it: a run scored while it goes and after, its page in a browser, one file inspected."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess

import pytest
import soundfile

from batch_tokenizer.cli import main
from batch_tokenizer.commands import report as run_report
from batch_tokenizer.quality import evaluation as evaluate
from batch_tokenizer.records import RUN_INFO_FIELDS, RunError
from batch_tokenizer.runtime.ledger_lines import decode_entry, encode_shard, read_shard_lines
from tests.support.checkpoints import write_mimo_checkpoint
from tests.support.command import ROOT, output_row, run_here, write_manifest
from tests.support.html import parse

KEYS = ("it-03", "it-06", "ru-01", "ru-06", "ru-04")
METRICS = ("pesq_wb", "stoi", "si_sdr", "mel_distance")

pytest.importorskip("pesq")
pytest.importorskip("pystoi")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a finished run of some clips, one row of which failed."""
    folder = tmp_path_factory.mktemp("quality")
    write_mimo_checkpoint(folder / "model")
    shutil.copytree(ROOT / "sample_data" / "clips", folder / "clips")
    clips = {path.stem: path for path in sorted((folder / "clips").iterdir())}
    rows = [
        output_row(key, clips[key].relative_to(folder), (folder / "out").relative_to(folder), language=key[:2])
        for key in KEYS
    ]
    rows.append(
        output_row("gone", (folder / "clips" / "gone.wav").relative_to(folder), (folder / "out").relative_to(folder))
    )
    write_manifest(folder / "data.jsonl", rows)
    done = run_here(
        "--data_list", "data.jsonl", "--task", "wav2token2wav", "--model_path", "model", "--num_workers", "0",
        "--batch_size", "1", "--evaluate_every", "2", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(autouse=True)
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace[0])


RUN_DIR = "data.wav2token2wav.run"


def score(*words, metrics=METRICS):
    return main(["evaluate", *words, "--metrics", *metrics, "--workers", "1"])


def records(folder):
    return [json.loads(line) for line in (folder / "utterances.jsonl").read_text().splitlines()]


def test_rows_are_scored_while_the_run_goes(workplace):
    _, done = workplace
    lines = [line for line in done.stderr.splitlines() if "quality of row" in line]
    assert lines
    assert all("STOI" in line and "SI-SDR" in line and "Clipped" in line for line in lines)


def test_a_run_is_scored_once_and_the_table_names_every_metric(workplace, capsys):
    folder = workplace[0] / RUN_DIR / "quality"
    assert score(RUN_DIR, "--by", "language", "--sample", "3") == 0
    assert len(records(folder)) == 3
    assert score(RUN_DIR, "--by", "language") == 0
    found = records(folder)
    assert sorted(record["key"] for record in found) == sorted(KEYS), "the sample was scored again"
    for record in found:
        assert set(record["scores"]) | set(record["not_scored"]) == set(METRICS)
        assert all(math.isfinite(value) for value in record["scores"].values())
    short = next(record for record in found if record["key"] == "ru-06")
    assert "0.4 s" in short["not_scored"]["stoi"]

    before = (folder / "utterances.jsonl").read_bytes()
    capsys.readouterr()
    assert score(RUN_DIR, "--by", "language") == 0
    assert (folder / "utterances.jsonl").read_bytes() == before
    table = capsys.readouterr().out
    for word in ("language=it", "language=ru", "PESQ-WB", "STOI", "SI-SDR", "Mel distance", "bits a second"):
        assert word in table
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["groups"][-1]["estimates"]["si_sdr"]["count"] == len(KEYS)
    assert [row["size"] for row in summary["codebooks"]] == [32, 16, 16, 16, 16]
    assert summary["rates"]["bits a second at 5 codebooks"] == 25 * (5 + 4 * 4)


def test_a_torn_line_is_scored_again_and_parquet_holds_the_same(workplace, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    shutil.copytree(workplace[0] / RUN_DIR, tmp_path / RUN_DIR)
    out = str(tmp_path / "scores")
    words = (RUN_DIR, "--out", out, "--sample", "2")
    assert score(*words, metrics=("si_sdr",)) == 0
    path = tmp_path / "scores" / "utterances.jsonl"
    whole = records(path.parent)
    path.write_bytes(path.read_bytes()[:-20])
    assert score(*words, metrics=("si_sdr",)) == 0
    good = []
    for line in path.read_text().splitlines():
        try:
            good.append(json.loads(line))
        except ValueError:
            continue
    assert sorted(record["key"] for record in good) == sorted(record["key"] for record in whole)
    table = parquet.read_table(path.with_suffix(".parquet")).to_pydict()
    assert dict(zip(table["key"], table["si_sdr"], strict=True)) == {
        record["key"]: record["scores"]["si_sdr"] for record in whole
    }


def test_fewer_codebooks_are_decoded_again_and_scoring_runs_in_processes(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "UTTERANCES_PER_WORKER", 2)
    out = str(tmp_path / "scores")
    words = ["evaluate", RUN_DIR, "--num_quantizers", "2", "5", "--metrics", "si_sdr", "--out", out]
    assert main([*words, "--model_path", "model", "--workers", "2"]) == 0
    by_count = {}
    for record in records(tmp_path / "scores"):
        by_count.setdefault(record["num_quantizers"], {})[record["key"]] = record["scores"].get("si_sdr")
    assert set(by_count) == {2, 5}
    assert set(by_count[2]) == set(by_count[5]) == set(KEYS)
    assert by_count[2] != by_count[5]
    # What is decoded again from all codebooks is what the run wrote, but for the wav file's 16 bits.
    files = evaluate.evaluate(
        evaluate.Request(
            run_dir=workplace[0] / RUN_DIR, metrics=("si_sdr",), out=tmp_path / "files", model_path="model"
        )
    )
    for record in files.utterances:
        assert record["scores"]["si_sdr"] == pytest.approx(by_count[5][record["key"]], abs=0.2)


@pytest.mark.parametrize(
    ("sink", "task"),
    [("tar", "wav2token2wav"), ("parquet", "wav2token2wav"), ("parquet", "wav2token"), ("tar", "token2wav")],
)
def test_shards_are_scored_as_files_are(sink, task, workplace, tmp_path):
    if sink == "parquet":
        pytest.importorskip("pyarrow")
    rows = [json.loads(line) for line in (workplace[0] / "data.jsonl").open()]
    for row in rows[:-1]:  # with durations, longest go first, so a row's place is not its line
        row["duration"] = soundfile.info(row["reconstructed_wav"]).duration
    assert [row["duration"] for row in rows[:-1]] != sorted((row["duration"] for row in rows[:-1]), reverse=True)
    run_dir, shards = str(tmp_path / "shards.run"), tmp_path / "shards"
    words = ["--data_list", str(tmp_path / "data.jsonl"), "--task", task, "--model_path", "model", "--run_dir", run_dir]
    for there in (rows[3:], rows):  # the manifest grows at its front: there are two shards, and lines have moved
        write_manifest(tmp_path / "data.jsonl", there)
        assert main([*words, "--num_workers", "0", "--sink", sink, "--output_dir", str(shards)]) == 0
    assert len(list(shards.glob(f"*.{sink}"))) == 2

    def found(name, folder, *more):
        out = tmp_path / name
        assert score(folder, "--model_path", "model", "--out", str(out), *more, metrics=("si_sdr",)) == 0
        return {record["key"]: record["scores"].get("si_sdr") for record in records(out) if "scores" in record}

    files = found("files", RUN_DIR)
    # Audio that is decoded now is not rounded to a wav file's 16 bits.
    assert found("shards", run_dir) == (pytest.approx(files, abs=0.2) if task == "wav2token" else files)
    assert found("two", run_dir, "--num_quantizers", "2") == found("files-two", RUN_DIR, "--num_quantizers", "2")
    assert len(found("one", run_dir, "--sample", "1")) == 1


def test_what_is_not_in_its_place_in_a_shard_is_not_scored(tmp_path):
    shutil.copy("data.jsonl", tmp_path / "data.jsonl")
    words = ["--data_list", str(tmp_path / "data.jsonl"), "--task", "wav2token", "--model_path", "model"]
    assert main([*words, "--num_workers", "0", "--sink", "tar", "--output_dir", str(tmp_path / "shards")]) == 0
    run_dir = tmp_path / "shards" / "data.wav2token.run"
    (ledger,) = (run_dir / "ledger").glob("*.*.jsonl")
    lines = read_shard_lines(ledger)
    assert lines is not None
    ledger.write_bytes(encode_shard([decode_entry(line) for line in reversed(lines)]))
    found = evaluate.evaluate(evaluate.Request(run_dir=run_dir, metrics=("si_sdr",), model_path="model"))
    assert len(found.utterances) == 1, "the third of five is where it was"
    assert len(found.failed) == 4
    assert all("has another row in its place: batch_tokenizer verify" in record["failed"] for record in found.failed)

    (shard,) = (tmp_path / "shards").glob("*.tar")
    shard.unlink()
    request = evaluate.Request(run_dir=run_dir, metrics=("si_sdr",), model_path="model", out=tmp_path / "lost")
    found = evaluate.evaluate(request)
    assert len(found.failed) == 5
    assert all(f"{shard}: cannot be opened: No such file" in record["failed"] for record in found.failed)


def test_a_manifest_goes_through_the_codec(workplace, tmp_path, capsys):
    out = str(tmp_path / "scores")
    assert score("--data_list", "data.jsonl", "--model_path", "model", "--out", out, metrics=("si_sdr",)) == 0
    assert "1 utterances could not be scored: clips/gone.wav: no such file" in capsys.readouterr().out
    assert {record["key"] for record in records(tmp_path / "scores") if "scores" in record} == set(KEYS)
    # Other weights are other results.
    write_mimo_checkpoint(tmp_path / "other", seed=1)
    words = ("--data_list", "data.jsonl", "--model_path", str(tmp_path / "other"), "--out", out)
    assert score(*words, metrics=("si_sdr",)) == 2
    with pytest.raises(RunError, match="fingerprint"):
        evaluate.evaluate(
            evaluate.Request(run_dir=workplace[0] / RUN_DIR, num_quantizers=(2,), model_path=str(tmp_path / "other"))
        )


def test_what_cannot_be_scored_is_one_line(tmp_path, caplog):
    for words, message in (
        ([], "run folder or --data_list"),
        ([str(tmp_path)], "is not a run folder"),
        ([str(tmp_path / "none")], "does not exist"),
        ([RUN_DIR, "--num_quantizers", "6"], "between 1 and 5"),
        ([RUN_DIR, "--sample", "0"], "at least 1"),
    ):
        caplog.clear()
        assert main(["evaluate", *words]) == 2, words
        assert message in caplog.records[-1].message


@pytest.fixture(scope="module")
def report(workplace, tmp_path_factory):
    """The page of the run, as text and as a file."""
    pytest.importorskip("matplotlib")
    folder, _ = workplace
    path = tmp_path_factory.mktemp("page") / "report.html"
    done = run_here("report", RUN_DIR, "--out", path, "--by", "language", "--listen", "3", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"report: {path}" in done.stdout
    return path, path.read_text(encoding="utf-8")


@pytest.mark.slow
class TestPage:
    def test_it_is_whole_small_and_asks_nobody(self, report):
        path, text = report
        document = parse(text)
        assert not document.problems
        assert path.stat().st_size < run_report.MOST_BYTES
        for tag in ("img", "audio", "script", "link", "iframe", "image"):
            for attributes in document.tags(tag):
                for name in ("src", "href", "xlink:href"):
                    assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes[name][:80])
        assert not re.search(r"@import|url\((?!#|data:)", text)
        shown = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)  # base64 may contain any three letters
        assert not re.search(r"\bnan\b", shown, re.IGNORECASE)

    def test_it_says_what_happened(self, report):
        _, text = report
        for word in ("clips/gone.wav: no such file", "language=it", "mimo", "PESQ-WB", "data.jsonl", "Perplexity"):
            assert word in text
        assert re.search(r"codebook sizes\W.{0,60}?\d+ × \d+", text)

    def test_every_player_has_its_audio(self, report, workplace):
        _, text = report
        players = parse(text).tags("audio")
        assert len(players) == 6
        for player in players:
            side, key = player["aria-label"].split(" of ")
            data = base64.b64decode(player["src"].partition("base64,")[2])
            samples, rate = soundfile.read(io.BytesIO(data))
            row = next(row for row in map(json.loads, (workplace[0] / "data.jsonl").open()) if row["key"] == key)
            expected = soundfile.info(workplace[0] / row["reconstructed_wav"]).duration
            assert len(samples) / rate == pytest.approx(expected, abs=0.05), side
            assert "controls" in player

    def test_shards_are_heard(self, workplace, tmp_path):
        words = ["--data_list", "data.jsonl", "--task", "wav2token2wav", "--model_path", "model", "--num_workers", "0"]
        run_dir = str(tmp_path / "tar.run")
        assert main([*words, "--run_dir", run_dir, "--sink", "tar", "--output_dir", str(tmp_path / "shards")]) == 0
        assert main(["report", run_dir, "--model_path", "model", "--sample", "2", "--listen", "2"]) == 0
        players = parse((tmp_path / "tar.run" / "report.html").read_text(encoding="utf-8")).tags("audio")
        assert len(players) == 4
        for player in players:
            key = player["aria-label"].partition(" of ")[2]
            made = soundfile.info(io.BytesIO(base64.b64decode(player["src"].partition("base64,")[2]))).duration
            assert made == pytest.approx(soundfile.info(workplace[0] / "out" / f"{key}.wav").duration, abs=0.05)

    def test_a_browser_opens_it(self, report, tmp_path):
        browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
        if browser is None:
            pytest.skip("no Chromium on this machine")
        _, text = report
        probe = """<script>
        const say = () => { const box = document.createElement('pre'); box.id = 'probe';
          const players = [...document.querySelectorAll('audio')];
          box.textContent = JSON.stringify({durations: players.map(one => one.duration),
            errors: players.map(one => one.error && one.error.message), wide: document.documentElement.scrollWidth,
            background: getComputedStyle(document.body).backgroundColor});
          document.body.append(box); };
        addEventListener('load', () => setTimeout(say, 500));</script>"""
        (tmp_path / "probe.html").write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", "--virtual-time-budget=20000",
             "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path / 'probe.html'}"],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
        assert found, done.stderr[-2000:]
        seen = json.loads(found[1])
        assert seen["errors"] == [None] * 6
        assert all(duration and duration > 0.3 for duration in seen["durations"]), seen
        assert seen["wide"] <= 500, "the page is wider than a phone"
        assert "CONSOLE" not in done.stderr, done.stderr


def test_one_file_is_inspected(workplace, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["inspect", "clips/it-03.flac", "--model_path", "model", "--metrics", *METRICS, "--out", str(tmp_path)]
    assert main(words) == 0
    text = capsys.readouterr().out
    for word in ("PESQ-WB", "frames of 5 codes", "kbit/s", str(tmp_path / "it-03.png")):
        assert word in text
    # The tokens and the audio of a run, to the byte.
    made = json.loads((tmp_path / "it-03.json").read_text())
    of_run = json.loads((workplace[0] / "out" / "it-03.json").read_text())
    assert made["quantized_tokens"] == of_run["quantized_tokens"]
    described = {name: made["info"][name] for name in RUN_INFO_FIELDS if name in made["info"]}
    assert described == {name: of_run["info"][name] for name in RUN_INFO_FIELDS if name in of_run["info"]}
    assert {"dtype", "codebook_sizes", "resampler"} <= described.keys()
    assert (tmp_path / "it-03.wav").read_bytes() == (workplace[0] / "out" / "it-03.wav").read_bytes()
    assert (tmp_path / "it-03.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", "clips/none.wav", "--model_path", "model"]) == 2


def test_a_threshold_stops_a_run_and_another_command_finishes_it(workplace, tmp_path, caplog):
    rows = [
        output_row(f"r{number:03d}", workplace[0] / "clips" / "it-06.wav", tmp_path / "out") for number in range(200)
    ]
    words = [
        "--data_list", str(write_manifest(tmp_path / "many.jsonl", rows)), "--task", "wav2token2wav",
        "--model_path", "model", "--num_workers", "0", "--batch_size", "1", "--prefetch", "1", "--device", "cpu",
    ]  # fmt: skip
    assert main([*words, "--evaluate_every", "1", "--stop_below", "si_sdr=99"]) == 1
    assert caplog.records[-1].levelname == "ERROR"
    assert caplog.records[-1].message.startswith("--stop_below si_sdr=99: SI-SDR is ")
    run_dir = tmp_path / "many.wav2token2wav.run"

    def done():
        return [line for path in (run_dir / "ledger").iterdir() for line in path.read_text().splitlines()]

    assert 3 <= len(done()) < len(rows)
    assert main(words) == 0
    assert len(done()) == len(rows)
