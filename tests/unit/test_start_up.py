"""What a rank does not import before it needs it, as each import costs every rank's start."""

from __future__ import annotations

import subprocess
import sys

#: Imported one after the other in one process: module, and what it must not have brought.
ABSENT = [
    ("batch_tokenizer.cli", "torch"),
    ("batch_tokenizer.data.loader", "transformers"),
    ("batch_tokenizer.pipeline.run", "torch._dynamo.eval_frame"),
    ("batch_tokenizer.codecs.mimo.codec", "torch._dynamo.eval_frame"),
]


def test_what_is_slow_to_import_waits():
    program = "".join(f"import sys, {module}; print({absent!r} in sys.modules)\n" for module, absent in ABSENT)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert dict(zip(ABSENT, done.stdout.split(), strict=True)) == dict.fromkeys(ABSENT, "False")
