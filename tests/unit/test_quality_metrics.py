"""The metrics: known inputs give known numbers, the libraries' own numbers, or a reason."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import soundfile

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.quality import recordings
from batch_tokenizer.quality.metrics import METRICS, Scorer
from batch_tokenizer.quality.recordings import MOST_SECONDS, Recording, align, load_beginning
from batch_tokenizer.records import AudioCut, RowError
from tests.conftest import ROOT

RATE = 24000
INTRUSIVE = ("stoi", "estoi", "si_sdr", "mel_distance")


@pytest.fixture(scope="module")
def speech():
    return load_samples(str(ROOT / "sample_data" / "clips" / "it-01.wav"), RATE)


def score(original, made, *names, rate=RATE):
    return Scorer(names).score(Recording(original, rate), Recording(made, rate))


def with_noise(samples, db, seed=0):
    noise = np.random.default_rng(seed).standard_normal(len(samples)).astype(np.float32)
    return samples + noise * np.float32(np.sqrt(np.mean(samples**2)) * 10 ** (-db / 20))


def test_identical_recordings_get_the_best_values(speech):
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    best = {
        "pesq_nb": 4.549, "pesq_wb": 4.644, "stoi": 1.0, "estoi": 1.0, "si_sdr": 100.0, "mel_distance": 0.0,
        "level_change": 0.0, "clipped": 0.0,
    }  # fmt: skip
    assert best.keys() >= set(INTRUSIVE)
    assert score(speech, speech.copy(), *best).values == pytest.approx(best, abs=2e-3)


def test_more_noise_is_worse(speech):
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    names = ("pesq_wb", *INTRUSIVE)
    steps = [score(speech, with_noise(speech, db), *names).values for db in (40, 20, 5)]
    for name in names:
        sign = 1 if METRICS[name].higher_is_better else -1
        worse = [sign * step[name] for step in steps]
        assert worse[0] > worse[1] > worse[2], name


def test_si_sdr_of_known_noise_and_any_scale(speech):
    made = with_noise(speech, 20)
    value = score(speech, made, "si_sdr").values["si_sdr"]
    assert value == pytest.approx(20, abs=0.3)
    assert score(speech, -0.25 * made, "si_sdr").values["si_sdr"] == pytest.approx(value, abs=1e-3)
    assert score(speech, with_noise(speech, 20) + 0.1, "si_sdr").values["si_sdr"] == pytest.approx(value, abs=1e-3)


def test_pesq_and_stoi_agree_with_their_libraries(speech):
    pesq, pystoi = pytest.importorskip("pesq"), pytest.importorskip("pystoi")
    original = load_samples(str(ROOT / "sample_data" / "clips" / "it-01.wav"), 16000)
    made = with_noise(original, 15)
    values = score(original, made, "pesq_wb", "stoi", "estoi", rate=16000).values
    assert values["pesq_wb"] == pesq.pesq(16000, original, made, "wb")
    assert values["stoi"] == pytest.approx(pystoi.stoi(original, made, 16000), abs=1e-9)
    assert values["estoi"] == pytest.approx(pystoi.stoi(original, made, 16000, extended=True), abs=1e-9)
    narrow = original[::2].copy(), made[::2].copy()
    assert score(*narrow, "pesq_nb", rate=8000).values["pesq_nb"] == pesq.pesq(8000, *narrow, "nb")


def test_levels_and_clipping():
    original = np.full(1000, 0.5, np.float32)
    made = np.concatenate([np.full(250, 1.0), np.full(750, 0.05)]).astype(np.float32)
    values = score(original, made, "level_change", "clipped", "clipped_original").values
    assert values["clipped"] == 25
    assert values["clipped_original"] == 0
    quieter = score(original, original / 2, "level_change").values["level_change"]
    assert quieter == pytest.approx(20 * math.log10(0.5))


HOSTILE = {
    "silence": lambda x: (np.zeros_like(x), x),
    "silent reconstruction": lambda x: (x, np.zeros_like(x)),
    "both silent": lambda x: (np.zeros_like(x), np.zeros_like(x)),
    "a tenth of a second": lambda x: (x[30000:32400], x[30000:32400]),
    "one sample": lambda x: (x[30000:30001], x[30000:30001]),
    "constant": lambda x: (np.full_like(x, 0.3), x),
    "clipped": lambda x: (np.clip(x * 100, -1, 1), x),
    "a click in silence": lambda x: (np.eye(1, len(x), 20000, dtype=np.float32)[0], x),
    "8 kHz band": lambda x: (low_band(x), x),
}


def low_band(samples):
    spectrum = np.fft.rfft(samples)
    spectrum[int(len(spectrum) * 4000 / (RATE / 2)) :] = 0
    return np.fft.irfft(spectrum, len(samples)).astype(np.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_gives_a_finite_value_or_a_reason(speech, name):
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    original, made = HOSTILE[name](speech[: 2 * RATE])
    names = tuple(metric for metric in METRICS if metric not in ("sim", "mos", "mos_original"))
    scores = score(original, made, *names)
    assert set(scores.values) | set(scores.reasons) == set(names)
    assert not set(scores.values) & set(scores.reasons)
    assert all(math.isfinite(value) for value in scores.values.values())
    assert all(scores.reasons.values())
    assert not scores.missing
    if name in ("8 kHz band", "clipped"):
        assert not scores.reasons
    if name == "silence":
        assert scores.reasons["pesq_wb"] == scores.reasons["stoi"] == "the original is silent"
    if name == "silent reconstruction":
        # Silence made of speech is as bad as can be; it must weigh in the mean.
        assert scores.values["si_sdr"] == -60
        assert scores.values["stoi"] < 0.1
    if name == "a tenth of a second":
        assert "0.25 s" in scores.reasons["pesq_nb"]
        assert "0.4 s" in scores.reasons["stoi"]


def test_long_recordings_do_not_crash_pesq(speech):
    """Its C code dies on a recording of many sentences, so it gets pieces."""
    pytest.importorskip("pesq")
    long = np.tile(speech, 12)
    values = score(long, with_noise(long, 20), "pesq_nb").values
    assert 1 < values["pesq_nb"] < 4.5


def test_a_missing_library_is_a_reason_with_a_remedy(speech, monkeypatch):
    monkeypatch.setitem(sys.modules, "pystoi", None)
    scores = score(speech, speech, "stoi", "si_sdr")
    assert scores.reasons["stoi"].startswith("not run: pystoi")
    assert "pip install" in scores.reasons["stoi"]
    assert scores.missing == {"stoi"}
    assert "si_sdr" in scores.values


def test_predicted_mos_prefers_the_clean_recording(speech):
    pytest.importorskip("distillmos")
    values = score(speech, with_noise(speech, 5), "mos", "mos_original").values
    assert 1 <= values["mos"] < values["mos_original"] <= 5


@pytest.mark.slow
def test_speaker_similarity_by_the_model_of_a_wheel(speech):
    pytest.importorskip("resemblyzer", exc_type=ImportError)
    other = load_samples(str(ROOT / "sample_data" / "clips" / "ru-01.wav"), RATE)[: len(speech)]
    scorer = Scorer(("sim",), "resemblyzer")
    same = scorer.score(Recording(speech, RATE), Recording(speech.copy(), RATE)).values["sim"]
    cross = scorer.score(Recording(speech[: len(other)], RATE), Recording(other, RATE)).values["sim"]
    assert same == pytest.approx(1, abs=1e-4)
    assert cross < 0.9


def test_speaker_similarity_by_a_model_on_disk(speech, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, tdnn_dim=(8, 8), tdnn_kernel=(3, 1),
        tdnn_dilation=(1, 1), xvector_output_dim=8, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.WavLMForXVector(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    clip = speech[:RATE]
    scores = Scorer(("sim",), str(tmp_path)).score(Recording(clip, RATE), Recording(clip.copy(), RATE))
    assert scores.values["sim"] == pytest.approx(1, abs=1e-5)
    absent = Scorer(("sim",), str(tmp_path / "none")).score(Recording(clip, RATE), Recording(clip, RATE))
    assert "cannot be loaded" in absent.reasons["sim"]


class TestAlignment:
    def test_equal_lengths_come_out(self):
        original, made = align(np.ones(1000, np.float32), [np.ones(1900, np.float32), np.ones(900, np.float32)], RATE)
        assert len(original.samples) == 900
        assert [len(one.samples) for one in made] == [900, 900]

    def test_a_wrong_sample_rate_is_told(self, tmp_path, speech):
        soundfile.write(tmp_path / "half.wav", speech, RATE // 2)
        slow = load_samples(str(tmp_path / "half.wav"), RATE)
        with pytest.raises(RowError, match="sample rate"):
            align(speech, [slow], RATE)

    @pytest.mark.parametrize("bad", [np.zeros(0, np.float32), np.full(1000, np.nan, np.float32)])
    def test_no_samples_and_no_numbers(self, bad):
        with pytest.raises(RowError, match="samples"):
            align(np.ones(1000, np.float32), [bad], RATE)

    def test_long_recordings_are_cut(self):
        long = np.ones(int((MOST_SECONDS + 3) * 1000), np.float32)
        original, _ = align(long, [long], 1000)
        assert original.seconds == MOST_SECONDS

    @pytest.mark.parametrize("cut", [None, AudioCut(1.5, None, 1), AudioCut(0.25, 122.75), AudioCut(1, 90)])
    def test_only_the_beginning_of_a_long_file_is_loaded(self, tmp_path, cut, monkeypatch):
        path, rate = str(tmp_path / "long.wav"), 1000
        soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, (123 * 1500, 2)), 1500)
        whole = load_samples(path, rate, cut=cut)
        held = []

        def load(*words, **more):
            held.append(load_samples(*words, **more))
            return held[-1]

        monkeypatch.setattr(recordings, "load_samples", load)
        beginning, length = load_beginning(path, rate, "reference", cut)
        assert length == len(whole)
        np.testing.assert_array_equal(beginning, whole[: int(MOST_SECONDS * rate)])
        assert [len(one) for one in held] == [min(len(whole), MOST_SECONDS * rate)]
        original, _ = align(beginning, [beginning], rate, [length, length])
        assert original.seconds == min(length / rate, MOST_SECONDS)
        with pytest.raises(RowError, match="another utterance"):
            align(beginning, [beginning], rate, [length, length - rate])
