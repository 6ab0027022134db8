"""Files that are whole or not there: written beside their final name, then moved into place."""

import csv
import hashlib
import io
import json
import math
import os
import tempfile

from utils.errors import RunError, UserError


def write_file(path: str, write) -> None:
    """Call write(file) on a binary file that becomes `path`, making its folder.

    A kill at any moment leaves the old file or the new one, never half of one; what it leaves of the new one,
    .<name>.part, the next write of the same file replaces.

    Raises:
        RunError: the folder or the file cannot be written.
    """
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f".{name}.part")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        try:
            with open(beside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            if os.path.exists(beside):
                os.unlink(beside)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def digest_file(path: str) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_file(path: str) -> None:
    """Remove a file, if it is there.

    Raises:
        RunError: it is, and cannot be removed.
    """
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise RunError(f"cannot remove {path}: {error.strerror or error}") from None


def check_folder(path: str, *files: str) -> None:
    """Make the folder and try it, so that hours of work do not end at a file that cannot be written.

    Args:
        files: names that are going to be written there.

    Raises:
        UserError: it cannot be made or written, or one of the files is a folder.
    """
    for name in files:
        if os.path.isdir(os.path.join(path, name)):
            raise UserError(f"cannot write {os.path.join(path, name)}: it is a folder")
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from None


def write_json(path: str, content: dict) -> None:
    """Write `content` as indented JSON; what is no finite number, as a figure of no images, is null."""
    write_text(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def write_text(path: str, text: str) -> None:
    """Write a text file."""
    write_file(path, lambda file: file.write(text.encode()))


def write_csv(path: str, rows: list[dict]) -> None:
    """Write rows as CSV with one header: the columns of all rows, in the order they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _plain(content):
    """JSON has no word for nan and infinity."""
    if isinstance(content, dict):
        return {name: _plain(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
