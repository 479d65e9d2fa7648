"""A training run from a recipe to a checkpoint: data, steps, progress lines, saves, and the end.

A signal or the recipe's limits end a run at any step, with its state and a usable checkpoint on disk. Started again
with the same folder it resumes there, with the crops that it had not used.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.records import RowError, RunError
from batch_tokenizer.training.crops import Audio, BatchNumbers, Crops, crop_length, read_manifest
from batch_tokenizer.training.recipe import Recipe
from batch_tokenizer.training.trainer import Trainer

log = logging.getLogger(__name__)

#: CropSampler of codebooks at which held-out audio is scored, beside all of them.
SCORED_CODEBOOKS = (4, 8)


def load_utterances(source: Path | str, folder: Path, config: MiMoConfig, most: int = 8) -> list[Tensor]:
    """Samples (S,) of up to ``most`` utterances of half a second or more, spread evenly over a source.

    At most four seconds of each are loaded.

    Raises:
        RunError: the source cannot be read, or none of those files can.
    """
    files = [file for file in read_manifest(source, folder) if file.seconds >= 0.5]
    utterances = []
    for file in files[:: max(1, len(files) // most)][:most]:
        try:
            samples = load_samples(file.path, config.sampling_rate, cut=file.cut)
        except RowError as error:
            log.warning("left out: %s", error.reason)
            continue
        utterances.append(torch.from_numpy(samples[: 4 * config.sampling_rate]))
    if not utterances:
        raise RunError(f"{source}: no file of at least half a second can be read")
    return utterances


def train(recipe: Recipe, stop: Callable[[], bool] = lambda: False) -> Trainer:
    """Trains until the recipe's end, or until ``stop()`` is true after a step. Saves in between and at the end.

    Raises:
        RunError: the data or the config cannot be used, the state in ``out`` is of another config, or it cannot be
            written.
    """
    recipe.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe)
    config = trainer.config

    # 1. Data, and weights to begin with.
    audio = Audio(read_manifest(recipe.data, recipe.out), config.sampling_rate, int(recipe.cache_gib * 2**30))
    held_out = load_utterances(recipe.held_out, recipe.out, config) if recipe.held_out else []
    if trainer.resume():
        log.info("resumed at step %d, after %.1f minutes", trainer.step, trainer.seconds / 60)
    elif recipe.start_from is not None:
        trainer.start_from(recipe.start_from, load_utterances(recipe.data, recipe.out, config, 16))
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    log.info("%.2f M parameters, %d files, %s", count / 1e6, len(audio), trainer.device)
    if trainer.finished and trainer.progress >= 1:
        log.info("finished before: %d steps, %.1f minutes", trainer.step, trainer.seconds / 60)
        return trainer

    # 2. Steps.
    progress = _Progress(trainer, held_out, sum(file.seconds for file in audio.files))
    loader = DataLoader(
        Crops(audio, config, recipe.token_frames, recipe.seed, recipe.augmentation),
        batch_sampler=BatchNumbers(trainer.step, recipe.batch_size), num_workers=recipe.num_workers,
        prefetch_factor=4 if recipe.num_workers else None, worker_init_fn=_ignore_stop_signals,
        generator=torch.Generator(),  # torch's own is restored by resuming and must not be drawn from here
    )  # fmt: skip
    clock = saved = time.monotonic()
    with _lost_workers_are_run_errors():
        for crops in loader:
            if trainer.progress >= 1 or stop():
                break
            progress.add(trainer.train_step(*(part.to(trainer.device) for part in crops)))
            now = time.monotonic()
            trainer.seconds += now - clock
            clock = now
            if trainer.step % recipe.log_every == 0:
                progress.report()
            if now - saved >= recipe.save_every:
                trainer.save()
                progress.saved()
                progress.score()
                saved = time.monotonic()

    # 3. The end: levels are set once, when all steps are done.
    progress.report()
    trainer.finished = trainer.progress >= 1
    if trainer.finished and trainer.codebooks.ready:
        log.info("levels shifted by %.2f dB", trainer.calibrate(load_utterances(recipe.data, recipe.out, config, 32)))
    trainer.save()
    progress.saved()
    if trainer.finished:
        progress.score()
    return trainer


class _Progress:
    """Lines of ``log.jsonl`` and of the log: losses averaged since the last line, and held-out scores.

    In the log alone: a line for each epoch, which is as much audio as the data have, and one for each save.

    Args:
        data_seconds: length of the audio to train on.
    """

    def __init__(self, trainer: Trainer, held_out: list[Tensor], data_seconds: float) -> None:
        recipe, config = trainer.recipe, trainer.config
        self.trainer = trainer
        self.held_out = held_out
        most = config.num_quantizers
        self.numbers = sorted({min(number, most) for number in (*SCORED_CODEBOOKS, most)})
        self.seconds_per_step = recipe.batch_size * crop_length(config, recipe.token_frames) / config.sampling_rate
        self._values: dict[str, list[float]] = defaultdict(list)
        self._data_seconds = data_seconds
        self._epochs = int(self.epochs)

    @property
    def epochs(self) -> float:
        """Audio that the steps so far have had, in lengths of all data."""
        return self.trainer.step * self.seconds_per_step / self._data_seconds

    def saved(self) -> None:
        """One line of where the work is, after ``trainer.save``."""
        trainer = self.trainer
        log.info(
            "saved step %d, after %.2f epochs and %.1f minutes, about %.1f minutes left: %s",
            trainer.step, self.epochs, trainer.seconds / 60, trainer.seconds_left / 60, self._place,
        )  # fmt: skip

    @property
    def _place(self) -> Path:
        """What a save writes that is worth naming: a checkpoint, once there are codebooks."""
        return self.trainer.recipe.out / ("checkpoint" if self.trainer.codebooks.ready else "state.pt")

    def add(self, values: Mapping[str, float]) -> None:
        """Losses of one step."""
        for name, value in values.items():
            self._values[name].append(value)
        if self.epochs >= self._epochs + 1:
            self._epochs = int(self.epochs)
            log.info("epoch %d ended at step %d; saves are in %s", self._epochs, self.trainer.step, self._place)

    def report(self) -> None:
        """One line, if there was a step since the last."""
        if not self._values:
            return
        trainer = self.trainer
        line = {
            "step": trainer.step,
            "minutes": round(trainer.seconds / 60, 1),
            "minutes_left": round(trainer.seconds_left / 60, 1),
            "hours": round(trainer.step * self.seconds_per_step / 3600, 2),
        }
        self._write(line | {name: round(sum(values) / len(values), 4) for name, values in self._values.items()})
        self._values.clear()

    def score(self) -> None:
        """One line with held-out scores, if there is held-out audio."""
        if self.held_out and self.trainer.codebooks.ready:
            scores = self.trainer.score(self.held_out, self.numbers)
            self._write({"step": self.trainer.step, "held_out": scores})

    def _write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(dict(line))
        log.info("%s", text)
        with (self.trainer.recipe.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _ignore_stop_signals(_: int) -> None:
    """For loading processes: a signal to the whole job must not end them before the last step is saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _lost_workers_are_run_errors() -> Iterator[None]:
    """
    Raises:
        RunError: a loading process ended. torch raises that from a signal handler, at any place.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            "a loading process ended, as when memory runs out (--cache_gib, --num_workers); start the same command "
            "again to resume from the last save",
            exit_code=1,
        ) from error
