"""Running a round: the learner as a child process, what it leaves behind, and taking it up again.

The child holds the GPU and may die in any way; its last word is `result.json`, and leaving without one is a crash: an
exit code may be its launcher's. "Is it running?" is a lock on a file, never a pid.
"""

import ctypes
import json
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

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger, Row, utc
from agent.release import release
from agent.rounds import evaluation, records
from agent.site import locks
from agent.site.site import Site
from cxrloop.durable import write_json
from deploy.bundle.bundle import seal
from learner.errors import RoundBusy
from learner.round.folder import lock_round

POLL_S = 0.5
MAX_CRASHES = 3  # without a step of progress between them
STOP_S = 25  # the learner promises to checkpoint and leave within 20
# Threads that wait must sleep, not spin: the node and the model server share these cores (5x slower otherwise, seen).
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
LIBC = ctypes.CDLL(None)  # loaded before any fork: nothing may be loaded between fork and exec


def carry_on(
    site: Site, ledger: Ledger, row: Row, until: datetime | None = None, seen: Callable[[dict], None] = lambda p: None
) -> Row:
    """Take a round from whatever state it is in to its next resting place. The caller holds the lock `round`.

    Resting places: paused (time is up), a verdict, no_look, or an end with its reason. `seen` gets the progress.
    """
    name = row["name"]
    if row["state"] in ("planned", "training", "paused"):
        _train(site, ledger, name, until, seen)
    if records.get(ledger, name)["state"] in ("trained", "scored"):
        evaluation.finish(site, ledger, name)
    return records.get(ledger, name)


def _train(site: Site, ledger: Ledger, name: str, until: datetime | None, seen: Callable[[dict], None]) -> None:
    folder = site.rounds / name
    _set_until(folder, until)
    if records.get(ledger, name)["state"] != "training":
        with ledger.transaction():
            records.advance(ledger, name, "training")
    crashes, last_step = 0, -1
    while True:
        started = time.monotonic()
        code = _child(site, ledger, name, seen)
        _add_seconds(ledger, name, time.monotonic() - started)
        _first_model(site, ledger, name)
        if records.get(ledger, name)["state"] == "cancelled":
            return
        if result := _result(folder):
            return _settle(site, ledger, name, result)
        step = (records.progress(site, name) or {}).get("step", -1)
        crashes, last_step = (1 if step > last_step else crashes + 1), max(step, last_step)
        if crashes >= MAX_CRASHES:
            with ledger.transaction():
                because = f"exit code {code} {MAX_CRASHES} times without progress; see {folder / 'learner.log'}"
                records.advance(ledger, name, "gave_up", because)
            return


def _settle(site: Site, ledger: Ledger, name: str, result: dict) -> None:
    """Turn the learner's last word into the round's state."""
    if result["state"] == "trained":
        folder = site.rounds / name
        bundle = seal(folder / "final", site.models, site.key("signing.key"))
        with ledger.transaction():
            _add_bundle(ledger, bundle, name, f"rounds/{name}/final/state.safetensors", is_baseline=False)
            records.advance(ledger, name, "trained", bundle=bundle)
    elif result["state"] == "paused":
        with ledger.transaction():
            records.advance(ledger, name, "paused", result.get("reason") or "stopped in good order; goes on later")
    else:
        with ledger.transaction():
            records.advance(ledger, name, "stopped", result.get("reason") or "the learner stopped and gave no reason")


def _child(site: Site, ledger: Ledger, name: str, seen: Callable[[dict], None]) -> int:
    """Run the learner once; the exit code of it or its launcher (negative: the signal that killed it)."""
    folder = site.rounds / name
    launcher = _launcher(site)
    _wait_for_orphan(folder)
    (folder / "result.json").unlink(missing_ok=True)  # an earlier process's
    with (folder / "learner.log").open("ab") as log:
        child = subprocess.Popen(
            [*launcher, "-m", "learner", str(folder)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent,
            env={**QUIET, "PET_LOG_DIR": str(folder / "torchrun"), **os.environ},  # where torchrun writes, else /tmp
        )  # fmt: skip
        try:
            while child.poll() is None:
                time.sleep(POLL_S)
                if progress := records.progress(site, name):
                    seen(progress)
                _first_model(site, ledger, name)
                if records.get(ledger, name)["state"] == "cancelled":
                    break
        finally:
            _stop(child)
    return child.returncode


def _launcher(site: Site) -> list[str]:
    """The words before `-m learner`; a program is looked for beside this interpreter first, then on the PATH."""
    words = shlex.split(site.config.learn.launcher)
    if not words:
        return [sys.executable]
    program = shutil.which(words[0], path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not program:
        raise Problem(f'learn.launcher = "{site.config.learn.launcher}": no program {words[0]}; give its full path')
    return [program, *words[1:]]


def _stop(child: subprocess.Popen) -> None:
    """SIGTERM, so that it checkpoints; SIGKILL when it does not leave in time."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _die_with_parent() -> None:
    """In the child: be told (SIGTERM) when the agent dies, so that no second learner ever shares the folder."""
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait_for_orphan(folder: Path) -> None:
    """Let a learner whose agent died write its checkpoint and leave; raises Problem when it does not."""
    for _ in range(int(2 * STOP_S / POLL_S)):
        try:
            with lock_round(folder):
                return
        except RoundBusy:
            time.sleep(POLL_S)
    raise Problem(f"{folder}: another learner still runs in it; stop it, then `cxrloop round resume`")


def _set_until(folder: Path, until: datetime | None) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    wanted = utc(until) if until else None
    if manifest["until"] != wanted:
        write_json(folder / "manifest.json", {**manifest, "until": wanted})


def _first_model(site: Site, ledger: Ledger, name: str) -> None:
    """Seal T=0 as soon as it is there and, when no model is in service, put it into service: the baseline."""
    parts = site.rounds / name / "t0"
    if not parts.is_dir() or ledger.value("SELECT 1 FROM bundle WHERE is_baseline = 1"):
        return
    bundle = seal(parts, site.models, site.key("signing.key"))
    with ledger.transaction():
        _add_bundle(ledger, bundle, name, f"rounds/{name}/t0/state.safetensors", is_baseline=True)
    release.put_in_service(site, ledger, bundle, by="cxrloop", reason="first model, ungated")


def _add_bundle(ledger: Ledger, bundle: str, name: str, state: str | None, is_baseline: bool) -> None:
    ledger.run(
        "INSERT OR IGNORE INTO bundle (id, round, state, is_baseline, training_state, created_at) "
        "VALUES (?, ?, 'candidate', ?, ?, ?)",
        bundle, name, int(is_baseline), state, utc(),
    )  # fmt: skip
    audit.append(ledger, "cxrloop", "bundle sealed", "baseline" if is_baseline else "candidate", after=bundle)


def _add_seconds(ledger: Ledger, name: str, seconds: float) -> None:
    with ledger.transaction():
        ledger.run("UPDATE round SET seconds = seconds + ? WHERE name = ?", seconds, name)


def _result(folder: Path) -> dict:
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


def wait_for_other(site: Site, ledger: Ledger, with_look: bool) -> Row:
    """Wait for the round that another process runs, and return it; `with_look` asks it to end with a look."""
    row = records.open_round(ledger)
    if row and with_look:
        records.want_look(ledger, row["name"])
    row = row or ledger.rows("SELECT * FROM round ORDER BY id DESC LIMIT 1")[0]
    while locks.is_held(site, "round"):
        time.sleep(POLL_S)
    return records.get(ledger, row["name"])
