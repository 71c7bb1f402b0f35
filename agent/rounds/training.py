"""Run a round: the learner as a child process, its result, and resuming it after a pause or a crash.

The child holds the GPU and may die in any way. It ends with `result.json`; without that file it has crashed, whatever
the exit code, which may be its launcher's. A lock on a file shows whether a round runs, never a process id.
"""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger, utc
from agent.release import models, release
from agent.release.models import Model
from agent.rounds import evaluation, inspection, records
from agent.rounds.records import Round
from agent.site import locks
from agent.site.site import Site
from cxrloop.durable import read_json
from deploy.bundle.bundle import seal
from learner.errors import RoundBusy
from learner.round.folder import lock_round
from learner.round.manifest import set_until

POLL_S = 0.5
MAX_CRASHES = 3  # without a step of progress between them
STOP_S = 25  # the learner promises to write a checkpoint and exit within 20
# Threads that wait must sleep, not spin: the node and the model server share these cores (spinning made them 5x slower).
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
LIBC = ctypes.CDLL(None)  # loaded before any fork: nothing may be loaded between fork and exec

Tell = Callable[[dict[str, Any]], None]  # gets the learner's progress while it runs


def carry_on(
    site: Site, ledger: Ledger, current: Round, until: datetime | None = None, tell: Tell = lambda progress: None
) -> Round:
    """Take a round from its state to the next one in which it rests, and return it. The caller holds the lock `round`.

    It rests when it is paused (at `until`), has a verdict, is not evaluated, or has ended with a reason.
    """
    if current.state in ("planned", "training", "paused"):
        current = _train(site, ledger, current, until, tell)
    if current.state in ("trained", "scored"):
        current = evaluation.finish(site, ledger, current)
    return current


def _train(site: Site, ledger: Ledger, current: Round, until: datetime | None, tell: Tell) -> Round:
    """Run the learner until it leaves a result, a person cancels the round, or it crashes too often."""
    folder = site.rounds / current.name
    set_until(folder, utc(until) if until else None)
    if current.state != "training":
        with ledger.transaction():
            current = records.advance(ledger, current, "training")
    crashes, last_step = 0, -1
    while True:
        started = time.monotonic()
        code = _run_learner(site, ledger, current, tell)
        current = records.add_seconds(ledger, current, time.monotonic() - started)
        _deploy_first_model(site, ledger, current)
        if current.state == "cancelled":
            return current
        if result := read_json(folder / "result.json"):
            return _settle(site, ledger, current, result)
        step = inspection.progress(folder).get("step", -1)
        crashes, last_step = (1 if step > last_step else crashes + 1), max(step, last_step)
        if crashes >= MAX_CRASHES:
            because = f"exit code {code} {MAX_CRASHES} times without progress; see {folder / 'learner.log'}"
            with ledger.transaction():
                return records.advance(ledger, current, "gave_up", because)


def _run_learner(site: Site, ledger: Ledger, current: Round, tell: Tell) -> int:
    """Run the learner once; return the exit code of it or its launcher (negative: the signal that killed it)."""
    folder = site.rounds / current.name
    launcher = _launcher(site)
    _wait_for_orphan(folder)
    (folder / "result.json").unlink(missing_ok=True)  # of an earlier process
    with (folder / "learner.log").open("ab") as log:
        child = subprocess.Popen(
            [*launcher, "-m", "learner", str(folder)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent,
            env={**QUIET, "PET_LOG_DIR": str(folder / "torchrun"), **os.environ},  # where torchrun writes, else /tmp
        )  # fmt: skip
        try:
            while child.poll() is None:
                time.sleep(POLL_S)
                if progress := inspection.progress(folder):
                    tell(progress)
                _deploy_first_model(site, ledger, current)
                if records.is_cancelled(ledger, current):
                    break
        finally:
            _stop(child)
    return child.returncode


def _deploy_first_model(site: Site, ledger: Ledger, current: Round) -> None:
    """Seal T=0 as soon as the learner has written it; where the site has no baseline yet, put it into service as that."""
    parts = site.rounds / current.name / "t0"
    if not parts.is_dir() or models.baseline(ledger):
        return
    bundle = seal(parts, site.models, site.key("signing.key"))
    with ledger.transaction():
        baseline = _add_model(ledger, bundle, current, part="t0", is_baseline=True)
    release.put_in_service(site, ledger, baseline, by="cxrloop", reason="first model, ungated")


def _settle(site: Site, ledger: Ledger, current: Round, result: dict[str, Any]) -> Round:
    """Turn the learner's result into the round's next state; a trained round gets its bundle."""
    reason = result.get("reason")
    if result["state"] == "trained":
        bundle = seal(site.rounds / current.name / "final", site.models, site.key("signing.key"))
        with ledger.transaction():
            _add_model(ledger, bundle, current, part="final", is_baseline=False)
            return records.advance(ledger, current, "trained", "; ".join(result.get("notes", [])), bundle)
    with ledger.transaction():
        if result["state"] == "paused":
            return records.advance(ledger, current, "paused", reason or "stopped on request; will resume")
        return records.advance(ledger, current, "stopped", reason or "the learner stopped and gave no reason")


def _add_model(ledger: Ledger, bundle: str, maker: Round, part: str, is_baseline: bool) -> Model:
    training_state = f"rounds/{maker.name}/{part}/state.safetensors"
    audit.append(ledger, "cxrloop", "bundle sealed", "baseline" if is_baseline else "candidate", after=bundle)
    return models.add(ledger, bundle, maker.name, is_baseline, training_state)


def _launcher(site: Site) -> list[str]:
    """Return the words before `-m learner`; a program is searched beside this interpreter first, then on the PATH."""
    words = shlex.split(site.config.learn.launcher)
    if not words:
        return [sys.executable]
    program = shutil.which(words[0], path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not program:
        raise Problem(f'learn.launcher = "{site.config.learn.launcher}": no program {words[0]}; give its full path')
    return [program, *words[1:]]


def _wait_for_orphan(folder: Path) -> None:
    """Wait until a learner whose agent died has written its checkpoint and exited; raises Problem when it does not."""
    for _ in range(int(2 * STOP_S / POLL_S)):
        try:
            with lock_round(folder):
                return
        except RoundBusy:
            time.sleep(POLL_S)
    raise Problem(f"{folder}: another learner still runs in it; stop it, then `cxrloop round resume`")


def _stop(child: subprocess.Popen) -> None:
    """Send SIGTERM, so that the child writes a checkpoint; SIGKILL when it does not exit in time."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _die_with_parent() -> None:
    """In the child: ask for SIGTERM when the agent dies, so that no second learner ever shares the folder."""
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def wait_for_running(site: Site, ledger: Ledger, evaluate: bool) -> Round:
    """Wait until the round that another process runs rests, and return it; `evaluate` makes it end with an evaluation."""
    running = records.open_round(ledger)
    if running and evaluate:
        records.request_evaluation(ledger, running)
    running = running or records.newest(ledger)
    while locks.is_held(site, "round"):
        time.sleep(POLL_S)
    if running is None:
        raise Problem("another process holds the lock of the rounds, and no round is planned yet; try again")
    return records.get(ledger, running.name)
