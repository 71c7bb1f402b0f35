"""The whole loop in one process, and a child process that dies at its k-th durable step.

A durable step is a rename, a link, a removal or a commit. Run as `python -m tests.support.agent.crash_line SITE WORK`:
for k = 1, 2, ... a child runs the loop on a fresh copy of the site and ends (no `finally`, no rollback, no flush) just
before step k. Another child recovers as a start does, and the invariants are checked.
"""

import csv
import json
import os
import shutil
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.errors import Refused
from agent.images import labels
from agent.ledger import audit, states
from agent.ledger.database import Ledger
from agent.release import models, release
from agent.results import reporting
from agent.rounds import golden_set, import_model, records
from agent.service.scheduler import night_step
from agent.site.site import Site
from deploy.bundle import pointer
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.models import InProcessServer

DIED = 9
STEPS = ("rename", "replace", "link", "unlink")


def count_steps(die_at: int) -> None:
    """Let this process end just before its `die_at`-th durable step."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if done == die_at:
            os._exit(DIED)

    def counted(act):
        def wrapper(*args, **kwargs):
            step()
            return act(*args, **kwargs)

        return wrapper

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    transaction = Ledger.transaction

    @contextmanager
    def committed(self):
        with transaction(self):
            yield
            step()  # just before the COMMIT

    Ledger.transaction = committed


def walk(root: Path) -> None:
    """Images, labels, golden set, first model, scores, candidate, verdict, approval, rollback."""
    site = Site.open(root / "appliance.toml")
    with site.ledger() as ledger:
        for seed in (900, 901):
            name = put(site, xray(seed), f"{seed}.dcm").name
            with (root / "acknowledged").open("a") as file:
                file.write(name + "\n")
        take_in(site, ledger)
        labels.import_csv(site, ledger, root / "labels.csv", "test")
        golden_set.freeze(site, ledger, "test")
        import_model.import_file(site, ledger, root / "first.onnx", "test", False)
        score_all(site, ledger)
        second = import_model.import_file(site, ledger, root / "second.onnx", "test", True)
        assert second["verdict"]["outcome"] == "passed", second["verdict"]["line"]
        release.approve(site, ledger, second["bundle"], "Dr. A", "it passed")
        release.rollback(site, ledger, None, "Dr. B", "to see it")


def score_all(site: Site, ledger: Ledger) -> None:
    """Score until no image waits, if a model is in service."""
    server: Any = InProcessServer(site, ledger)
    while models.in_service(ledger) and reporting.score_waiting(site, ledger, server):
        pass


def recover(root: Path) -> None:
    """Do what a start of the appliance does, until nothing is left to do."""
    site = Site.open(root / "appliance.toml")
    site.inbox.sweep()
    now = datetime.now(UTC)
    with site.ledger() as ledger:
        take_in(site, ledger)
        try:
            release.reconcile(site, ledger, now)
        except Refused as error:
            raise AssertionError(f"recovery refused what was allowed before: {error}") from error
        night_step(site, now)
        release.reconcile(site, ledger, now)
        score_all(site, ledger)


def check(root: Path, had_served: bool) -> list[str]:
    """Return the invariants that do not hold."""
    site = Site.open(root / "appliance.toml")
    wrong = []
    acked = (root / "acknowledged").read_text().split() if (root / "acknowledged").exists() else []
    with site.ledger() as ledger:
        for name in acked:
            row = ledger.row("SELECT i.* FROM receipt r JOIN image i ON i.id = r.image WHERE r.name = ?", name)
            if not row or not site.store.path(row["original"]).is_file() or not site.store.path(row["plate"]).is_file():
                wrong.append(f"acknowledged {name} is lost")
        if site.inbox.waiting():
            wrong.append("the inbox is not empty")
        serving = ledger.rows("SELECT * FROM bundle WHERE state IN ('probation', 'live')")
        signed = pointer.read(site.root)
        if had_served and not serving:
            wrong.append("a model was in service and none is now")
        if len(serving) > 1 or [row["id"] for row in serving] != ([signed.bundle] if signed else []):
            wrong.append(f"in service {serving}, pointer {signed}")
        for row in serving:
            made = ledger.row("SELECT state FROM round WHERE bundle = ?", row["id"])
            if not row["is_baseline"] and (not made or made["state"] != "passed"):
                wrong.append(f"{row['id']} serves without a passing verdict")
        last = ledger.row("SELECT * FROM deployment ORDER BY id DESC LIMIT 1")
        if last and last["state"] == "requested":
            wrong.append("a deployment is half done")
        if records.open_round(ledger):
            wrong.append("a round is neither at its end nor resumable")
        if ledger.value(
            "SELECT count(*) FROM evaluation e LEFT JOIN verdict v ON v.evaluation = e.id WHERE v.evaluation IS NULL"
        ):
            wrong.append("an evaluation was spent and has no verdict")
        for row in ledger.rows("SELECT state FROM bundle"):
            if row["state"] not in {*states.BUNDLE, "rejected", "refused"}:
                wrong.append(f"unknown bundle state {row['state']}")
        counters = ledger.counters()
        if serving and counters["predicted"] != counters["stored"]:
            wrong.append(f"the backlog is not scored: {counters}")
        verified = audit.verify(ledger, site.root / "audit.heads", site.key("signing.pub"))
        if not verified["ok"]:
            wrong.append(f"audit: {verified['broken']}")
    return wrong


def in_child(work, *args) -> int:
    """Run `work(*args)` in a forked process; return its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*args)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_walking(root: Path, k: int) -> None:
    count_steps(k)
    walk(root)


def write_labels(path: Path, rows: list[tuple[str, str, int]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("sop_uid", "finding", "value"), *rows])


def report_wrong(root: Path, had_served: bool, answer: Path) -> None:
    answer.write_text(json.dumps(check(root, had_served)))


def copied(source: str, target: str) -> None:
    """Copy a file; link files of the store, which nothing changes."""
    os.link(source, target) if "/store/" in source else shutil.copy2(source, target)


def main(base: Path, work: Path) -> None:
    k, failures = 0, {}
    while True:
        k += 1
        root = work / f"k{k}"
        shutil.copytree(base, root, copy_function=copied)
        code = in_child(die_walking, root, k)
        had_served = (root / "current").exists()
        if code not in (DIED, 0):
            failures[k] = [f"the walk failed with {code}"]
        elif (again := in_child(recover, root)) != 0:
            failures[k] = [f"recovery failed with {again}"]
        else:
            answer = work / "answer.json"
            in_child(report_wrong, root, had_served, answer)
            if wrong := json.loads(answer.read_text()):
                failures[k] = wrong
        shutil.rmtree(root)
        if code == 0:
            break
    print(json.dumps({"steps": k - 1, "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
