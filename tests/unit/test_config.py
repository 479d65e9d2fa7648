"""The declared options: the parser, the checks and docs/flags.md follow from ``RunConfig``'s fields."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from batch_tokenizer import cli
from batch_tokenizer.config import Group, RunConfig, add_options, options
from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.run_settings import run_dir_of, write_run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


def flags_table(group: str) -> str:
    """The table of one group's flags, as docs/flags.md has it."""
    lines = ["| flag | meaning | default |", "|---|---|---|"]
    for option in options().values():
        if option.group == group:
            choices = f": {', '.join(f'`{choice}`' for choice in option.choices)}" if option.choices else ""
            shown = option.default_text
            plain = option.default is None or not shown
            default = (shown or ("off" if option.value_type is bool else "–")) if plain else f"`{shown}`"
            names = f"`--{option.name}`" + (f", `{option.short}`" if option.short else "")
            lines.append(f"| {names} | {option.help}{choices} | {default} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("group", get_args(Group))
def test_page_of_flags_has_each_group_as_it_is_declared(group):
    section = f"## {group.capitalize()}\n\n{flags_table(group)}"
    assert section in PAGE.read_text(encoding="utf-8"), f"docs/flags.md should have:\n\n{section}"


def test_every_field_is_a_flag_with_a_group_and_help():
    assert list(options()) == [field.name for field in fields(RunConfig)]
    text = cli.run_parser().format_help()
    for option in options().values():
        assert option.group in get_args(Group)
        assert option.help
        assert f"--{option.name}" in text


def test_a_command_line_without_flags_gives_the_defaults():
    assert cli._run_config(cli.run_parser().parse_args([])) == RunConfig()
    assert RunConfig().data_list == "data.jsonl"


def test_values_are_converted_to_the_types_of_the_fields():
    words = "--batch_size 8 --grace 2.5 --run_dir a/b --strict --task wav2token2wav --evaluate_every 2"
    words += " --stop_below stoi=0.5 --stop_below si_sdr=-3"
    config = cli._run_config(cli.run_parser().parse_args(words.split()))
    assert (config.batch_size, config.grace, config.run_dir, config.strict) == (8, 2.5, Path("a/b"), True)
    assert list(config.stop_below) == [("stoi", 0.5), ("si_sdr", -3.0)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, r"--batch_size 0: must be at least 1"),
        ({"num_workers": -1}, r"--num_workers -1: must be at least 0"),
        ({"num_quantizers": 0}, r"--num_quantizers 0: must be at least 1"),
        ({"row_timeout": 0.05}, r"--row_timeout 0.05: must be at least 0.1"),
        ({"grace": float("nan")}, r"--grace nan: must be at least 0"),
        ({"max_seconds": 0.0}, r"--max_seconds 0: must be at least 0.001"),
        ({"task": "wav"}, r"--task wav: choose one of wav2token, token2wav, wav2token2wav"),
        ({"channels": "both"}, r"--channels both: choose one of mean"),
        ({"sink": "tar"}, r"--sink tar needs --output_dir"),
        ({"shard": 2, "num_shards": 2}, r"--shard 2: must be below --num_shards 2"),
        ({"strict": True, "max_failed": "1%"}, r"--strict is --max_failed 0, and not 1%"),
        ({"evaluate_every": 1}, r"--evaluate_every needs --task wav2token2wav"),
        ({"stop_below": [("stoi", 0.5)]}, r"--stop_below needs --evaluate_every"),
        ({"stop_below": [("pesq", 1.0)], "evaluate_every": 1, "task": "wav2token2wav"}, r"--stop_below pesq: choose"),
    ],
)
def test_values_out_of_range_are_refused_by_the_name_of_their_flag(values, message):
    with pytest.raises(RunError, match=message):
        RunConfig(**values)


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ({}, {(0, 0): False, (0, 9): False, (8, 9): False, (9, 9): True}),
        ({"strict": True}, {(0, 9): False, (1, 9): True}),
        ({"max_failed": "2"}, {(2, 900): False, (3, 900): True, (1, 1): True}),
        ({"max_failed": "0"}, {(0, 9): False, (1, 9): True}),
        ({"max_failed": "1%"}, {(1, 100): False, (2, 100): True, (1, 99): True}),
        ({"max_failed": "0.5%"}, {(1, 200): False, (1, 199): True}),
    ],
)
def test_the_exit_status_depends_on_how_many_rows_failed(values, limits):
    config = RunConfig(**values)
    assert {counts: config.too_many_failed(*counts) for counts in limits} == limits


@pytest.mark.parametrize(
    ("data_list", "output_dir", "expected"),
    [
        ("a/data.jsonl", None, "a/data.wav2token.run"),
        ("a/data.jsonl", "out", "out/data.wav2token.run"),
        ("a/data.jsonl", "s3://out", "a/data.wav2token.run"),
        ("a/000.tar", "s3://out", "000.wav2token.run"),
        ("a/shards/*.parquet", "out", "out/shards.wav2token.run"),
        ("a/shards/*.parquet", "s3://out", "a/shards.wav2token.run"),
    ],
)
def test_the_run_folder_lies_with_the_outputs_and_never_in_a_data_set(data_list, output_dir, expected):
    assert RunConfig(data_list=data_list, output_dir=output_dir).default_run_dir() == Path(expected)


