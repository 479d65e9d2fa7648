"""Model card and licence of a checkpoint that ``train_default.sh`` trained: ``python launch/model_card.py DIR``.

Reads ``DIR/train.jsonl``, ``DIR/run/log.jsonl`` and ``DIR/scores``; writes into ``DIR/run/checkpoint``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from speech_manifests import PACKAGES

from batch_tokenizer.quality.aggregates import ALL, Estimate, group

#: Metric of ``batch_tokenizer evaluate``: its heading and digits.
COLUMNS = {
    "stoi": ("STOI", 3),
    "pesq_wb": ("PESQ-WB", 2),
    "sim": ("SIM", 3),
    "mos": ("MOS predicted", 2),
    "level_change": ("level, dB", 1),
}

#: Notices that the terms of a package ask to be kept.
NOTICES = {
    "festvox-ru": """
> Nickolay V. Shmyrev, Copyright (c) 2005, All Rights Reserved. Permission is hereby granted, free of charge, to use
> and distribute this software and its documentation without restriction, including without limitation the rights to
> use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of this work, and to permit persons to
> whom this work is furnished to do so, subject to the following conditions: 1. The code must retain the above
> copyright notice, this list of conditions and the following disclaimer. 2. Any modifications must be clearly marked
> as such. 3. Original authors' names are not deleted. 4. The authors' names are not used to endorse or promote
> products derived from this software without specific prior written permission. THE AUTHOR AND THE CONTRIBUTORS TO
> THIS WORK DISCLAIM ALL WARRANTIES WITH REGARD TO THIS SOFTWARE, INCLUDING ALL IMPLIED WARRANTIES OF MERCHANTABILITY
> AND FITNESS, IN NO EVENT SHALL THE UNIVERSITY OF EDINBURGH NOR THE CONTRIBUTORS BE LIABLE FOR ANY SPECIAL, INDIRECT
> OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN ACTION
> OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR PERFORMANCE OF
> THIS SOFTWARE.
""",
    "asterisk-prompt-fr-armelle": """
> Copyright (C) 2006 Michel Gutierrez. Redistribution and use, with or without modification, are permitted provided
> that the following conditions are met: 1. Redistributions must retain the above copyright notice, this list of
> conditions and the following disclaimer. 2. Neither the name of the Indigen Solutions nor the names of its
> contributors, contractors and employees may be used to endorse or promote products derived from this software
> without specific prior written permission. THIS SOFTWARE IS PROVIDED BY THE REGENTS AND CONTRIBUTORS "AS IS" AND ANY
> EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS
> FOR A PARTICULAR PURPOSE ARE DISCLAIMED. IN NO EVENT SHALL THE REGENTS OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT,
> INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF
> SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY
> THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN
> ANY WAY OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
""",
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def data_table(rows: list[dict[str, Any]]) -> str:
    """A line for each package that training used: files, hours, licence and credit."""
    lines = ["| package | files | hours | licence | credit |", "|---|---|---|---|---|"]
    for name, package in PACKAGES.items():
        seconds = [row["duration"] for row in rows if row["source"] == name]
        if seconds:
            hours = f"{sum(seconds) / 3600:.2f}"
            lines.append(f"| `{name}` | {len(seconds)} | {hours} | {package.licence} | © {package.credit} |")
    return "\n".join(lines)


def score_table(folder: Path) -> str:
    """A line for each voice, then each kind of voices, and number of codebooks, from what ``evaluate`` wrote.

    Means with half of the 95 % interval where there is one.
    """
    records = [record for record in read_lines(folder / "utterances.jsonl") if "scores" in record]
    last = {(record["key"], record["num_quantizers"]): record for record in records}
    groups = [one for by in ("voice", "kind") for one in group(last.values(), by) if one.name != ALL]
    names = [name for name in COLUMNS if any(name in one.estimates for one in groups)]
    headings = " | ".join(COLUMNS[name][0] for name in names)
    lines = [f"| voice | n | codebooks | {headings} |", "|---|---|---|" + "---|" * len(names)]
    for one in groups:
        by, voice = one.name.split("=", 1)
        title = voice if by == "voice" else f"**all {voice}**"
        cells = [cell(one.estimates.get(name), COLUMNS[name][1]) for name in names]
        lines.append(f"| {title} | {one.count} | {one.num_quantizers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(estimate: Estimate | None, digits: int) -> str:
    """An estimate as text."""
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f} ±{(estimate.high - estimate.low) / 2:.{digits}f}"


def licence(rows: list[dict[str, Any]]) -> str:
    """The text of the weights' licence file."""
    sources = {row["source"] for row in rows}
    notices = "\n".join(f"Notice of {name}:\n{notice}" for name, notice in NOTICES.items() if name in sources)
    return f"""The weights in this folder are under Creative Commons Attribution-ShareAlike 4.0 International,
https://creativecommons.org/licenses/by-sa/4.0/legalcode (SPDX: CC-BY-SA-4.0).

They were trained from random weights on these recordings. CC BY-SA 3.0 allows adaptations under a later version of the
licence, CC BY 3.0 and the BSD terms allow them under any that keeps the notices below.

{data_table(rows)}

{notices}"""


def card(folder: Path, rows: list[dict[str, Any]]) -> str:
    """The model card: data, figures by voice, how it was trained."""
    steps = [line for line in read_lines(folder / "run" / "log.jsonl") if "hours" in line]
    trained = f"{steps[-1]['step']} steps, {steps[-1]['hours']} hours of audio" if steps else "less than one log line"
    hours = sum(row["duration"] for row in rows) / 3600
    return f"""# A tokenizer trained by `launch/train_default.sh`

Trained from random weights: {trained}. `config.json` has its shape, `LICENSE` its licence (CC BY-SA 4.0)
and credits.

## Figures

Clips of 2 to 8 s, none used in training. "never heard": no recording of that voice was in training. ± is half the 95 %
bootstrap interval of the mean.

{score_table(folder / "scores")}

## Data

{hours:.1f} hours. No recording is in this folder, and none of those under the GPL was used in training.

{data_table(rows)}
"""


def main() -> None:
    """Writes ``README.md`` and ``LICENSE`` beside the weights."""
    folder = Path(sys.argv[1])
    rows = read_lines(folder / "train.jsonl")
    checkpoint = folder / "run" / "checkpoint"
    (checkpoint / "LICENSE").write_text(licence(rows), encoding="utf-8")
    (checkpoint / "README.md").write_text(card(folder, rows), encoding="utf-8")
    print(f"{checkpoint}: model card and licence written")


if __name__ == "__main__":
    main()
