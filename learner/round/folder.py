"""The round folder: its lock, the exit codes of the learner, and the result file.

Must not import torch: the agent imports this module.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cxrloop.durable import sync_folder, write_atomic
from learner.errors import RoundBusy

TRAINED, PAUSED, STOPPED = 0, 75, 3  # exit codes of `python -m learner`


@contextmanager
def lock_round(folder: Path) -> Iterator[None]:
    """Lock the round folder for this process; the kernel frees the lock however the process ends. Raises RoundBusy."""
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RoundBusy(f"{folder}: another learner is at work here") from None
        yield


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json`, also on a full disk: there it overwrites `progress.json` in place and renames it.

    Removing `progress.json` first would not do: another process could take the freed block before `result.json` has it.
    """
    data = (json.dumps(result, indent=1) + "\n").encode()
    try:
        write_atomic(folder / "result.json", data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (folder / "progress.json").exists():
            raise
        temp = (folder / "progress.json").replace(folder / ".result.json.tmp")
        with temp.open("r+b") as file:
            file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        temp.replace(folder / "result.json")
        sync_folder(folder)
