"""ONNX graphs behind the codec protocol: known layouts, long utterances, what is refused, and providers."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from batch_tokenizer.codecs.checkpoint import Checkpoint
from batch_tokenizer.codecs.loading import LoadRequest
from batch_tokenizer.codecs.moss.codec import MossCodec, load_codec, open_spec
from batch_tokenizer.codecs.onnx import codec as onnx_codec
from batch_tokenizer.codecs.onnx.export import export_moss
from batch_tokenizer.codecs.onnx.graph_file import GraphFile
from batch_tokenizer.codecs.onnx.layouts import recognise
from batch_tokenizer.codecs.onnx.session import PROVIDERS_VARIABLE, Session
from batch_tokenizer.codecs.registry import find_family
from batch_tokenizer.records import RunError
from tests.support.moss import noise, tiny, write_moss_checkpoint
from tests.support.onnx_layouts import generate_output_names, write_community, write_nano, write_official

CPU = torch.device("cpu")
LENGTHS = (1, 640, 16001, 40007)
#: All that graphs without metadata cannot tell.
SMALL_CONFIG = {"sampling_rate": 16000, "downsample_rate": 640, "quantizer_kwargs": {"codebook_size": 32}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("onnx")
    source = write_moss_checkpoint(root / "torch")
    ours = root / "ours"
    export_moss(Checkpoint.open(str(source)), ours)
    return {
        "torch": source,
        "ours": ours,
        "community": write_community(ours, root / "community", books=5, config=SMALL_CONFIG),
        "official": write_official(ours, root / "official", books=5, frame=640, config=tiny()),
        "nano": write_nano(ours, root / "nano", books=5),
        "exported community": exported(source, root / "exported community", "community"),
        "exported official": exported(source, root / "exported official", "official"),
    }


def exported(source: Path, folder: Path, layout: str) -> Path:
    export_moss(Checkpoint.open(str(source)), folder, layout=layout)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def reference(folders) -> MossCodec:
    checkpoint = Checkpoint.open(str(folders["torch"]))
    return load_codec(LoadRequest(checkpoint, open_spec(checkpoint)))


def spec_of(folder: Path) -> onnx_codec.OnnxSpec:
    checkpoint = Checkpoint.open(str(folder))
    spec = find_family(checkpoint).open_spec(checkpoint)
    assert isinstance(spec, onnx_codec.OnnxSpec)
    return spec


def codec_of(folder: Path, task: str = "wav2token2wav", threads: int = 1) -> onnx_codec.OnnxCodec:
    checkpoint = Checkpoint.open(str(folder))
    spec = onnx_codec.open_spec(checkpoint)
    return onnx_codec.load_codec(LoadRequest(checkpoint, spec, task=task, threads=threads))  # type: ignore[arg-type]


def features(lengths=LENGTHS) -> list[np.ndarray]:
    return [noise(length, seed=length)[None] for length in lengths]


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("layout", ["ours", "community", "official"])
@pytest.mark.parametrize("count", [5, 2])
def test_each_layout_gives_what_pytorch_gives(folders, reference, layout, count):
    codec = codec_of(folders[layout], threads=2)
    codes = codec.encode(features(), count)
    for code, expected in zip(codes, reference.encode(features(), count), strict=True):
        assert code.dtype == np.uint16
        np.testing.assert_array_equal(code, expected)
    wanted = reference.decode(codes)
    for samples, expected in zip(codec.decode(codes), wanted, strict=True):
        assert samples.dtype == np.float32
        np.testing.assert_allclose(samples, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["ours", "community", "official"])
def test_a_result_does_not_depend_on_the_batch_to_the_bit(folders, layout):
    codec = codec_of(folders[layout], threads=2)
    alone = [codec.encode([one], 5)[0] for one in features()]
    heard = [codec.decode([code])[0] for code in alone]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 2)):
        codes = codec.encode([features()[index] for index in order], 5)
        for index, code, samples in zip(order, codes, codec.decode(codes), strict=True):
            np.testing.assert_array_equal(code, alone[index])
            np.testing.assert_array_equal(samples, heard[index])


def test_spec_is_picklable_and_tells_the_frame_arithmetic(folders, reference):
    for layout in ("ours", "community", "official"):
        spec = pickle.loads(pickle.dumps(spec_of(folders[layout])))
        assert (spec.info.sample_rate, spec.info.codebook_sizes) == (16000, (32,) * 5)
        for length in LENGTHS:
            assert spec.num_frames(length) == reference.spec.num_frames(length)
        assert spec.num_output_samples(3) == 1920
    assert spec_of(folders["ours"]).info.max_samples is None
    assert spec_of(folders["official"]).info.max_samples == 120 * 16000


def test_long_utterances_go_through_our_steps(folders, reference):
    codec = codec_of(folders["ours"])
    codec.pieces_above, codec.step = 10, 7
    long = features([640 * 45 + 3])
    codes = codec.encode(long, 3)
    np.testing.assert_array_equal(codes[0], reference.encode(long, 3)[0])
    np.testing.assert_allclose(codec.decode(codes)[0], reference.decode(codes)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["community", "official"])
def test_published_graphs_decode_long_utterances_in_pieces_and_say_how_exactly(folders, reference, layout, caplog):
    codec = codec_of(folders[layout])
    codec.pieces_above = 150  # 6 s with 2 s of context, where each of 3 layers sees 1 s
    codes = reference.encode(features([640 * 401]), 5)
    wanted = reference.decode(codes)[0]
    with caplog.at_level(logging.WARNING):
        samples = codec.decode(codes * 2)[1]
    assert samples.shape == wanted.shape
    pieces = np.abs(samples - wanted).max()
    (message,) = [record.getMessage() for record in caplog.records if "pieces join" in record.getMessage()]
    measured = float(message.split("at most ")[1].split(";")[0])
    assert pieces < max(10 * measured, 1e-5)
    codec.pieces_above = 3  # 1 frame of context: it must be seen to be bad
    assert codec.seam_error(codes[0][:9]) > 100 * max(measured, 1e-6)


def test_counts_and_codes_are_checked_before_the_graph_sees_them(folders):
    codec = codec_of(folders["official"])
    for count in (0, 6):
        with pytest.raises(ValueError, match="1 to 5"):
            codec.encode(features([700]), count)
    for bad in (np.full((3, 5), 32), np.zeros((0, 5)), np.zeros((3, 6)), np.zeros(3)):
        with pytest.raises(ValueError, match="utterance 0"):
            codec.decode([bad.astype(np.uint16)])


def test_a_graph_of_fixed_codebooks_decodes_no_fewer(folders, tmp_path):
    folder = write_community(folders["ours"], tmp_path, books=5, config=SMALL_CONFIG, codes_dims=(5, "b", "c"))
    with pytest.raises(RunError, match=r"decodes 5 codebooks and no fewer.* have 2"):
        codec_of(folder).decode([np.zeros((3, 2), dtype=np.uint16)])


def test_fingerprints_tell_checkpoints_apart(folders, tmp_path):
    mine = spec_of(folders["official"]).info.fingerprint
    assert mine == spec_of(copied(folders["official"], tmp_path / "same")).info.fingerprint
    other = copied(folders["official"], tmp_path / "other")
    data = bytearray((other / "decoder.data").read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    (other / "decoder.data").write_bytes(bytes(data))
    assert spec_of(other).info.fingerprint != mine
    assert spec_of(folders["community"]).info.fingerprint != mine


def test_torch_weights_beside_graphs_are_preferred(folders, tmp_path):
    both = copied(folders["ours"], tmp_path / "both")
    for path in folders["torch"].iterdir():
        shutil.copy(path, both)
    checkpoint = Checkpoint.open(str(both))
    assert find_family(checkpoint).open_spec(checkpoint).info.family == "moss"


# ------------------------------------------------------------------------------------------------------------ refused


def test_missing_and_short_weight_files_are_named(folders, tmp_path):
    folder = copied(folders["official"], tmp_path / "m")
    data = folder / "decoder.data"
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"decoder\.data: has \d+ bytes where decoder\.onnx needs"):
        spec_of(folder)
    data.unlink()
    with pytest.raises(RunError, match=r"decoder\.onnx: needs its weights in decoder\.data"):
        spec_of(folder)


def test_a_missing_role_is_named(folders, tmp_path):
    folder = copied(folders["community"], tmp_path / "m")
    (folder / "audio_tokenizer_decoder.onnx").unlink()
    codec_of(folder, "wav2token")
    with pytest.raises(RunError, match="token2wav needs a graph with the role decoder"):
        codec_of(folder, "token2wav")


@pytest.mark.parametrize("config", [None, {"sampling_rate": 16000}, {"sampling_rate": 16000, "downsample_rate": 640}])
def test_sizes_that_nothing_tells_are_asked_for(folders, tmp_path, config):
    folder = write_community(folders["ours"], tmp_path, books=5, config=config)
    if config is not None and len(config) == 2:  # the graphs' tables of codebooks have a row too many
        assert GraphFile.open(folder / "audio_tokenizer_decoder.onnx").codebook_rows() == 33
        return
    with pytest.raises(RunError, match=r"the graphs do not state .*downsample_rate.* config\.json"):
        spec_of(folder)


def test_config_and_graphs_must_agree(folders, tmp_path):
    wrong = {**SMALL_CONFIG, "quantizer_kwargs": {"codebook_size": 32, "num_quantizers": 4}}
    with pytest.raises(RunError, match="4 codebooks"):
        spec_of(write_community(folders["ours"], tmp_path, books=5, config=wrong))


def test_wrong_frame_size_is_noticed(folders, tmp_path):
    folder = write_community(folders["ours"], tmp_path, books=5, config={**SMALL_CONFIG, "downsample_rate": 320})
    codec = codec_of(folder)
    with pytest.raises(RunError, match="check sampling_rate and downsample_rate"):
        codec.encode(features([6400]), 5)
    with pytest.raises(RunError, match="check downsample_rate"):
        codec.decode([np.zeros((4, 5), dtype=np.uint16)])


def test_two_graphs_of_one_role(folders, tmp_path):
    folder = copied(folders["community"], tmp_path / "m")
    shutil.copy(folder / "audio_tokenizer_encoder.onnx", folder / "b.onnx")
    with pytest.raises(RunError, match="leave one of them"):
        spec_of(folder)


def test_our_graphs_of_two_checkpoints(folders, tmp_path):
    other = tmp_path / "other"
    export_moss(Checkpoint.open(str(write_moss_checkpoint(tmp_path / "torch", seed=1))), other)
    shutil.copy(folders["ours"] / "decoder.onnx", other)
    with pytest.raises(RunError, match="different checkpoints"):
        spec_of(other)


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "encoder.onnx").write_bytes(b"\x93 not a graph")
    with pytest.raises(RunError, match=r"encoder\.onnx: (cannot be read as|is not) an ONNX graph"):
        spec_of(tmp_path)


# ------------------------------------------------------------------------------------------------------------- layouts


def graph(tmp_path: Path, inputs: list[tuple[str, int, Any]], outputs: list[tuple[str, int, Any]]) -> GraphFile:
    """A graph of these inputs and outputs; what it computes is not looked at."""
    node = helper.make_node("Identity", [inputs[0][0]], [outputs[0][0]])
    made = helper.make_graph(
        [node], "g", *([helper.make_tensor_value_info(*port) for port in ports] for ports in (inputs, outputs))
    )
    path = tmp_path / "decoder.onnx"
    onnx.save(helper.make_model(made), path)
    return GraphFile.open(path)


def decoder(tmp_path: Path, dims: Any, dtype: int = TensorProto.INT32) -> GraphFile:
    return graph(tmp_path, [("audio_codes", dtype, dims)], [("audio", TensorProto.FLOAT, ["c", "t"])])


@pytest.mark.parametrize(
    ("dims", "axes"),
    [
        (["a", "b", "c"], "KBT"),
        ([32, 1, "t"], "KBT"),
        ([32, "x", 32], "KBT"),
        (["num_quantizers", "batch", "time"], "KBT"),
        (["batch", "num_quantizers", "time"], "BKT"),
        (["batch", "frames", "codebooks"], "BTK"),
        ([1, 32, "time"], "BKT"),
    ],
)
def test_axes_of_codes(tmp_path, dims, axes):
    assert recognise(decoder(tmp_path, dims), 32).axes == axes


@pytest.mark.parametrize(
    "dims", [[1, 32, 32], [16, 1, "t"], ["batch", "a", "b"], [32, 32, 32], [2, 3, 4], [1, 32, "t"]]
)
def test_sizes_that_contradict_or_leave_it_open_are_refused(tmp_path, dims):
    with pytest.raises(RunError, match=r"audio_codes int32 \(.*which axis is which"):
        recognise(decoder(tmp_path, dims), 32)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ([("codes", TensorProto.INT32, [1, 2, 3])], [("audio", TensorProto.FLOAT, [1, 2])], "codes int32 (1, 2, 3)"),
        ([("audio_codes", TensorProto.FLOAT, [1, 2, 3])], [("audio", TensorProto.FLOAT, [1, 2])], "is float32, not"),
        ([("audio_codes", TensorProto.INT32, [2, 3])], [("audio", TensorProto.FLOAT, [1, 2])], "has 2 axes, not 3"),
        ([("audio_codes", TensorProto.INT32, [2, 3, 4])], [("wav", TensorProto.FLOAT, [2])], "no output audio"),
        ([("input_values", TensorProto.FLOAT, [1, 2, "s"])], [("audio_codes", TensorProto.INT64, [32, 1, 4])], "mono"),
    ],
)
def test_graphs_of_no_known_layout_are_described(tmp_path, inputs, outputs, reason):
    with pytest.raises(RunError) as error:
        recognise(graph(tmp_path, inputs, outputs), 32)
    assert reason in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "decoder.onnx"))
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- providers


def test_a_provider_that_was_asked_for_and_is_absent_ends_the_run(folders, monkeypatch):
    monkeypatch.setenv(PROVIDERS_VARIABLE, "tensorrt,cuda,cpu")
    with pytest.raises(RunError, match=r"TensorrtExecutionProvider.* is not in this onnxruntime"):
        Session(folders["ours"] / "encoder.onnx", CPU, 1)
    monkeypatch.setenv(PROVIDERS_VARIABLE, "gpu")
    with pytest.raises(RunError, match="gpu: choose from tensorrt, cuda, cpu"):
        Session(folders["ours"] / "encoder.onnx", CPU, 1)
    monkeypatch.setenv(PROVIDERS_VARIABLE, " CPU ")
    assert Session(folders["ours"] / "encoder.onnx", CPU, 1).provider == "CPUExecutionProvider"


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("asked", [True, False])
def test_a_provider_that_is_there_but_does_not_load(folders, monkeypatch, caplog, asked):
    """As when CUDA's libraries are absent: onnxruntime goes on with the CPU and says nothing to its caller."""
    import onnxruntime

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    if asked:
        monkeypatch.setenv(PROVIDERS_VARIABLE, "cuda,cpu")
        with pytest.raises(RunError, match="CUDAExecutionProvider did not load"):
            Session(folders["ours"] / "encoder.onnx", CPU, 1)
        return
    with caplog.at_level(logging.WARNING):
        session = Session(folders["ours"] / "encoder.onnx", torch.device("cuda", 0), 1)
    assert session.provider == "CPUExecutionProvider"
    assert "did not load" in caplog.text


