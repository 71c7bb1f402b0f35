"""Folders that can be made again: whole, made of the very same things, and as long as they were, or not used.

A disk that lost the end of a file must not end a round that could pack its images anew. Knows no image and no array.
"""

import json
from pathlib import Path

NOTE = "key.json"


def write_key(folder: Path, key: str) -> None:
    """Note what the files of `folder` were made of, and their sizes."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / NOTE).write_text(json.dumps({"key": key, "files": sizes}) + "\n")


def matches(folder: Path, key: str) -> bool:
    """True when `folder` was sealed with this key and its files have their sizes."""
    try:
        note = json.loads((folder / NOTE).read_text())
        return note["key"] == key and all((folder / name).stat().st_size == n for name, n in note["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, half of one, or another version's
        return False
