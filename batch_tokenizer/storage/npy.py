"""``.npy`` files: written a piece at a time, and headers that are read as untrusted input."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from batch_tokenizer.records import first_line

_HEADER_BYTES = 128

#: A header is text of some hundred bytes.
_MOST_HEADER = 4096

#: What reads the header of each version of the format.
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpyWriter:
    """A file with a one-dimensional array of ``dtype``, whose length its header gets at the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._length = 0
        self._file = path.open("wb")
        self._file.write(bytes(_HEADER_BYTES))

    def append(self, values: npt.NDArray[Any]) -> None:
        """Write more values, (n,)."""
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self._length += len(values)

    def close(self) -> None:
        """Write the header and close the file."""
        self._file.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        assert self._file.tell() == _HEADER_BYTES
        self._file.close()


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype of the array that follows; the file is then at its first byte.

    Raises:
        ValueError: it is no header; the message says why.
    """
    try:
        read = _READERS[np.lib.format.read_magic(file)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old or odd headers
            shape, fortran, dtype = read(file, max_header_size=_MOST_HEADER)
            return shape, fortran, dtype
    except KeyError as error:
        raise ValueError(f"an npy file of version {error.args[0]}, which is not known") from error
    except Exception as error:  # numpy evaluates the header as Python, which may fail in any way
        raise ValueError(f"a damaged npy header: {first_line(error)}") from error
