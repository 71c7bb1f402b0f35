"""`python -m learner ROUND_DIR`: train one round from its manifest to bundle parts; resumable at any step.

Holds the lock, the exit code and the result; the manifest's recipe (`recipes/`) decides what is trained. Exit 0 trained,
75 paused, 3 stopped with a reason in result.json. Under torchrun all three exit 0, because torchrun restarts a worker
that exits with anything else. Must not read golden images, the ledger or DICOM.
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

# Importing torch takes seconds: signals stay blocked until ProgressWriter.handle_signals. Not under torchrun, whose
# workers may wait for each other before that.
if __name__ == "__main__" and "RANK" not in os.environ:
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))

from learner.data.token_bank import remove_caches
from learner.engine import distributed
from learner.engine.step import is_out_of_memory
from learner.errors import LearnerError, OtherRankExited, Paused, RoundBusy
from learner.round.figure import draw
from learner.round.folder import PAUSED, STOPPED, TRAINED, lock_round, write_result
from learner.round.manifest import load
from learner.training.run import Run

EXIT_CODES = {"trained": TRAINED, "paused": PAUSED, "stopped": STOPPED}


def main(arguments: list[str] | None = None) -> int:
    """Train or resume the round in a folder; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m learner", description="Train one round; start again to resume.")
    parser.add_argument("round_dir", type=Path, help="folder with manifest.json")
    folder: Path = parser.parse_args(arguments).round_dir
    with distributed.process_group():
        try:
            with lock_round(folder) if distributed.is_rank_zero() else nullcontext():
                return train_round(folder)
        except (RoundBusy, FileNotFoundError) as error:
            print(error, file=sys.stderr)
            return 1


def train_round(folder: Path) -> int:
    """Train the round, which must be locked, and write its result; return the exit code."""
    result = {"state": "trained", "reason": None, "seconds": 0.0, "unlabelled": 0, "labelled": 0}
    progress = None
    try:
        manifest = load(folder)
        result |= {"unlabelled": len(manifest.unlabelled), "labelled": len(manifest.labelled), "notes": manifest.notes}
        run = Run(manifest)
        progress = run.progress
        progress.handle_signals()
        recipe = importlib.import_module(f"learner.recipes.{manifest.recipe.method.replace('-', '_')}")
        recipe.train(run)
        progress.write_progress("done", 1, 1)
        distributed.on_rank_zero(lambda: remove_caches(folder))
    except OtherRankExited as exited:
        result["state"], result["reason"] = exited.state, exited.reason
    except Paused as pause:
        result["state"], result["reason"] = distributed.announce_exit("paused", str(pause))
    except LearnerError as error:
        result["state"], result["reason"] = distributed.announce_exit("stopped", str(error))
    except (OSError, RuntimeError, MemoryError) as error:
        if not (outcome := exhausted(error)):
            raise
        result["state"], result["reason"] = distributed.announce_exit(*outcome)
    finally:
        if progress:
            result["seconds"] = round(progress.seconds, 1)
            progress.close()
    if distributed.is_rank_zero():
        write_result(folder, result)
        if progress and result["state"] != "paused":
            draw(folder)
        if result["reason"]:
            print(f"{result['state']}: {result['reason']}", file=sys.stderr)
    return 0 if distributed.under_torchrun() else EXIT_CODES[result["state"]]


def exhausted(error: BaseException) -> tuple[str, str] | None:
    """Return state and reason for a full disk, or for memory that ran out outside of a step; None for other errors."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "paused", f"disk full: {error}; free some space, and the round resumes from its last checkpoint"
    # with several ranks the others have not seen this error: crash, and torchrun restarts all from the checkpoint
    if is_out_of_memory(error) and distributed.world_size() == 1:
        return "stopped", f"out of memory outside of a step: {error}"[:300]
    return None


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    sys.exit(main())