def test_a_run_folder_that_was_begun_beside_its_source_is_used_on(tmp_path):
    config = RunConfig(data_list=tmp_path / "data.jsonl", output_dir=str(tmp_path / "out"))
    default, earlier = tmp_path / "out" / "data.wav2token.run", tmp_path / "data.wav2token.run"
    assert run_dir_of(config) == default
    earlier.mkdir()
    write_run(earlier, {"output_dir": "elsewhere"})
    assert run_dir_of(config) == default
    write_run(earlier, {"output_dir": config.output_dir})
    assert run_dir_of(config) == earlier
    default.mkdir(parents=True)
    write_run(default, {})
    assert run_dir_of(config) == default


def test_other_commands_share_flags_and_may_have_other_defaults():
    parser = argparse.ArgumentParser()
    add_options(parser, "task", "prefetch", task="token2wav")
    arguments = parser.parse_args([])
    assert (arguments.task, arguments.prefetch) == ("token2wav", 4)
    assert "(default: token2wav)" in " ".join(parser.format_help().split())


class TestInputsWithoutAFlag:
    @pytest.fixture(autouse=True)
    def place(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder").mkdir()
        for number in range(12):
            (tmp_path / f"{number}.WAV").touch()

    def config(self, *words):
        return cli._run_config(cli.run_parser().parse_intermixed_args(words))

    @pytest.mark.parametrize(
        ("words", "data_list", "task"),
        [
            (["0.WAV", "-o", "out"], "0.WAV", "wav2token2wav"),
            (["-o", "out", "folder"], "folder", "wav2token"),
            (["folder", "--task", "wav2token2wav"], "folder", "wav2token2wav"),
            (["0.WAV", "--task", "wav2token"], "0.WAV", "wav2token"),
            (["s3://bucket/x.wav"], "s3://bucket/x.wav", "wav2token"),
            (["--data_list", "0.WAV"], "0.WAV", "wav2token"),
        ],
    )
    def test_source_and_task(self, words, data_list, task):
        config = self.config(*words)
        assert (config.data_list, config.task) == (data_list, task)
        assert config.output_dir == ("out" if "-o" in words else None)

    def test_flags_may_stand_between_inputs_and_many_files_are_only_encoded(self):
        names = [f"{number}.WAV" for number in range(12)]
        few = self.config(*names[:4], "-o", "out", *names[4:10])
        many = self.config(*names)
        assert (few.task, many.task) == ("wav2token2wav", "wav2token")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["stauts"], "stauts: no such file or folder, did you mean the command status?"),
            (["none.wav"], r"none.wav: no such file or folder \(batch_tokenizer --help"),
            (["folder", "none.wav"], "none.wav: no such file"),
            (["folder", "--data_list", "0.WAV"], "both folder and --data_list 0.WAV name the utterances"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, words, message):
        with pytest.raises(RunError, match=message):
            self.config(*words)


def test_no_arguments_show_a_short_usage_with_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([]) == 2
    usage = capsys.readouterr().err
    assert usage.count("\n  ") >= 3
    assert len(usage.splitlines()) < 20
    assert "batch_tokenizer recordings/ -o tokens" in usage


@pytest.mark.parametrize("command", ["status", "evaluate", "convert"])
def test_help_of_a_command(command, capsys):
    assert cli.main(["help", command]) == 0
    assert capsys.readouterr().out.startswith(f"usage: batch_tokenizer {command} ")


def test_help_names_every_command_with_what_it_does(capsys, caplog):
    assert cli.main(["help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, about) in cli.COMMANDS.items():
        assert f"  {name:<10} {about}" in lines
        assert len(about) < 68
    assert cli.main(["help", "stats"]) == 2
    assert "there is no command stats, did you mean status?" in caplog.text


class TestErrorsOfAllRanks:
    """Rank 0 prints what every rank finds, and torchrun hears of it from one rank of each machine."""

    @pytest.fixture(autouse=True)
    def place(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(cli, "_OTHERS_END_SECONDS", 0.0)

    def rank(self, monkeypatch, tmp_path, rank, local_rank):
        for name, value in {
            "TORCHELASTIC_RUN_ID": "none", "RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 16,
            "MASTER_ADDR": "localhost", "MASTER_PORT": 1, "TORCHELASTIC_ERROR_FILE": tmp_path / f"{rank}.json",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, str(value))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "no data.jsonl in the working directory: name the utterances with --data_list"),
            (["--data_list", "none.jsonl"], "--data_list none.jsonl does not exist"),
            (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
            (["--num_shards", "4"], "--num_shards 4 needs --shard I"),
            (["--max_failed", "101%"], "--max_failed: '101%' is neither a number of rows nor a share"),
            (["--bach_size", "1"], "unrecognized arguments: --bach_size; did you mean --batch_size?"),
        ],
    )
    def test_one_line_from_rank_0(self, monkeypatch, tmp_path, caplog, words, message):
        self.rank(monkeypatch, tmp_path, 0, 0)
        assert cli.main(words) == 2
        (line,) = caplog.messages
        assert message in line
        reason = json.loads((tmp_path / "0.json").read_text())["message"]
        assert reason["extraInfo"]["py_callstack"] == line
        caplog.clear()
        for rank, local_rank, status in ((1, 1, 0), (8, 0, 2), (9, 1, 0)):
            self.rank(monkeypatch, tmp_path, rank, local_rank)
            assert cli.main(words) == status
        assert not caplog.messages
        assert [path.name for path in tmp_path.iterdir()] == ["0.json"]

    def test_sources_that_only_a_listing_can_find_are_left_to_it(self):
        for source in ("s3://bucket/data.jsonl", "shards/{0..9}.tar", "pipe:cat x.tar", "*.tar"):
            cli._check_source(source)
