"""A folder to rows: every audio file below it, in the order of names, with the ``.json`` and ``.txt`` beside it; or
every token file (``.npy``, ``.json``).

The key is the path below the folder without its ending, as in tars, unless a token file says what its key is. Hidden
files and folders are left out; a link to a file counts as the file, a link to a folder is not followed. Run folders are
left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from batch_tokenizer.manifest.row import REFUSED
from batch_tokenizer.records import RowError, RunError
from batch_tokenizer.sources.foreign_rows import MADE_KEY, Refused
from batch_tokenizer.sources.sidecars import AUDIO_ENDINGS, MOST_SIDECAR, TOKEN_ENDINGS, own_fields, sidecar_fields
from batch_tokenizer.sources.tar_rows import Note
from batch_tokenizer.storage import remote
from batch_tokenizer.storage.names import HIDDEN_STATES_ENDING, file_name, is_url
from batch_tokenizer.storage.remote import StorageError
from batch_tokenizer.storage.row_info import split_info
from batch_tokenizer.storage.token_info import NoTokens, stored_info

#: (location, whether a .json and a .txt lie beside it)
Found = tuple[str, bool, bool]


def walk_folder(folder: str, field_name: str, note: Note) -> Iterator[Found]:
    """The files that become rows.

    Raises:
        RunError: the folder itself cannot be read.
    """
    endings = AUDIO_ENDINGS if field_name == "wav" else TOKEN_ENDINGS
    if is_url(folder):
        try:
            names = remote.list_folder(folder)
        except StorageError as error:
            raise RunError(f"--data_list {error.reason}", exit_code=1) from error
        yield from _pick(names, endings, set(names))
        return
    # Depth first, in the order of names, so that the same folder always gives the same manifest.
    below = [folder]
    while below:
        place = below.pop()
        try:
            with os.scandir(place) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if place == folder:
                raise RunError(f"folder {folder} cannot be read: {error.strerror}") from error
            note("folders that cannot be read", place)
            continue
        if place != folder and {"run.json", "ledger"} <= {entry.name for entry in found}:
            continue  # a run folder, which has arrays and manifests of its own
        folders, files = [], []
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_dir():
                note("links to folders", entry.path)
            else:
                files.append(entry.path)
        yield from _pick(files, endings, set(files))
        below += reversed(folders)


def _pick(paths: list[str], endings: frozenset[str], there: set[str]) -> Iterator[Found]:
    """Files with one of these endings; among token files also JSON that lies beside no array."""
    for path in paths:
        stem, _, ending = path.rpartition(".")
        if stem and ending.lower() in endings and not path.endswith(HIDDEN_STATES_ENDING):
            stem = stem.removesuffix(".tokens") if ending == "npy" else stem
            yield path, f"{stem}.json" in there, f"{stem}.txt" in there
        elif endings is TOKEN_ENDINGS and stem and ending == "json":
            beside = {f"{stem}.npy", f"{stem}.tokens.npy"} & there
            if not beside:
                yield path, False, f"{stem}.txt" in there


def folder_row(folder: str, field_name: str, found: Found) -> dict[str, Any] | None:
    """The row of one file; a refused one has the field ``REFUSED``. None for a JSON file without tokens."""
    path, has_json, has_text = found
    name = file_name(path)
    begin = len(file_name(folder).rstrip("/")) + 1
    key = name[begin:].rpartition(".")[0]
    if field_name == "quantized_tokens":
        key = key.removesuffix(".tokens")
    printable = path.encode("utf-8", "backslashreplace").decode()
    if printable != path:
        reason = f"{path!a}: its name is not UTF-8, and no manifest can hold it: rename it"
        return {"key": key.encode("utf-8", "backslashreplace").decode(), REFUSED: reason}
    stem = path.rpartition(".")[0]
    if field_name == "quantized_tokens":
        stem = stem.removesuffix(".tokens")
    fields: dict[str, Any] = {}
    key_field = MADE_KEY
    try:
        if field_name == "quantized_tokens":
            own, _ = split_info(stored_info(path))
            if isinstance(own.get("key"), str) and own["key"]:
                key, key_field = own["key"], "key"
            fields = own_fields(own)
    except NoTokens:
        return None
    except RowError as error:
        return {"key": key, REFUSED: error.reason}
    try:
        json_content = _read(f"{stem}.json") if has_json else None
        fields |= sidecar_fields(json_content, _read(f"{stem}.txt") if has_text else None)
    except Refused as refused:
        return {"key": key, REFUSED: f"{path}: {refused.reason}"}
    return {key_field: key, field_name: path, **fields}


def _read(path: str) -> bytes:
    try:
        if is_url(path):
            content = remote.read_range(path, 0, MOST_SIDECAR + 1)
        else:
            with open(path, "rb") as stream:
                content = stream.read(MOST_SIDECAR + 1)
    except StorageError as error:
        raise Refused(error.reason) from error
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MOST_SIDECAR:
        raise Refused(f"{path}: more than {MOST_SIDECAR:,} bytes")
    return content
