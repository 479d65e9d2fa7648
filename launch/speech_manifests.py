"""Unpacked Debian packages of speech and music to 24 kHz wav files and three manifests.

``train``: voices to learn. ``heard``: every twentieth file of those voices, kept aside. ``never_heard``: voices and
languages that training never meets: Czech, Dutch, Greek, Hungarian and Slovak in every package, and single voices of
other languages. All are in file order, so that the same packages give the same split.

    python launch/speech_manifests.py DIR      # reads DIR/unpacked/PACKAGE, writes DIR/wav and DIR/*.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import soundfile

from batch_tokenizer.audio.resampling import resample

SAMPLE_RATE = 24000
EVERY = 20
SHORTEST = 0.25  # seconds

#: Languages that no file of the training manifest may have.
NEVER_HEARD_LANGUAGES = frozenset({"cs", "nl", "el", "hu", "sk"})

#: Voices of other languages that are kept aside as a whole.
NEVER_HEARD_VOICES = frozenset({"carlo_flora", "july_jimenez", "tuxpaint_ro", "klettres_tn", "ktuberling_sl"})

#: Formats that name no codec in their contents.
HEADERLESS = {".g722": "g722", ".gsm": "gsm"}


@dataclass(frozen=True, slots=True)
class Package:
    """Recordings in a Debian package.

    Attributes:
        pattern: regular expression on a file's path in the package; its group ``lang``, if any, is the language.
        licence: of the recordings.
        voice: whose voice it is; ``{lang}`` stands for the language where a package has a voice for each.
        language: where the pattern has no group for it; ``music`` for music.
    """

    pattern: str
    licence: str
    voice: str
    language: str = ""


PACKAGES = {
    "festvox-ru": Package(r"/wav/.*\.wav$", "BSD-like", "shmyrev", "ru"),
    "asterisk-core-sounds-en-g722": Package(r"\.g722$", "CC-BY-SA-3.0", "allison_smith", "en"),
    "asterisk-core-sounds-es-g722": Package(r"\.g722$", "CC-BY-SA-3.0", "allison_smith", "es"),
    "asterisk-core-sounds-fr-g722": Package(r"\.g722$", "CC-BY-SA-3.0", "june_wallack", "fr"),
    "asterisk-core-sounds-it-g722": Package(r"\.g722$", "CC-BY-3.0", "carlo_flora", "it"),
    "asterisk-core-sounds-ru-g722": Package(r"\.g722$", "CC-BY-3.0", "ivrvoice_ru_f", "ru"),
    "asterisk-prompt-es-co": Package(r"\.gsm$", "GPL-2", "july_jimenez", "es"),
    "asterisk-prompt-fr-armelle": Package(r"\.gsm$", "BSD-3-Clause", "armelle_desjardins", "fr"),
    "asterisk-prompt-it-menardi-wav": Package(r"\.wav$", "CC-BY-SA-3.0-IT", "paola_dal_zot", "it"),
    "klettres-data": Package(r"/share/klettres/(?P<lang>\w+)/(alpha|syllab)/.*\.ogg$", "GPL-2+", "klettres_{lang}"),
    "ktuberling-data": Package(r"/sounds/(?P<lang>[a-z]+)(@\w+)?/.*\.(wav|ogg)$", "GPL-2+", "ktuberling_{lang}"),
    "tuxpaint-stamps-default": Package(r"_desc_?(?P<lang>[a-z]{2}(_[A-Z]{2})?)?\.(ogg|wav)$", "GPL-2", "tuxpaint_{lang}"),  # noqa: E501
    "gcin-voice": Package(r"/5\.ogg$", "CC-BY-3.0", "chu_lo", "zh"),
    "asterisk-moh-opsound-g722": Package(r"\.g722$", "CC-BY-SA-3.0", "music_opsound", "music"),
    "fillets-ng-data": Package(r"/music/.*\.ogg$", "GPL-2", "music_fillets", "music"),
    "fillets-ng-data-cs": Package(r"/sound/.*\.ogg$", "GPL-2", "fillets_cs", "cs"),
    "fillets-ng-data-nl": Package(r"/sound/.*\.ogg$", "GPL-2", "fillets_nl", "nl"),
}  # fmt: skip


def decode(source: Path) -> npt.NDArray[np.float32]:
    """Samples (S,) of any audio file at 24 kHz, mono."""
    with av.open(str(source), format=HEADERLESS.get(source.suffix), metadata_errors="replace") as container:
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
            yield source, package.language or match["lang"] or "en"


def manifest_of(row: dict[str, object], number: int) -> str:
    """Which manifest the ``number``-th file of a voice belongs to."""
    language = str(row["lang"])[:2]
    if language in NEVER_HEARD_LANGUAGES or row["speaker"] in NEVER_HEARD_VOICES:
        return "never_heard"
    return "heard" if number % EVERY == 0 and row["lang"] != "music" else "train"


def main() -> None:
    """Writes the wav files and the manifests."""
    folder = Path(sys.argv[1])
    counts: dict[str, int] = {}
    manifests: dict[str, list[dict[str, object]]] = {"train": [], "heard": [], "never_heard": []}
    for name, package in PACKAGES.items():
        for source, language in files(folder / "unpacked", name, package):
            try:
                samples = decode(source)
            except av.FFmpegError as error:
                print(f"left out: {source}: {error}", file=sys.stderr)
                continue
            peak = float(np.abs(samples).max(initial=0.0))
            if len(samples) < SHORTEST * SAMPLE_RATE or peak < 1e-3:
                continue
            target = folder / "wav" / source.relative_to(folder / "unpacked").with_suffix(".wav")
            target.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(target, samples * min(1.0, 0.99 / peak), SAMPLE_RATE, subtype="PCM_16")
            voice = package.voice.format(lang=language)
            counts[voice] = counts.get(voice, 0) + 1
            row: dict[str, object] = {
                "key": f"{voice}_{counts[voice]:05}", "wav": str(target), "lang": language, "speaker": voice,
                "duration": round(len(samples) / SAMPLE_RATE, 3), "source": name, "licence": package.licence,
            }  # fmt: skip
            manifests[manifest_of(row, counts[voice])].append(row)
    for title, rows in manifests.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{title}.jsonl").write_text(text, encoding="utf-8")
        minutes = sum(float(str(row["duration"])) for row in rows) / 60
        print(f"{title}: {len(rows)} files, {len({row['speaker'] for row in rows})} voices, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