def test_without_a_gpu_build_a_gpu_run_goes_on_with_a_warning(folders, caplog):
    with caplog.at_level(logging.WARNING):
        session = Session(folders["ours"] / "encoder.onnx", torch.device("cuda", 0), 1)
    assert session.provider == "CPUExecutionProvider"
    assert "install onnxruntime-gpu" in caplog.text


def test_a_graph_that_onnxruntime_cannot_load(folders, tmp_path):
    model = onnx.load(folders["ours"] / "encoder.onnx")
    model.graph.node[3].op_type = "Nonsense"
    onnx.save(model, tmp_path / "encoder.onnx")
    with pytest.raises(RunError, match="onnxruntime cannot load it"):
        Session(tmp_path / "encoder.onnx", CPU, 1)


def test_configuration_values_are_checked(folders, tmp_path):
    folder = copied(folders["community"], tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({**SMALL_CONFIG, "sampling_rate": "16k"}))
    with pytest.raises(RunError, match="sampling_rate = '16k'"):
        spec_of(folder)


@pytest.mark.parametrize("name", ["nano", "exported community", "exported official"])
def test_other_layouts_give_the_models_results(folders, reference, name):
    codec = codec_of(folders[name])
    codes = codec.encode(features(), 5)
    expected = reference.encode(features(), 5)
    for code, same in zip(codes, expected, strict=True):
        np.testing.assert_array_equal(code, same)
    for samples, same in zip(codec.decode(codes), reference.decode(expected), strict=True):
        np.testing.assert_allclose(samples, same, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["community", "official"])
