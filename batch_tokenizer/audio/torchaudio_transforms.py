"""The one place that imports torchaudio, whose binaries load only beside the torch build that they were made for."""

from __future__ import annotations

import importlib
from types import ModuleType

from batch_tokenizer.records import RunError


def import_transforms() -> ModuleType:
    """``torchaudio.transforms``.

    Raises:
        RunError: torchaudio is absent or does not fit the installed torch, which shows as an OSError (a missing CUDA
            library) or a RuntimeError (another torch's operators) as often as an ImportError.
    """
    try:
        return importlib.import_module("torchaudio.transforms")
    except (ImportError, OSError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"torchaudio does not load beside the installed torch ({first_line}); torchaudio 2.11 needs a build "
            "of torch for CUDA 13.0: reinstall both in one go, pip install --force-reinstall 'torch>=2.11,<2.15' "
            "'torchaudio==2.11.*', and let pip take the registry's own builds"
        ) from error


transforms = import_transforms()
