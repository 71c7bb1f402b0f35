"""Keys of cache folders: a cache is used only if its key matches and all its files still have their sizes.

So a truncated file makes the round rebuild the cache instead of failing.
"""

import json
from pathlib import Path

KEY_FILE = "key.json"


def write_key(folder: Path, key: str) -> None:
    """Write the key and the sizes of all files into `folder`."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / KEY_FILE).write_text(json.dumps({"key": key, "files": sizes}) + "\n")


def matches(folder: Path, key: str) -> bool:
    """Whether `folder` has this key and all its files have their sizes."""
    try:
        stored = json.loads((folder / KEY_FILE).read_text())
        return stored["key"] == key and all((folder / name).stat().st_size == n for name, n in stored["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, truncated, or of another version
        return False
