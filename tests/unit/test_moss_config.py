"""A MOSS ``config.json``: what it implies, and that what is wrong in it is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.moss.codec import open_spec
from batch_tokenizer.codecs.moss.config import MossConfig, TransformerStage
from batch_tokenizer.records import RunError
from tests.support.moss import patch, stage, tiny, write_moss_checkpoint

ABSENT = object()


def changed(path: str, value: Any) -> dict[str, Any]:
    """``tiny()`` with one key, such as ``encoder_kwargs.1.norm``, set or removed."""
    config = json.loads(json.dumps(tiny()))
    *parents, key = path.split(".")
    holder = config
    for parent in parents:
        holder = holder[int(parent)] if isinstance(holder, list) else holder[parent]
    place = int(key) if isinstance(holder, list) else key
    if value is ABSENT:
        del holder[place]
    else:
        holder[place] = value
    return config


def test_windows_follow_the_rate_at_each_stage():
    config = MossConfig.from_json(tiny(causal_transformer_context_duration=0.5))
    stages = [stage for stage in (*config.encoder, *config.decoder) if isinstance(stage, TransformerStage)]
    assert [(stage.rate, stage.context) for stage in stages] == [(4, 50), (1, 12), (1, 12), (4, 50)]
    own = MossConfig.from_json(changed("encoder_kwargs.3.context_duration", 2)).encoder[3]
    assert isinstance(own, TransformerStage)
    assert own.context == 50


def test_frames_are_counted_up():
    config = MossConfig.from_json(tiny())
    assert [config.num_frames(samples) for samples in (1, 640, 641, 1280)] == [1, 1, 2, 2]
    assert config.frame_rate == 25


@pytest.mark.parametrize("kind", ["rlfq", "random_prefix_rlfq"])
def test_quantizers_that_are_the_same_at_inference(kind):
    MossConfig.from_json(changed("quantizer_type", kind))
    MossConfig.from_json(changed("quantizer_kwargs.quantizer_type", kind))


def stereo(**changes: Any) -> dict[str, Any]:
    """``tiny()`` for two channels: half the samples a frame in each."""
    return tiny(downsample_rate=320, number_channels=2, enable_channel_interleave=True, **changes)


def test_two_channels_are_one_sequence_of_twice_the_rate():
    config = MossConfig.from_json(stereo(sampling_rate=8000))
    mono = MossConfig.from_json(tiny(sampling_rate=16000))
    assert (config.channels, config.downsample_rate, config.rows_per_frame) == (2, 320, 640)
    assert (config.encoder, config.decoder, config.frame_rate) == (mono.encoder, mono.decoder, 25)
    assert config.num_frames(321) == 2


def test_channels_by_other_names_and_by_none():
    whole = MossConfig.from_json(stereo())
    for name in ("channels_numbers", "num_channels"):
        config = stereo()
        config[name] = config.pop("number_channels")
        assert MossConfig.from_json(config) == whole
    silent = stereo()
    del silent["number_channels"]
    assert MossConfig.from_json(silent) == whole
    with pytest.raises(RunError, match="enable_channel_interleave = False: only True is known"):
        MossConfig.from_json({**stereo(), "enable_channel_interleave": False})
    assert MossConfig.from_json(tiny(number_channels=1, enable_channel_interleave=False)).channels == 1


def test_windows_are_rounded_in_v2_and_truncated_in_v1():
    first = MossConfig.from_json(tiny(causal_transformer_context_duration=0.516)).encoder
    later = MossConfig.from_json(tiny(causal_transformer_context_duration=0.516, number_channels=1)).encoder
    contexts = [[stage.context for stage in part if isinstance(stage, TransformerStage)] for part in (first, later)]
    assert contexts == [[51, 12], [52, 13]]
    half = MossConfig.from_json(changed("encoder_kwargs.3.context_duration", 0.5)).encoder[3]  # 12.5 rows
    assert isinstance(half, TransformerStage)
    assert half.context == 12


def test_decoder_given_as_the_reversed_encoder():
    config = tiny()
    swapped = {"input_dimension": "output_dimension", "output_dimension": "input_dimension"}
    reverse = [{swapped.get(key, key): value for key, value in item.items()} for item in config.pop("decoder_kwargs")]
    config["reversed_decoder_kwargs"] = reverse[::-1]
    assert MossConfig.from_json(config) == MossConfig.from_json(tiny())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quantizer_type", "rvq", "quantizer_type = 'rvq': is not known here, as the published code cannot decode it"),
        ("quantizer_kwargs.quantizer_type", "spec_rvq", "quantizer_kwargs.quantizer_type = 'spec_rvq'"),
        ("quantizer_kwargs.quantizer_type", "fsq", "quantizer_kwargs.quantizer_type = 'fsq': must be one of rlfq"),
        ("encoder_kwargs.1.gating", "silu", r"encoder_kwargs\[1\].gating = 'silu': only 'none' is known"),
        ("encoder_kwargs.1.norm", "rms_norm", r"encoder_kwargs\[1\].norm = 'rms_norm': only 'layer_norm' is known"),
        ("decoder_kwargs.2.causal", False, r"decoder_kwargs\[2\].causal = False: only True is known"),
        ("decoder_kwargs.2.causal", 1, r"decoder_kwargs\[2\].causal = 1: only True is known"),
        ("decoder_kwargs.0.conv_layout", ABSENT, r"decoder_kwargs\[0\].conv_layout is absent"),
        ("decoder_kwargs.0.positional_embedding", "sin", "positional_embedding = 'sin': only 'rope' is known"),
        ("decoder_kwargs.0.qk_norm", True, r"decoder_kwargs\[0\].qk_norm = True: this key is not known"),
        ("decoder_kwargs.0.layer_scale", ABSENT, r"decoder_kwargs\[0\].layer_scale is absent"),
        ("decoder_kwargs.0.module_type", "Conv", r"decoder_kwargs\[0\].module_type = 'Conv': must be Patched"),
        ("encoder_kwargs.3.num_heads", 3, r"encoder_kwargs\[3\].num_heads = 3: must divide d_model \(32\)"),
        ("encoder_kwargs.3.num_heads", 32, r"encoder_kwargs\[3\].num_heads = 32: must give an even head size"),
        ("encoder_kwargs.3.num_layers", 0, r"encoder_kwargs\[3\].num_layers = 0: must be a whole number above 0"),
        ("encoder_kwargs.3.d_model", 32.5, r"encoder_kwargs\[3\].d_model = 32.5: must be a whole number"),
        ("encoder_kwargs.3.d_model", True, r"encoder_kwargs\[3\].d_model = True: must be a whole number"),
        ("encoder_kwargs.3.input_dimension", 40, r"encoder_kwargs\[3\].input_dimension = 40: must be 48"),
        ("encoder_kwargs.2.patch_size", 3, r"encoder_kwargs\[2\].patch_size = 3: must divide 4"),
        ("decoder_kwargs.1.patch_size", 5, r"decoder_kwargs\[1\].patch_size = 5: must divide 48"),
        ("encoder_kwargs.0", patch(80), r"input_dimension = 160: must be 80"),
        ("encoder_kwargs", [patch(160)], "downsample_rate = 640: must be the product of the patch sizes in enc"),
        ("encoder_kwargs", [], r"encoder_kwargs = \[\]: must be a list of 1 to 1024 objects"),
        ("encoder_kwargs", ABSENT, "encoder_kwargs is absent"),
        ("encoder_kwargs.3", stage(48, 30, 32, 2), "encoder_kwargs: ends with 30 channels, must end with 20"),
        ("decoder_kwargs", [patch(20)], "downsample_rate = 640: must be the product of the patch sizes in dec"),
        ("downsample_rate", 641, "must divide 641"),
        ("downsample_rate", ABSENT, "downsample_rate is absent"),
        ("sampling_rate", ABSENT, "sampling_rate is absent"),
        ("sample_rate", 24000, r"sample_rate = 24000: differs from sampling_rate \(16000\)"),
        ("number_channels", 3, "number_channels = 3: only 1 and 2 are known"),
        ("num_channels", 2, "downsample_rate = 640: must be the product .* half of it where audio is stereo"),
        ("causal_transformer_context_duration", ABSENT, "causal_transformer_context_duration is absent"),
        ("causal_transformer_context_duration", 0, "causal_transformer_context_duration = 0: must be a number above 0"),
        ("causal_transformer_context_duration", 0.03, "the window is 0 rows of this stage, must be 1 to"),
        ("quantizer_kwargs", ABSENT, "quantizer_kwargs is absent"),
        ("quantizer_kwargs.rvq_dim", ABSENT, "quantizer_kwargs.rvq_dim is absent"),
        ("quantizer_kwargs.codebook_size", 65537, "quantizer_kwargs.codebook_size = 65537: must not exceed 65536"),
        ("quantizer_kwargs.num_quantizers", "32", "quantizer_kwargs.num_quantizers = '32': must be a whole number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(path, value, message):
    with pytest.raises(RunError, match=f"^config.json: .*{message}"):
        MossConfig.from_json(changed(path, value))


def test_the_folder_is_named_too(tmp_path):
    folder = write_moss_checkpoint(tmp_path / "checkpoint")
    (folder / "config.json").write_text(json.dumps(changed("encoder_kwargs.1.norm", "none")))
    with pytest.raises(RunError, match=r"checkpoint: config\.json: encoder_kwargs"):
        open_spec(Checkpoint.open(str(folder)))
