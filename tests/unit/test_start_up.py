"""What a rank does not import before it needs it, as each import costs every rank's start."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("batch_tokenizer.codecs.mimo.codec", "torch._dynamo.eval_frame"),
        ("batch_tokenizer.pipeline.run", "torch._dynamo.eval_frame"),
        ("batch_tokenizer.data.loader", "transformers"),
        ("batch_tokenizer.cli", "torch"),
    ],
)
def test_what_is_slow_to_import_waits(module, absent):
    program = f"import sys, {module}; print({absent!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", f"importing {module} imports {absent}"
