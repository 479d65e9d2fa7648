"""Means of many utterances' scores with confidence intervals, by group and number of codebooks, and their table."""

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


def score_table(groups: Sequence[Group], metrics: Sequence[str], width: int) -> str:
    """A markdown table with a row a metric and a column a group: the mean ± half the interval. What has no value says
    ``not run`` or ``-``, and a note below gives the reasons.

    Args:
        width: in characters; groups that do not fit beside each other go into further tables below.
    """
    head = ["", *(heading(metric) for metric in metrics), "utterances"]
    columns = [
        [column_name(one, groups), *(_cell(one, metric) for metric in metrics), f"{one.count:,}"] for one in groups
    ]  # fmt: skip
    tables = []
    while columns:
        room, fitting = width - _width(head), 0
        for column in columns:
            room -= _width(column)
            if room < 0 and fitting:
                break
            fitting += 1
        tables.append(_markdown([head, *columns[:fitting]]))
        columns = columns[fitting:]
    notes = reason_lines([one for one in groups if one.name == ALL], metrics)
    return "\n\n".join([*tables, *(["\n".join(notes)] if notes else [])]) + "\n"


def column_name(one: Group, groups: Sequence[Group]) -> str:
    """What a table calls a group: with its number of codebooks where the groups have several."""
    several = len({other.num_quantizers for other in groups}) > 1
    return f"{one.name}, {one.num_quantizers} codebooks" if several else one.name


def _width(column: Sequence[str]) -> int:
    return max(map(len, column)) + 3


def _markdown(columns: Sequence[Sequence[str]]) -> str:
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["| " + " | ".join(cells) + " |" for cells in zip(*padded, strict=True)]
    rule = "|" + "|".join("-" * (len(column[0]) + 2) for column in padded) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


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


#: dB by which a reconstruction may be louder or quieter than its original before it is mentioned.
_LEVEL_TOLERANCE = 3.0


def level_notes(utterances: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line if reconstructions are clearly louder or quieter than their originals; nothing otherwise."""
    changes = {str(one["key"]): one["scores"]["level_change"] for one in utterances if "level_change" in one["scores"]}
    beyond = {key: change for key, change in changes.items() if abs(change) > _LEVEL_TOLERANCE}
    if not beyond:
        return []
    key = max(beyond, key=lambda one: abs(beyond[one]))
    word = "louder" if beyond[key] > 0 else "quieter"
    return [
        f"level: {len(beyond)} of {len(changes)} utterances differ from their original by more than "
        f"{_LEVEL_TOLERANCE:g} dB; {key} is {abs(beyond[key]):.1f} dB {word}"
    ]


def heading(metric: str) -> str:
    """The metric's label, with its unit where it has one."""
    about = METRICS[metric]
    return f"{about.label} ({about.unit})" if about.unit else about.label


def score_texts(scores: Mapping[str, float], reasons: Mapping[str, str]) -> dict[str, str]:
    """One utterance's metrics by their headings: the value, or the reason why there is none."""
    return {
        heading(name): about.text(scores[name]) if name in scores else reasons[name]
        for name, about in METRICS.items()
        if name in scores or name in reasons
    }


def _cell(one: Group, metric: str) -> str:
    found = one.estimates.get(metric)
    if found is None:
        reasons = one.reasons.get(metric, {})
        return "not run" if reasons and all(reason.startswith("not run") for reason in reasons) else "-"
    text = METRICS[metric].text
    if found.low is None or found.high is None:
        return text(found.mean)
    return f"{text(found.mean)} ±{text((found.high - found.low) / 2)}"
