"""The demo in order: connect, label, three nights, approve, roll back, summarise.

It uses the appliance as a hospital does: images over C-STORE, everything else by the `cxrloop` command. Every number
was computed in this run; where the gate does not pass a candidate, the demo prints that.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from agent import console
from agent.demo import pacs
from agent.demo.figure import draw_nights
from agent.demo.site import Demo, make_demo_site, wait_until_ready
from agent.errors import Problem

NIGHTS = 3
ARCHIVE, DAILY = 720, 60  # images on the first day (the archive) and on each later day
LABELS = 80  # labelled training images: few, so that the first model is weak
SEED = 11


def tell(folder: Path, source: Path | None) -> None:
    """Run the whole demo in `folder` (replaced), with phantoms or with the images of `source`; raises Problem."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the child processes end with this one
    _remove_earlier_demo(folder)
    _heading("cxrloop: three nights of a chest X-ray model, on this machine")
    _print("Research software, not a medical device.")
    if not source:
        _print("Phantoms are easy to classify: the figures here have no clinical meaning.")
    count = ARCHIVE + NIGHTS * DAILY
    images, odd = pacs.own(source, folder / "pacs") if source else pacs.phantoms(folder / "pacs", count, SEED)
    days = pacs.in_days(images, NIGHTS, len(images) // 15 if source else DAILY, SEED)
    demo = make_demo_site(folder / "site", images, NIGHTS)
    _print_protocol(demo)
    log = folder / "serve.log"
    with log.open("wb") as stderr:
        command = [sys.executable, "-m", "agent.cli.main", "serve", "--config", str(demo.root / "appliance.toml")]
        command += ["--child", str(os.getpid())]
        appliance = subprocess.Popen(command, stderr=stderr)
    try:
        wait_until_ready(log, appliance)
        _print(f"The appliance runs: CXRLOOP@127.0.0.1:{demo.port} answers C-ECHO; no model yet.")
        _first_day(demo, days[0], odd)
        for number, later in enumerate(days[1:], start=1):
            _night(demo, number, later)
        _rollback(demo)
        _summarise(demo, folder, time.monotonic() - started)
    finally:
        appliance.terminate()
        appliance.wait()


def _remove_earlier_demo(folder: Path) -> None:
    """Remove the folder of an earlier demo; raises Problem when the folder holds something else."""
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "pacs").is_dir():
            raise Problem(f"{folder} exists and is not an earlier demo; name another folder with --dir")
        shutil.rmtree(folder)


def _print_protocol(demo: Demo) -> None:
    """Print findings, margin and error budget before anything is learnt."""
    gate = demo.ask("config", "show")["gate"]
    _print(
        f"Protocol: findings {', '.join(demo.findings)}; margin {gate['margin']} AUC against the champion and against "
        f"the frozen baseline; {NIGHTS} evaluations planned, alpha {gate['alpha']} / {NIGHTS} = "
        f"{gate['alpha'] / NIGHTS:.4f} each; a finding is decided from {gate['min_class']} patients of its smaller "
        f"class; {LABELS} labelled training images; night 2 has a poisoned teacher and no correction "
        "(site/poisoned.toml)."
    )


def _first_day(demo: Demo, images: list[pacs.DemoImage], odd: list[Path]) -> None:
    """Receive the archive, label some images and freeze the golden set."""
    _heading("day 1: the archive comes in")
    started = time.monotonic()
    statuses = [status for _, status in pacs.deliver([image.path for image in images], demo.port, "CXRLOOP")]
    for path in odd:  # a C-STORE sender would skip them, so they go through the drop folder
        shutil.copy(path, demo.root / "drop" / path.name)
    ingest = demo.settled_status()["ingest"]
    _print(
        f"{statuses.count(0)} of {len(statuses)} images acknowledged and {len(odd)} odd files dropped; after "
        f"{time.monotonic() - started:.0f} s: {ingest['stored']} stored, {ingest['rejected']} rejected, "
        f"{ingest['quarantined']} quarantined."
    )
    not_stored = [row for state in ("rejected", "quarantined") for row in demo.ask("images", "ls", "--state", state)]
    console.table(("state", "reason"), [(row["state"], row["reason"]) for row in not_stored])
    _label(demo)


