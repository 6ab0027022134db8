"""Atomic file writes: a file is written under a temporary name beside its final one, then moved into place."""

import csv
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path

from utils.errors import RunError, UserError


def write_file(path: str, write) -> None:
    """Call write(file) on a binary file that becomes `path`; missing folders are created.

    A process killed at any moment leaves the old file or the new one, never a partial one. It may also leave the
    temporary file .<name>.part, which the next write of the same file replaces.

    Raises:
        RunError: the folder or the file cannot be written.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.part")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def sha256_of(path: str) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_file(path: str) -> None:
    """Remove a file if it exists; a RunError if that fails."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot remove {path}: {error.strerror or error}") from None


def check_writable(folder: str, *files: str) -> None:
    """Check before a long run that its results can be written; nothing is created.

    Args:
        folder: need not exist; its nearest existing parent must then be a writable folder.
        files: names of the files that will be written there.

    Raises:
        UserError: the folder cannot be created or written, or one of the files is a folder.
    """
    for name in files:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            raise UserError(f"cannot write {path}: it is a folder; remove it or choose another --name")
    try:
        with tempfile.TemporaryFile(dir=_nearest_existing(os.path.abspath(folder))):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None


def refuse_to_replace(models, outputs) -> None:
    """Raise a UserError if one of the paths to write is that of a model to read (None: no model)."""
    for path in {os.path.realpath(path) for path in outputs} & {os.path.realpath(path) for path in models if path}:
        raise UserError(f"the purified weights would replace the model {path}; choose another --name")


def announce_replacement(folder: str, file: str) -> None:
    """Say so if `file` of an earlier run is in the results folder."""
    if os.path.exists(os.path.join(folder, file)):
        print(f"{folder} holds an earlier run, which this one replaces; keep it with another --name")


def write_json(path: str, content: dict) -> None:
    """Write `content` as indented JSON; nan and infinity (a percentage of no images, for one) become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)  # Python writes nan as a word: not JSON
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str, text: str) -> None:
    """Write a text file in UTF-8."""
    write_file(path, lambda file: file.write(text.encode(errors="replace")))


def write_csv(path: str, rows: list[dict]) -> None:
    """Write rows as CSV; the header is the union of their keys, in order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: str) -> list[dict]:
    """The rows that write_csv wrote, as texts; [] without a file."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def _nearest_existing(path):
    try:
        os.lstat(path)  # a broken link exists: it stands where the folder would be created
    except FileNotFoundError:
        return _nearest_existing(os.path.dirname(path))
    return path
