"""Unpacked Debian packages of speech enter; 16 kHz wav files and two manifests, ``train`` and ``held_out``, leave.

Held out are the Italian speaker as a whole, and every twentieth file of each other voice. Both are in file order, so
that the same packages give the same split.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import numpy as np
import soundfile

#: Language of a folder of prompts: speaker and licence.
PROMPTS = {
    "en": ("allison_smith", "CC-BY-SA-3.0"),
    "es": ("allison_smith", "CC-BY-SA-3.0"),
    "fr": ("june_wallack", "CC-BY-SA-3.0"),
    "it": ("carlo_flora", "CC-BY-3.0"),
    "ru": ("ivrvoice_ru_f", "CC-BY-3.0"),
}
FESTVOX = "usr/share/festival/voices/russian/msu_ru_nsh_clunits/wav"
HELD_OUT_LANGUAGE = "it"
EVERY = 20


def decode_g722(source: Path, target: Path) -> float:
    """A headerless G.722 file to a 16-bit wav at 16 kHz; its seconds."""
    with av.open(str(source), format="g722") as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    samples = np.concatenate(frames) if frames else np.zeros(0, np.int16)
    target.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(target, samples, 16000, subtype="PCM_16")
    return len(samples) / 16000


def collect(folder: Path) -> list[dict[str, object]]:
    """Rows of all speech under ``folder/unpacked``, in a fixed order."""
    rows: list[dict[str, object]] = []
    for wav in sorted((folder / "unpacked" / FESTVOX).glob("*.wav")):
        rows.append(
            {"key": wav.stem, "wav": str(wav), "duration": round(soundfile.info(wav).duration, 3), "lang": "ru",
             "speaker": "shmyrev", "source": "festvox-ru", "licence": "BSD-like"}
        )  # fmt: skip
    for language, (speaker, licence) in PROMPTS.items():
        sounds = folder / "unpacked/usr/share/asterisk/sounds"
        named = {
            "_".join(source.relative_to(voice).with_suffix(".wav").parts): source
            for voice in sounds.glob(f"{language}_*")
            for source in voice.rglob("*.g722")
            if not source.is_symlink()
        }
        for name in sorted(named):
            wav = folder / "wav" / language / name
            seconds = decode_g722(named[name], wav)
            if seconds >= 0.05:
                rows.append(
                    {"key": f"{language}_{wav.stem}", "wav": str(wav), "duration": round(seconds, 3), "lang": language,
                     "speaker": speaker, "source": f"asterisk-core-sounds-{language}-g722", "licence": licence}
                )  # fmt: skip
    return rows


def main() -> None:
    """Writes ``train.jsonl`` and ``held_out.jsonl``."""
    folder = Path(sys.argv[1])
    counts: dict[object, int] = {}
    manifests: dict[str, list[dict[str, object]]] = {"train": [], "held_out": []}
    for row in collect(folder):
        counts[row["source"]] = counts.get(row["source"], 0) + 1
        held_out = row["lang"] == HELD_OUT_LANGUAGE or counts[row["source"]] % EVERY == 0
        manifests["held_out" if held_out else "train"].append(row)
    for name, rows in manifests.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        minutes = sum(float(str(row["duration"])) for row in rows) / 60
        print(f"{name}: {len(rows)} files, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
