"""A shard's rows are done with it or not at all, wherever a process is killed, and also if it is not quite dead."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_tokenizer.records import RunError
from batch_tokenizer.runs.stored_rows import shard_rows
from batch_tokenizer.runtime.ledger_lines import decode_entry, read_shard_lines
from batch_tokenizer.runtime.run_files import parse_shard_name, shard_ledger_file, shard_name
from batch_tokenizer.runtime.shard_ledger import ShardJournal
from batch_tokenizer.writers.row_encoding import RowEncoder, done_entry
from batch_tokenizer.writers.shard_folder import shard_folder
from batch_tokenizer.writers.shard_recovery import recover
from batch_tokenizer.writers.shard_sink import ShardSink, shard_form
from tests.support.shards import RUN_INFO, read_shards, tokenized

TASK = "wav2token"
NUM_STEPS = 4  # create and fill, prepare, publish, commit


class Place:
    """A run folder and its output folder, and what attempts do there."""

    def __init__(self, folder: Path, sink: str = "tar", out: str | None = None) -> None:
        self.run_dir = folder / "run"
        self.sink = sink
        for name in ("ledger", "attempts"):
            (self.run_dir / name).mkdir(parents=True)
        self.shards = shard_folder(out or str(folder / "out"))
        self.shards.claim(TASK, "id", self.run_dir)
        self.attempt = 0

    def begin(self, num_shards: int = 1, shard: int = 0) -> int:
        """The next attempt, recovered."""
        self.attempt += 1
        about = {"num_shards": num_shards, "shard": shard}
        (self.run_dir / "attempts" / f"{self.attempt:06d}.json").write_text(json.dumps(about))
        self.recover(self.attempt, num_shards, shard)
        return self.attempt

    def recover(self, attempt: int, num_shards: int = 1, shard: int = 0) -> None:
        recover(
            self.run_dir, self.shards, TASK, self.sink, attempt=attempt, num_shards=num_shards, shard=shard
        )  # fmt: skip

    def steps(self, attempt: int, rank: int, rows: Sequence[int]) -> list[Callable[[], None]]:
        """The steps of publishing one shard, as ``ShardSink`` takes them."""
        journal = ShardJournal(self.run_dir, TASK, attempt, rank)
        number, name = journal.draw()
        name += f".{self.sink}"
        results = [tokenized(row) for row in rows]
        encode = RowEncoder(TASK, RUN_INFO, 24000)
        form = shard_form(self.sink, RUN_INFO, 3, False)

        def fill() -> None:
            with self.shards.create(name) as stream:
                shard = form.open(stream)
                for result in results:
                    shard.append(form.encode(encode(result)))
                shard.finish()

        return [
            fill,
            lambda: journal.prepare(number, [done_entry(result, {}) for result in results]),
            lambda: self.shards.publish(name),
            lambda: journal.commit(number),
        ]

    def done(self) -> Counter[int]:
        """How often the ledger says of each row that it is done."""
        lines = [line for path in (self.run_dir / "ledger").iterdir() for line in read_shard_lines(path) or []]
        return Counter(decode_entry(line).line for line in lines)

    def published(self) -> set[int]:
        """Rows in shards; one in two shards is an error."""
        return {int(key.split()[1]) for key in read_shards(Path(self.shards.place))}

    def check(self, rows: set[int]) -> None:
        """Those rows are done once, and each is in one shard; nothing else lies about."""
        assert self.done() == Counter(rows)
        assert self.published() == rows
        assert self.shards.names_aside() == []
        assert [path for path in (self.run_dir / "shards").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("sink", ["tar", "parquet", "jsonl"])
@pytest.mark.parametrize("killed_after", range(NUM_STEPS + 1))
def test_killed_between_any_two_steps(tmp_path: Path, sink: str, killed_after: int) -> None:
    place = Place(tmp_path, sink)
    attempt = place.begin()
    for step in place.steps(attempt, 0, [0, 1])[:killed_after]:
        step()
    place.begin()
    place.check({0, 1} if killed_after >= 3 else set())


@pytest.mark.parametrize("before", range(NUM_STEPS))
def test_a_process_that_outlives_its_job_publishes_nothing_more(tmp_path: Path, before: int) -> None:
    """Its last steps come after the next job has planned from the ledger, and done what was pending."""
    place = Place(tmp_path)
    attempt = place.begin()
    steps = place.steps(attempt, 1, [0, 1])
    for step in steps[:before]:
        step()
    successor = place.begin()
    todo = [row for row in (0, 1, 2) if row not in place.done()]
    for step in place.steps(successor, 0, todo):
        step()
    failed = 0
    for step in steps[before:]:
        try:
            step()
        except (RunError, OSError):
            failed += 1
            break  # as the process does
    assert failed == 1
    place.begin()
    place.check({0, 1, 2})


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(0, NUM_STEPS)), max_size=12))
def test_any_history_ends_with_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, int, int]]
) -> None:
    """Shards of (rank, rows, steps taken): one that did not take all steps was its attempt's last."""
    place = Place(tmp_path_factory.mktemp("history"))
    total = 10

    def todo() -> list[int]:
        return [row for row in range(total) if row not in place.done()]

    attempt, pending = place.begin(), list(range(total))
    for rank, count, taken in history:
        rows, pending = pending[:count], pending[count:]
        if rows:
            for step in place.steps(attempt, rank, rows)[:taken]:
                step()
        if taken < NUM_STEPS:
            attempt = place.begin()
            pending = todo()
    if pending:
        for step in place.steps(attempt, 0, pending):
            step()
    place.check(set(range(total)))


