"""Debian packages of speech and music: what the default model learns from, and how it is split.

``train``: voices to learn. ``heard``: every twentieth file of those voices, kept aside. ``never_heard``: voices and
languages that training never meets, among them all Czech, Dutch, Romanian and Greek. ``scored``: a few clips of each
voice of the last two, for the scores of the model card. All are in file order: the same packages give the same split.

Recordings to learn from are under CC BY, CC BY-SA or BSD terms, which weights under CC BY-SA 4.0 satisfy. Recordings
under the GPL or other terms are only scored.

    python launch/speech_manifests.py DIR      # reads DIR/unpacked/PACKAGE, writes DIR/wav and DIR/*.jsonl
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import soundfile

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.audio.resampling import resample
from batch_tokenizer.records import RowError
from batch_tokenizer.storage.atomic import replace_file

SAMPLE_RATE = 24000

#: Of a voice that training learns, every so many-th file is kept aside.
EVERY = 20

SHORTEST = 0.25  # seconds

#: Length in seconds of the clips that are scored.
SCORED_SECONDS = (2.0, 8.0)

#: Formats that name no codec in their contents.
HEADERLESS = {".g722": "g722", ".gsm": "gsm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """Recordings in a Debian package.

    Attributes:
        pattern: regular expression on a file's path in the package.
        licence: of the recordings, as the package's copyright file has it.
        credit: authors and years, from the same place.
        voice: whose voice it is; ``{lang}`` stands for the language.
        language: of the recordings; ``music`` for music; empty where the pattern's group ``lang`` has it.
        learn: whether training may use it; otherwise all of it is never heard.
    """

    pattern: str
    licence: str
    credit: str
    voice: str
    language: str = ""
    learn: bool = True


PACKAGES = {
    "festvox-ru": Package(
        pattern=r"/wav/.*\.wav$", voice="shmyrev", language="ru",
        licence="BSD-like", credit="Nickolay V. Shmyrev, 2005",
    ),
    "asterisk-core-sounds-en-g722": Package(
        pattern=r"\.g722$", voice="allison_smith", language="en",
        licence="CC-BY-SA-3.0", credit="Allison Smith, 2003-2010; financed by Digium, Inc.",
    ),
    "asterisk-core-sounds-es-g722": Package(
        pattern=r"\.g722$", voice="allison_smith", language="es",
        licence="CC-BY-SA-3.0", credit="Allison Smith, 2003-2010; financed by Digium, Inc.",
    ),
    "asterisk-core-sounds-fr-g722": Package(
        pattern=r"\.g722$", voice="june_wallack", language="fr",
        licence="CC-BY-SA-3.0",
        credit="June Wallack, 2006-2008; translated by Clod Patry, Kristopher Lalletti and June Wallack; "
        "financed by Digium, Inc., Unlimitel and BGM Informatique",
    ),
    "asterisk-core-sounds-ru-g722": Package(
        pattern=r"\.g722$", voice="ivrvoice_ru_f", language="ru",
        licence="CC-BY-3.0", credit="provided by Maxim Topal, http://www.ivrvoice.ru, 2010",
    ),
    "asterisk-prompt-it-menardi-wav": Package(
        pattern=r"\.wav$", voice="paola_dal_zot", language="it",
        licence="CC-BY-SA-3.0-IT",
        credit="Marco Menardi and Paola Dal Zot, 2006-2011, http://www.voip.ammdomus.it; English text by Digium, Inc.",
    ),
    "asterisk-prompt-fr-armelle": Package(
        pattern=r"\.gsm$", voice="armelle_desjardins", language="fr",
        licence="BSD-2-Clause-like", credit="Michel Gutierrez, 2006; voice of Armelle Desjardins",
    ),
    "gcin-voice": Package(
        pattern=r"/5\.ogg$", voice="chu_lo", language="zh",
        licence="CC-BY-3.0", credit="ChionMeilin, with the voice of Chu Lo",
    ),
    "asterisk-moh-opsound-g722": Package(
        pattern=r"\.g722$", voice="music_opsound", language="music",
        licence="CC-BY-SA-3.0",
        credit="Paul Shuler (Macroform), 2009; Manolo Camp, 2009; Reno Project, 2008",
    ),
    "asterisk-core-sounds-it-g722": Package(
        pattern=r"\.g722$", voice="carlo_flora", language="it", learn=False,
        licence="CC-BY-3.0", credit="Carlo Flora, 2012; translated by Silvia Petrin",
    ),
    "asterisk-prompt-es-co": Package(
        pattern=r"\.gsm$", voice="july_jimenez", language="es", learn=False,
        licence="GPL-2.0-only", credit="Avatar Ltda. and July E. Jiménez, 2006",
    ),
    "tuxpaint-stamps-default": Package(
        pattern=r"_desc_(?P<lang>ro|el)\.(ogg|wav)$", voice="tuxpaint_{lang}", learn=False,
        licence="GPL-2.0-or-later", credit="Bill Kendrick and contributors, 2002-2022",
    ),
    "fillets-ng-data-cs": Package(
        pattern=r"/sound/.*\.ogg$", voice="fillets_cs", language="cs", learn=False,
        licence="GPL-2.0-only", credit="ALTAR interactive, Ivo and Pavel Danihelka and contributors",
    ),
    "fillets-ng-data-nl": Package(
        pattern=r"/sound/.*\.ogg$", voice="fillets_nl", language="nl", learn=False,
        licence="GPL-2.0-only", credit="ALTAR interactive, Ivo and Pavel Danihelka and contributors",
    ),
}  # fmt: skip


def chosen_packages() -> dict[str, Package]:
    """All packages, or those that the environment's ``PACKAGES`` names.

    Raises:
        SystemExit: it names one that is not in the list.
    """
    names = os.environ.get("PACKAGES", "").split() or list(PACKAGES)
    unknown = sorted(set(names) - set(PACKAGES))
    if unknown:
        raise SystemExit(f"PACKAGES: {', '.join(unknown)}: not one of {', '.join(PACKAGES)}")
    return {name: package for name, package in PACKAGES.items() if name in names}


def decode(source: Path) -> npt.NDArray[np.float32]:
    """Samples (S,) of any audio file at 24 kHz, mono.

    Raises:
        RowError: it cannot be decoded.
        av.FFmpegError: likewise, of a format without a header.
    """
    if source.suffix not in HEADERLESS:
        return load_samples(str(source), SAMPLE_RATE, "soxr")
    with av.open(str(source), format=HEADERLESS[source.suffix]) as container:
        mono = av.AudioResampler(format="flt", layout="mono")
        pieces = [piece.to_ndarray()[0] for frame in container.decode(audio=0) for piece in mono.resample(frame)]
        rate = container.streams.audio[0].rate
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return resample(samples[None], rate, SAMPLE_RATE, "soxr")[0] if rate != SAMPLE_RATE else samples


def files(folder: Path, name: str, package: Package) -> Iterator[tuple[Path, str]]:
    """Files of a package in order, each with its language."""
    for source in sorted((folder / name).rglob("*")):
        match = re.search(package.pattern, source.as_posix())
        if match and source.is_file() and not source.is_symlink():
            yield source, package.language or match["lang"]


def manifest_of(package: Package, number: int) -> str:
    """Which manifest the ``number``-th file of a voice belongs to."""
    if not package.learn:
        return "never_heard"
    return "heard" if number % EVERY == 0 and package.language != "music" else "train"


def scored(manifests: dict[str, list[dict[str, object]]], clips: int) -> list[dict[str, object]]:
    """Up to ``clips`` rows of each voice kept aside, evenly spread, with the fields ``kind`` and ``voice``."""
    shortest, longest = SCORED_SECONDS
    chosen = []
    for kind, title in (("never_heard", "never heard"), ("heard", "heard")):
        voices: dict[str, list[dict[str, object]]] = {}
        for row in manifests[kind]:
            if shortest <= float(str(row["duration"])) <= longest:
                voices.setdefault(str(row["speaker"]), []).append(row)
        for voice, rows in voices.items():
            more = {"kind": title, "voice": f"{title}: {voice}"}
            chosen += [{**row, **more} for row in rows[:: max(1, len(rows) // clips)][:clips]]
    return chosen


def write_wav(source: Path, target: Path) -> float | None:
    """Decodes a file. Returns its length in seconds; None, and nothing written, where it is too short or silent.

    Raises:
        RowError, av.FFmpegError: it cannot be decoded.
    """
    samples = decode(source)
    peak = float(np.abs(samples).max(initial=0.0))
    if len(samples) < SHORTEST * SAMPLE_RATE or peak < 1e-3:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(target, samples * min(1.0, 0.99 / peak), SAMPLE_RATE, subtype="PCM_16")
    return len(samples) / SAMPLE_RATE


def main() -> None:
    """Writes the wav files and the manifests."""
    folder = Path(sys.argv[1])
    counts: Counter[str] = Counter()
    manifests: dict[str, list[dict[str, object]]] = {"train": [], "heard": [], "never_heard": []}
    for name, package in chosen_packages().items():
        for source, language in files(folder / "unpacked", name, package):
            target = folder / "wav" / source.relative_to(folder / "unpacked").with_suffix(".wav")
            try:
                seconds = write_wav(source, target)
            except (RowError, av.FFmpegError) as error:
                print(f"left out: {source}: {error}", file=sys.stderr)
                continue
            if seconds is None:
                continue
            voice = package.voice.format(lang=language)
            counts[voice] += 1
            manifests[manifest_of(package, counts[voice])].append({
                "key": f"{voice}_{counts[voice]:05}", "wav": str(target), "lang": language, "speaker": voice,
                "duration": round(seconds, 3), "source": name, "licence": package.licence,
            })  # fmt: skip
    manifests["scored"] = scored(manifests, int(os.environ.get("CLIPS", "10")))
    for title, rows in manifests.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_file(folder / f"{title}.jsonl", text.encode())
        minutes = sum(float(str(row["duration"])) for row in rows) / 60
        print(f"{title}: {len(rows)} files, {len({row['speaker'] for row in rows})} voices, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
