"""What a run was computed with is recorded, and a mixture that changes bits is refused."""

from __future__ import annotations

import pytest

from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.environments import agree_on_environment, read_environments
from batch_tokenizer.runtime.processes import ProcessGroup
from batch_tokenizer.runtime.run_folder import RunFolder

H100 = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.14.1", "cuda": "13.0", "driver": "580.65.06", "compiled": True}
A100 = {**H100, "device": "NVIDIA A100-SXM4-80GB"}
PLAIN = {**H100, "compiled": False}


@pytest.fixture
def folder(tmp_path):
    with RunFolder.open(tmp_path / "run", {"task": "wav2token"}, processes=ProcessGroup.from_environment({})) as folder:
        yield folder


def agree(folder, environment, sixteen_bits=True, allow_mixed=False):
    agree_on_environment(folder, environment, sixteen_bits=sixteen_bits, allow_mixed=allow_mixed)


def test_each_environment_is_recorded_once(folder):
    assert read_environments(folder.path) == []
    newer_driver = {**H100, "driver": "590.1"}
    for environment in (H100, H100, newer_driver, H100):
        agree(folder, environment)
    assert read_environments(folder.path) == [H100, newer_driver]


@pytest.mark.parametrize(("other", "named"), [(A100, "A100"), (PLAIN, "compiled True before, False here")])
def test_a_mixture_is_refused_in_16_bits_unless_it_is_allowed(folder, other, named, caplog):
    agree(folder, H100)
    with pytest.raises(RunError, match="--allow_mixed_devices") as caught:
        agree(folder, other)
    assert named in str(caught.value)
    assert read_environments(folder.path) == [H100]
    agree(folder, other, allow_mixed=True)
    assert read_environments(folder.path) == [H100, other]
    assert "may differ" in caplog.text


def test_float32_may_change_devices(folder):
    for environment in (H100, A100):
        agree(folder, environment, sixteen_bits=False)
    assert len(read_environments(folder.path)) == 2


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000])
def test_a_damaged_record_is_one_line(folder, content):
    (folder.path / "environments.json").write_bytes(content)
    with pytest.raises(RunError, match="remove it"):
        read_environments(folder.path)


@pytest.mark.parametrize("content", [b"[1, 2]", b"null"])
def test_a_record_of_another_shape_has_no_environments(folder, content):
    (folder.path / "environments.json").write_bytes(content)
    assert read_environments(folder.path) == []
