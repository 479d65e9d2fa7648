"""Many utterances' scores enter; means with confidence intervals, by group and number of codebooks, leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batch_tokenizer.quality.metrics import METRICS

_RESAMPLES = 1000
_DRAWS_AT_ONCE = 1 << 20
_SEED = 1986

ALL = "all"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over utterances.

    Attributes:
        low, high: the 95 % confidence interval of the mean by the percentile bootstrap over utterances; None where
            fewer than three utterances have a value.
        count: utterances that have a value.
    """

    mean: float
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one finite value, the same for the same values."""
    numbers = np.sort(np.asarray(values, np.float64))
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("an aggregate takes one or more finite values")
    mean = float(numbers.mean())
    if len(numbers) < 3:
        return Estimate(mean, None, None, len(numbers))
    generator = np.random.default_rng(_SEED)
    block = max(1, min(_RESAMPLES, _DRAWS_AT_ONCE // len(numbers)))
    means = np.concatenate(
        [
            numbers[generator.integers(len(numbers), size=(min(block, _RESAMPLES - done), len(numbers)))].mean(axis=1)
            for done in range(0, _RESAMPLES, block)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(mean, float(low), float(high), len(numbers))


@dataclass(frozen=True, slots=True)
class Group:
    """Utterances with one value of a field, at one number of codebooks.

    Attributes:
        name: the field's value, or ``ALL``.
        count: utterances.
        estimates: metric to its estimate, where any utterance has a value.
        reasons: metric to how many utterances have no value, by reason.
    """

    name: str
    num_quantizers: int
    count: int
    estimates: Mapping[str, Estimate]
    reasons: Mapping[str, Mapping[str, int]]


def group(utterances: Iterable[Mapping[str, Any]], by: str | None = None) -> list[Group]:
    """Groups by the row's field ``by`` (none: all in one) and by number of codebooks, all together last.

    Args:
        utterances: records as ``evaluate`` writes them, with ``num_quantizers``, ``scores``, ``not_scored``, ``row``.
    """
    members: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for utterance in utterances:
        count = utterance["num_quantizers"]
        members.setdefault((ALL, count), []).append(utterance)
        if by is not None:
            value = utterance["row"].get(by)
            members.setdefault(("(none)" if value is None else f"{by}={value}", count), []).append(utterance)
    order = sorted(members, key=lambda place: (place[0] == ALL, place[0], place[1]))
    return [_group(name, count, members[name, count]) for name, count in order]


def _group(name: str, num_quantizers: int, utterances: Sequence[Mapping[str, Any]]) -> Group:
    values: dict[str, list[float]] = {}
    reasons: dict[str, Counter[str]] = {}
    for utterance in utterances:
        for metric, value in utterance["scores"].items():
            values.setdefault(metric, []).append(value)
        for metric, reason in utterance["not_scored"].items():
            reasons.setdefault(metric, Counter())[reason] += 1
    return Group(
        name,
        num_quantizers,
        len(utterances),
        {metric: estimate(values[metric]) for metric in METRICS if metric in values},
        {metric: dict(reasons[metric].most_common()) for metric in METRICS if metric in reasons},
    )


def markdown_table(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    """A table with a row a group and a column a metric: the mean ± half the interval. What has no value says
    ``not run`` or ``-``, and a note below gives the reasons."""
    head = ["utterances", "codebooks", "n", *(_heading(metric) for metric in metrics)]
    rows = [
        [one.name, str(one.num_quantizers), str(one.count), *(_cell(one, metric) for metric in metrics)]
        for one in groups
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    lines = [line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]
    notes = reason_lines([one for one in groups if one.name == ALL], metrics)
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def reason_lines(groups: Sequence[Group], metrics: Sequence[str]) -> list[str]:
    """A line for each metric and reason: how many scores there are not, and why."""
    lines = []
    for metric in metrics:
        total: Counter[str] = Counter()
        for one in groups:
            total.update(one.reasons.get(metric, {}))
        everyone = sum(one.count for one in groups)
        lines += [
            f"{METRICS[metric].label}: {count} of {everyone} without a value: {reason}"
            for reason, count in total.most_common()
        ]
    return lines


def _heading(metric: str) -> str:
    about = METRICS[metric]
    return f"{about.label} ({about.unit})" if about.unit else about.label


def _cell(one: Group, metric: str) -> str:
    found = one.estimates.get(metric)
    if found is None:
        reasons = one.reasons.get(metric, {})
        return "not run" if reasons and all(reason.startswith("not run") for reason in reasons) else "-"
    decimals = METRICS[metric].decimals
    if found.low is None or found.high is None:
        return f"{found.mean:.{decimals}f}"
    return f"{found.mean:.{decimals}f} ±{(found.high - found.low) / 2:.{decimals}f}"
