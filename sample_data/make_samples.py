#!/usr/bin/env python3
"""Make ``clips/``, ``data.jsonl`` and the table in ``LICENCES.md`` from Debian's speech packages.

Usage: ``python sample_data/make_samples.py FOLDER`` with ffmpeg and ffprobe on the path. FOLDER receives the packages
(``apt-get download`` and ``dpkg -x``; nothing is installed), unless they already lie unpacked there, one folder each.
Encoders differ between versions of ffmpeg, so the lossy clips come out the same to the ear, not to the bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

ITALIAN, RUSSIAN, FESTVOX = "asterisk-core-sounds-it-g722", "asterisk-core-sounds-ru-g722", "festvox-ru"
VOICE_FOLDER = {
    ITALIAN: "usr/share/asterisk/sounds/it_IT_m_Carlo",
    RUSSIAN: "usr/share/asterisk/sounds/ru_RU_f_IvrvoiceRU",
    FESTVOX: "usr/share/festival/voices/russian/msu_ru_nsh_clunits/wav",
}
AUTHOR = {ITALIAN: "Carlo Flora", RUSSIAN: "Maxim Topal", FESTVOX: "Nickolay V. Shmyrev"}
LICENCE = {ITALIAN: "CC-BY 3.0", RUSSIAN: "CC-BY 3.0", FESTVOX: "BSD-like, text below"}

TABLE_HEAD = "| clip | package and file | author | licence | changes made |\n|---|---|---|---|---|\n"

#: What ffmpeg does with the one channel of the original.
LAYOUT_FILTER = {
    "mono": "anull",
    "stereo": "pan=stereo|c0=c0|c1=0.6*c0",
    "5.1": "pan=5.1|FL=0.5*c0|FR=0.4*c0|FC=c0|LFE=0*c0|BL=0.1*c0|BR=0.1*c0",
}


@dataclass(frozen=True)
class Clip:
    """One clip: where it comes from, what is done to it, and what is said in it."""

    key: str
    package: str
    source: str
    suffix: str
    encoder: str
    rate: int
    text: str
    layout: str = "mono"
    samples: int | None = None


CLIPS = (
    Clip("it-01", ITALIAN, "demo-thanks.g722", "wav", "pcm_s16le", 16000,
         "Arrivederci. Grazie per aver provato il PBX Open Source Asterisk.", samples=71001),
    Clip("it-02", ITALIAN, "vm-msgsaved.g722", "wav", "pcm_s24le", 48000,
         "Il suo messaggio è stato salvato.", layout="stereo", samples=79000),
    Clip("it-03", ITALIAN, "auth-incorrect.g722", "flac", "flac", 44100,
         "Password errata. Prego digitare la password seguita dal tasto cancelletto."),
    Clip("it-04", ITALIAN, "demo-moreinfo.g722", "opus", "libopus", 48000,
         "Asterisk è una piattaforma pbx e ivr completa e open source che funziona sul sistema operativo linux. "
         "Per ulteriori informazioni, visitare www.asterisk.org."),
    Clip("it-05", ITALIAN, "tt-weasels.g722", "flac", "flac", 48000,
         "Le donnole hanno mangiato il nostro sistema telefonico.", layout="5.1"),
    Clip("it-06", ITALIAN, "hello.g722", "wav", "pcm_s16le", 8000, "Ciao.", samples=3719),
    Clip("ru-01", FESTVOX, "ru_0154.wav", "wav", "pcm_f32le", 22050,
         "До сих пор там ещё видны холмы из рыбьих костей."),
    Clip("ru-02", RUSSIAN, "dir-instr.g722", "mp3", "libmp3lame", 44100,
         "Если вы нашли необходимого человека - нажмите 1. Если нет - нажмите «звёздочку».", layout="stereo"),
    Clip("ru-03", FESTVOX, "ru_0727.wav", "ogg", "libvorbis", 22050,
         "Жоффруа де Шарнэ. - А это уж вообще, сказал я. - Де Шарнэ, это товарищ Молэ, гроссмейстера храмовников."),
    Clip("ru-04", RUSSIAN, "vm-newuser.g722", "m4a", "aac", 44100,
         "Добро пожаловать в голосовую почту! Для начала прослушайте инструкцию по настройке ящика."),
    Clip("ru-05", FESTVOX, "ru_0058.wav", "wav", "pcm_s16le", 24000,
         "Осенний ветер над Катей, лежащей в земле, под крестом.", samples=120960),
    Clip("ru-06", RUSSIAN, "digits/3.g722", "wav", "pcm_s16le", 44100, "три"),
)  # fmt: skip


def fetch(packages: Path) -> None:
    """Download and unpack what is not there yet."""
    packages.mkdir(parents=True, exist_ok=True)
    for package in VOICE_FOLDER:
        if (packages / package).is_dir():
            continue
        subprocess.run(["apt-get", "download", package], cwd=packages, check=True)
        archive = next(packages.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", archive.name, package], cwd=packages, check=True)


def convert(clip: Clip, packages: Path) -> float:
    """Write the clip and return its duration in seconds."""
    source = packages / clip.package / VOICE_FOLDER[clip.package] / clip.source
    target = HERE / "clips" / f"{clip.key}.{clip.suffix}"
    quality = {"libopus": ["-b:a", "32k"], "libmp3lame": ["-b:a", "64k"], "aac": ["-b:a", "64k"]}.get(clip.encoder, [])
    cut = [f"atrim=end_sample={clip.samples}"] if clip.samples else []
    filters = ",".join([LAYOUT_FILTER[clip.layout], f"aresample={clip.rate}", *cut])
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-y", "-i", str(source), "-af", filters]
    command += ["-map_metadata", "-1", "-fflags", "+bitexact", "-flags:a", "+bitexact", "-c:a", clip.encoder]
    subprocess.run([*command, *quality, str(target)], check=True)
    probe = ["ffprobe", "-loglevel", "error", "-show_entries", "format=duration", "-of", "csv=p=0", str(target)]
    return round(float(subprocess.run(probe, check=True, capture_output=True, text=True).stdout), 3)


def changes(clip: Clip) -> str:
    """What was done to the original, for the licence note."""
    first = "decoded from G.722, " if clip.source.endswith("g722") else ""
    layout = {"mono": "", "stereo": "a second, quieter channel added, ", "5.1": "spread over 5.1 channels, "}[
        clip.layout
    ]
    cut = f"cut to {clip.samples} samples, " if clip.samples else ""
    return f"{first}{layout}resampled to {clip.rate} Hz, {cut}encoded as {clip.encoder}"


def main() -> None:
    """Make everything."""
    packages = Path(sys.argv[1])
    fetch(packages)
    (HERE / "clips").mkdir(exist_ok=True)
    rows, lines = [], []
    for clip in CLIPS:
        duration = convert(clip, packages)
        path = f"sample_data/clips/{clip.key}.{clip.suffix}"
        rows.append(
            {
                "key": clip.key,
                "wav": path,
                "quantized_tokens": f"sample_data/out/{clip.key}.json",
                "reconstructed_wav": f"sample_data/out/{clip.key}.wav",
                "language": clip.key[:2],
                "speaker": AUTHOR[clip.package],
                "text": clip.text,
                "duration": duration,
            }
        )
        lines.append(
            f"| `clips/{clip.key}.{clip.suffix}` | {clip.package}, `{clip.source}` | {AUTHOR[clip.package]} "
            f"| {LICENCE[clip.package]} | {changes(clip)} |"
        )
    manifest = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / "data.jsonl").write_text(manifest, encoding="utf-8")
    note = HERE / "LICENCES.md"
    before, _, rest = note.read_text(encoding="utf-8").partition(TABLE_HEAD)
    after = rest[rest.index("\n\n") :]
    note.write_text(before + TABLE_HEAD + "\n".join(lines) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
