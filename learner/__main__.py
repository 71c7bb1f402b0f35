"""`python -m learner ROUND_DIR`: one round from manifest to bundle parts, resumable at any step.

The recipe named in the manifest decides what happens (`recipes/`); here are the lock, the exit code and the last word.
Exit 0 trained, 75 paused, 3 stopped with a reason in result.json. Golden films, the ledger and DICOM are unknown here.
"""

import argparse
import importlib
import sys
import warnings
from pathlib import Path

from learner.backbone import BackboneError
from learner.checkpoint import CheckpointError
from learner.progress import Paused
from learner.round_dir import PAUSED, STOPPED, TRAINED, ManifestError, RoundBusy, held, load, write_json
from learner.run import Run
from learner.shard import remove_shard
from learner.step import Stopped

REFUSALS = (ManifestError, BackboneError, CheckpointError, Stopped)  # known reasons; anything else is a crash


def main(arguments: list[str] | None = None) -> int:
    """Run or resume the round in a folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m learner", description="Train one round; start again to resume.")
    parser.add_argument("round_dir", type=Path, help="folder with manifest.json")
    folder: Path = parser.parse_args(arguments).round_dir
    try:
        with held(folder):
            return run(folder)
    except (RoundBusy, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1


def run(folder: Path) -> int:
    """The round, under its lock."""
    result = {"state": "trained", "reason": None, "seconds": 0.0, "unlabelled": 0, "labelled": 0}
    code, teller = TRAINED, None
    try:
        round_ = load(folder)
        result |= {"unlabelled": len(round_.unlabelled), "labelled": len(round_.labelled)}
        work = Run(round_)
        teller = work.teller
        teller.listen()
        recipe = importlib.import_module(f"learner.recipes.{round_.recipe.method.replace('-', '_')}")
        recipe.run(work)
        teller.say("done", 1, 1)
        remove_shard(folder)
    except Paused as pause:
        code, result["state"], result["reason"] = PAUSED, "paused", str(pause)
    except REFUSALS as error:
        code, result["state"], result["reason"] = STOPPED, "stopped", str(error)
    finally:
        if teller:
            result["seconds"] = round(teller.seconds, 1)
            teller.close()
    write_json(folder / "result.json", result)
    if result["reason"]:
        print(f"{result['state']}: {result['reason']}", file=sys.stderr)
    return code


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    sys.exit(main())