def test_another_parts_living_job_is_left_alone(tmp_path: Path) -> None:
    place = Place(tmp_path)
    first = place.begin(num_shards=2, shard=0)
    steps = place.steps(first, 0, [0, 1])
    for step in steps[:2]:
        step()
    second = place.begin(num_shards=2, shard=1)
    for step in place.steps(second, 0, [2]):
        step()
    for step in steps[2:]:
        step()
    place.check({0, 1, 2})


def test_a_job_that_divides_the_manifest_otherwise_ends_what_all_left(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for shard, taken in ((0, 2), (1, 3)):
        attempt = place.begin(num_shards=2, shard=shard)
        for step in place.steps(attempt, 0, [shard])[:taken]:
            step()
    place.begin()
    place.check({1})


def test_a_restarted_process_of_an_attempt_takes_other_numbers(tmp_path: Path) -> None:
    place = Place(tmp_path)
    attempt = place.begin()
    for taken, row in ((4, 0), (3, 1), (1, 2), (4, 3)):
        for step in place.steps(attempt, 0, [row])[:taken]:
            step()
    place.begin()
    place.check({0, 1, 3})


def test_an_orphan_is_told_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = Place(tmp_path)
    for step in place.steps(place.begin(), 0, [0]):
        step()
    for path in (place.run_dir / "ledger").iterdir():
        path.unlink()
    place.begin()
    place.check(set())
    assert "wav2token-000001-00000-000000.tar is removed" in caplog.text


@given(st.data())
def test_a_damaged_ledger_file_costs_its_shard_and_makes_no_row_twice(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Two shards; the ledger file of one is torn, emptied, filled with zeros or changed in a byte, wherever that is."""
    place = Place(tmp_path_factory.mktemp("damage"))
    attempt = place.begin()
    for rows in ([0, 1], [2, 3]):
        for step in place.steps(attempt, 0, rows):
            step()
    path = shard_ledger_file(place.run_dir, attempt, 0, 1)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from(["cut", "zeros", "byte", "longer", "line"]))
    if damage == "cut":
        del content[at:]
    elif damage == "zeros":
        content[at:] = bytes(len(content) - at)
    elif damage == "byte":
        content[at] ^= data.draw(st.integers(1, 255))
    elif damage == "longer":
        content += bytes(at + 1)
    else:
        lines = bytes(content).splitlines(keepends=True)
        content = bytearray(b"".join(lines[1:]))
    path.write_bytes(content)
    assert set(place.done()) == {0, 1}
    second = place.begin()
    assert not path.exists()
    place.check({0, 1})
    for step in place.steps(second, 0, [row for row in range(4) if row not in place.done()]):
        step()
    place.begin()
    place.check({0, 1, 2, 3})


def test_names_of_shards() -> None:
    assert parse_shard_name(TASK, shard_name(TASK, 3, 2, 1) + ".tar") == (3, 2, 1)
    for other in ("wav2token2wav-000003-00002-000001.tar", "wav2token-000003.tar", "data.tar"):
        assert parse_shard_name(TASK, other) is None


def test_an_output_folder_belongs_to_one_run(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for step in place.steps(place.begin(), 0, [0]):
        step()
    place.shards.claim(TASK, "id", place.run_dir)
    with pytest.raises(RunError, match="holds shards of another wav2token run"):
        place.shards.claim(TASK, "other", tmp_path)
    place.shards.claim("token2wav", "other", tmp_path)


class TestSink:
    def sink(self, place: Place, **limits: float) -> ShardSink:
        attempt = place.begin()
        return ShardSink(
            RowEncoder(TASK, RUN_INFO, 24000),
            shard_form(place.sink, RUN_INFO, 3, False),
            place.shards,
            ShardJournal(place.run_dir, TASK, attempt, 0),
            **{"most_bytes": 1 << 30, **limits},  # type: ignore[arg-type]
        )

    @pytest.mark.parametrize("form", ["tar", "parquet", "jsonl"])
    @pytest.mark.parametrize("limits", [{"most_rows": 3}, {"most_bytes": 400}, {"most_seconds": 0}])
    def test_shards_are_closed_at_their_limits(self, tmp_path: Path, form: str, limits: dict[str, float]) -> None:
        place = Place(tmp_path, form)
        with self.sink(place, **limits) as sink:
            for row in range(10):
                sink.write(tokenized(row))
            assert 1 < len(place.shards.names()) <= 10
            assert set(place.done()) == place.published()
        place.check(set(range(10)))

    def test_an_exception_leaves_nothing_open(self, tmp_path: Path) -> None:
        place = Place(tmp_path)
        with suppress(ZeroDivisionError), self.sink(place, most_rows=3) as sink:
            for row in range(5):
                sink.write(tokenized(row))
            raise ZeroDivisionError
        place.check({0, 1, 2})

    def test_a_folder_that_is_gone_ends_the_run(self, tmp_path: Path) -> None:
        place = Place(tmp_path)
        sink = self.sink(place)
        sink.write(tokenized(0))
        for path in Path(place.shards.place).iterdir():
            path.unlink()
        with pytest.raises(RunError, match="cannot be written") as raised:
            sink.close()
        assert raised.value.exit_code == 1


class TestRemoteFolder:
    """Shards behind a URL; fsspec's store in memory stands for one."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        pytest.importorskip("fsspec", reason="fsspec is not installed")
        return Place(tmp_path, out=f"memory://{tmp_path.name}/out")

    @pytest.mark.parametrize("killed_after", range(NUM_STEPS + 1))
    def test_killed_between_any_two_steps(self, place: Place, killed_after: int) -> None:
        attempt = place.begin()
        for step in place.steps(attempt, 0, [0, 1])[:killed_after]:
            step()
        place.shards = shard_folder(place.shards.place)  # as another process has it
        place.begin()
        expected = {0, 1} if killed_after >= 3 else set()
        assert place.done() == Counter(expected)
        name = "wav2token-000001-00000-000000.tar"
        assert place.shards.names() == ([name] if expected else [])
        keys = [int(row.key.split()[1]) for _ in expected for row in shard_rows(place.shards.location(name))]
        assert set(keys) == expected

    def test_the_folder_belongs_to_one_run(self, place: Place) -> None:
        for step in place.steps(place.begin(), 0, [0]):
            step()
        with pytest.raises(RunError, match="holds shards of another"):
            shard_folder(place.shards.place).claim(TASK, "other", place.run_dir)

    def test_a_store_that_cannot_be_had_is_told_in_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="no-such-scheme") as raised:
            shard_folder("no-such-scheme://x/out").claim(TASK, "id", tmp_path)
        assert "\n" not in str(raised.value)