def test_generated_names_of_outputs(folders, tmp_path, reference, name):
    """What torch's exporter writes: outputs are known by their types, numbers of axes and order only."""
    folder = generate_output_names(folders[name], tmp_path / name)
    codec = codec_of(folder)
    codes = codec.encode(features(), 5)
    for code, same in zip(codes, reference.encode(features(), 5), strict=True):
        np.testing.assert_array_equal(code, same)
    for samples, same in zip(codec.decode(codes), reference.decode(codes), strict=True):
        np.testing.assert_allclose(samples, same, rtol=0, atol=2e-6)


def test_a_client_of_the_official_layout(folders, reference):
    """MOSS's own client: outputs by position, one utterance, and how many codebooks are used."""
    import onnxruntime

    encoder, decoder = (
        onnxruntime.InferenceSession(str(folders["exported official"] / f"{part}.onnx"))
        for part in ("encoder", "decoder")
    )
    for length in LENGTHS:
        wave = noise(length, seed=length)[None, None]
        codes, lengths = encoder.run(None, {"input_values": wave, "n_quantizers": np.array(3, np.int64)})
        (expected,) = reference.encode([wave[0]], 3)
        assert (codes.dtype, codes.shape) == (np.int64, (3, 1, len(expected)))
        assert lengths.tolist() == [len(expected)]
        np.testing.assert_array_equal(codes[:, 0].T, expected)
        wide = np.pad(codes, ((0, 2), (0, 0), (0, 0)))
        audio, audio_lengths = decoder.run(None, {"audio_codes": wide, "n_quantizers": np.array(3, np.int64)})
        assert audio.shape == (1, 1, audio_lengths[0])
        np.testing.assert_allclose(audio[0, 0], reference.decode([expected])[0], rtol=0, atol=2e-6)


