"""`python -m learner ROUND_DIR`: one round from manifest to bundle parts, resumable at any step.

The recipe named in the manifest decides what happens (`recipes/`); here are the lock, the exit code and the last word.
Exit 0 trained, 75 paused, 3 stopped with a reason in result.json; 0 for all three under torchrun, which would start a
process again that leaves with anything else. Golden images, the ledger and DICOM are unknown here.
"""

import argparse
import errno
import importlib
import os
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

# torch takes seconds to import: a signal meanwhile waits until the round listens; torchrun's ranks may wait for others
if __name__ == "__main__" and "RANK" not in os.environ:
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))

from learner.data.token_bank import remove_caches
from learner.engine import distributed
from learner.engine.checkpoint import CheckpointError
from learner.engine.progress import Paused
from learner.engine.step import Stopped, memory_ran_out
from learner.networks.backbone import BackboneError
from learner.round.figure import draw
from learner.round.folder import PAUSED, STOPPED, TRAINED, RoundBusy, lock_round, write_result
from learner.round.manifest import ManifestError, load
from learner.round.run import Run

CODES = {"trained": TRAINED, "paused": PAUSED, "stopped": STOPPED}
REFUSALS = (ManifestError, BackboneError, CheckpointError, Stopped)  # known reasons; anything else is a crash


def main(arguments: list[str] | None = None) -> int:
    """Run or resume the round in a folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m learner", description="Train one round; start again to resume.")
    parser.add_argument("round_dir", type=Path, help="folder with manifest.json")
    folder: Path = parser.parse_args(arguments).round_dir
    with distributed.joined():
        try:
            with lock_round(folder) if distributed.is_first() else nullcontext():
                return run(folder)
        except (RoundBusy, FileNotFoundError) as error:
            print(error, file=sys.stderr)
            return 1


def run(folder: Path) -> int:
    """The round, under its lock."""
    result = {"state": "trained", "reason": None, "seconds": 0.0, "unlabelled": 0, "labelled": 0}
    teller = None
    try:
        round_ = load(folder)
        result |= {"unlabelled": len(round_.unlabelled), "labelled": len(round_.labelled)}
        work = Run(round_)
        teller = work.teller
        teller.listen()
        recipe = importlib.import_module(f"learner.recipes.{round_.recipe.method.replace('-', '_')}")
        recipe.run(work)
        teller.say("done", 1, 1)
        distributed.by_first(lambda: remove_caches(folder))
    except distributed.Ended as other:
        result["state"], result["reason"] = other.state, other.reason
    except Paused as pause:
        result["state"], result["reason"] = distributed.last_word("paused", str(pause))
    except REFUSALS as error:
        result["state"], result["reason"] = distributed.last_word("stopped", str(error))
    except (OSError, RuntimeError, MemoryError) as error:
        if not (word := ending(error)):
            raise
        result["state"], result["reason"] = distributed.last_word(*word)
    finally:
        if teller:
            result["seconds"] = round(teller.seconds, 1)
            teller.close()
    if distributed.is_first():
        write_result(folder, result)
        if teller and result["state"] != "paused":
            draw(folder)
        if result["reason"]:
            print(f"{result['state']}: {result['reason']}", file=sys.stderr)
    return 0 if distributed.launched() else CODES[result["state"]]


def ending(error: BaseException) -> tuple[str, str] | None:
    """State and reason where the machine, not the round, is at an end: its disk, or its memory outside of a step."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "paused", f"disk full: {error}; free some space, and the round goes on from its last checkpoint"
    if memory_ran_out(error) and distributed.world() == 1:  # of several ranks the others don't know: a crash
        return "stopped", f"out of memory outside of a step: {error}"[:300]
    return None


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    sys.exit(main())