def _label(demo: Demo) -> None:
    """Import the truth of the reserved ranges and of LABELS training images; then freeze the golden set."""
    truth = {image.sop_uid: image.truth for image in demo.images}
    images = demo.ask("images", "ls", "--limit", "1000000")
    rows = [row for row in images if row["range"] and truth.get(row["sop_uid"])]
    labelled = [row for row in rows if row["range"] == "train"][-LABELS:]
    path = demo.root / "labels.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sop_uid", "finding", "value", "source", "by"))
        for row in [row for row in rows if row["range"] != "train"] + labelled:
            for finding, value in truth[row["sop_uid"]].items():
                writer.writerow((row["sop_uid"], finding, value, "radiologist", "demo"))
    demo.ask("labels", "import", str(path))
    golden = demo.ask("golden", "freeze")
    positives = ", ".join(f"{name} {count}" for name, count in golden["positives"].items())
    training = sum(row["range"] == "train" for row in rows)
    _print(
        f"Labelled: {len(labelled)} of {training} training images, and the reserved ranges. Golden set frozen: "
        f"{golden['images']} images of {golden['patients']} patients; positives {positives}."
    )


def _night(demo: Demo, number: int, later: list[pacs.DemoImage]) -> None:
    """Run a round with an evaluation; approve its candidate while the next day's images come in."""
    poisoned = number == 2
    _heading(f"night {number}" + (": the teacher is poisoned" if poisoned else ""))
    recipe = ["--recipe", "poisoned.toml"] if poisoned else []
    result = demo.ask("round", "run", "--now", "--evaluate", *recipe)
    if number == 1:
        first = demo.settled_status()
        _print(
            f"First model {first['serving']['bundle']} (T=0, {result['labelled']} labelled images): goes into service "
            f"without a gate; the backlog of {first['ingest']['predicted']} images is scored."
        )
    _print(
        f"Round {result['round']}: {result['unlabelled']} images, {result['seconds']:.0f} s, bundle {result['bundle']}."
    )
    if result["verdict"]:
        checks = [check for check in result["verdict"]["checks"] if check["name"].startswith("vs ")]
        console.table(
            ("finding", "check", "AUC", "reference", "difference", "interval", "answer"),
            [
                (
                    check["finding"] or "macro",
                    check["name"],
                    _number(check["candidate"]),
                    _number(check["reference"]),
                    _number(check["observed"], "+"),
                    _interval(check["ci"]),
                    check["outcome"],
                )
                for check in checks
            ],
        )
        _print(f"The gate: {result['verdict']['line']}")
    else:
        _print(f"No verdict: {result['state']}: {result['reason']}")
    night = {"round": result["round"], "bundle": result["bundle"], "state": result["state"], "poisoned": poisoned}
    with demo.flow(later) as flow:
        if result["bundle"]:
            reason = f"verdict of night {number}"
            words = ("approve", result["bundle"], "--by", "Dr. Demo", "--reason", reason)
            approval = demo.ask(*words, allow=(0, 2))
            _print(f"Approve: {_swap(approval)}")
    _print(f"({flow.summary()})")
    demo.nights.append(night)
    demo.settled_status()


def _swap(answer: dict[str, Any]) -> str:
    """Return the answer of `approve` or `rollback` in one line."""
    if answer.get("exit"):
        message = answer["message"]
        return f"exit {answer['exit']}, {message if len(message) < 160 else message[:157] + '...'}"
    return f"{answer['bundle']} is in service ({answer['state']}); the swap took {answer['swap_seconds']} s."


def _rollback(demo: Demo) -> None:
    _heading("a rollback, on a person's request")
    with demo.flow([]) as flow:
        answer = demo.ask("rollback", "--by", "Dr. Demo", "--reason", "to show it", allow=(0, 2))
        time.sleep(0.5)
    _print(f"Rollback: {_swap(answer)} ({flow.summary()})")


def _summarise(demo: Demo, folder: Path, seconds: float) -> None:
    _heading("summary")
    trail = demo.ask("audit", "verify")
    figure = folder / "nights.png"
    draw_nights(demo.root, demo.nights, figure, _print)
    status = demo.ask("status")
    _print(
        f"In service: {status['serving']['bundle'] if status['serving'] else 'none'}; "
        f"evaluations left {status['gate']['evaluations_left']}; audit: {trail['entries']} entries, "
        f"{'unbroken' if trail['ok'] else 'BROKEN'}; {seconds / 60:.1f} minutes in total."
    )
    _print(f"Figure: {figure}")
    _print(f"The site stays in {demo.root}: try `cxrloop status --config {demo.root / 'appliance.toml'}`.")


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}"


def _interval(ci: list[float] | None) -> str:
    return f"[{ci[0]:+.3f}, {ci[1]:+.3f}]" if ci else ""


def _heading(title: str) -> None:
    console.people.print(f"\n== {title}", style="bold")


def _print(text: str) -> None:
    console.people.print(text)
