"""The files of the demo: found, named and read.

A name is a path below the directory, percent-encoded, because a path is bytes that need not be UTF-8.
"""

import errno
import hashlib
import os
from collections.abc import Set
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes


def list_files(directory: Path, left_out: Set[bytes]) -> list[str]:
    """Name the regular files below a directory, but in folders whose path or name is left out.

    Symbolic links are not followed. A folder that cannot be listed is told and passed over.
    """
    root = os.fsencode(directory)
    names = []
    for folder, folders, files in os.walk(root, onerror=lambda error: print(f"passed over: {error}")):
        folders[:] = [name for name in folders if not {name, os.path.join(folder, name)} & left_out]
        for path in (os.path.join(folder, name) for name in files):
            if os.path.isfile(path) and not os.path.islink(path):
                names.append(quote_from_bytes(os.path.relpath(path, root)))
    return sorted(names)


def read_file(directory: Path, name: str) -> dict[str, Any]:
    """Return the file's `size` and `sha256`, or the `error` by which it cannot be read."""
    path = os.path.join(os.fsencode(directory), unquote_to_bytes(name))
    try:
        with open(path, "rb", opener=_open_plain) as file:
            digest = hashlib.file_digest(file, "sha256")
            return {"size": file.tell(), "sha256": digest.hexdigest()}
    except OSError as error:
        return {"error": errno.errorcode.get(error.errno or 0, "EIO")}


def _open_plain(path: str, flags: int) -> int:
    # The name may by now be a link, or a pipe on which an ordinary open would wait for ever.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