def test_a_client_of_the_community_layout(folders, reference):
    """The community's scripts: padded batches, hidden states, int32 codes, and decoding in chunks with context."""
    import onnxruntime

    encoder, decoder = (
        onnxruntime.InferenceSession(str(folders["exported community"] / f"audio_tokenizer_{part}.onnx"))
        for part in ("encoder", "decoder")
    )
    waves = np.zeros((2, 1, 16000), np.float32)
    for row, length in enumerate((16000, 9600)):
        waves[row, 0, :length] = noise(length, seed=length)
    outputs = {output.name: output for output in encoder.get_outputs()}
    assert list(outputs) == ["audio_codes", "audio_codes_lengths", "encoder_hidden_states"]
    codes, lengths, hidden = encoder.run(list(outputs), {"input_values": waves})
    assert (codes.dtype, codes.shape, hidden.shape) == (np.int64, (5, 2, 25), (2, 20, 25))
    assert lengths.tolist() == [25, 25]
    (expected,) = reference.encode([waves[0]], 5)
    np.testing.assert_array_equal(codes[:, 0].T, expected)
    model_hidden = reference.model.hidden(torch.from_numpy(waves[0, 0])).numpy()
    np.testing.assert_allclose(hidden[0].T, model_hidden, rtol=0, atol=1e-5)
    (audio,) = decoder.run(None, {"audio_codes": codes.astype(np.int32)})
    assert audio.shape == (2, 16000)
    np.testing.assert_allclose(audio[0], reference.decode([expected])[0], rtol=0, atol=2e-6)
    whole = expected.T[:, None].astype(np.int32)
    joined = []
    for start in range(0, 25, 5):
        (piece,) = decoder.run(None, {"audio_codes": whole[:, :, : start + 5]})
        joined.append(piece[0, start * 640 :])
    np.testing.assert_allclose(np.concatenate(joined), audio[0], rtol=0, atol=2e-6)
