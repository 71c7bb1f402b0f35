"""The demo, told in order: connect, label, three nights, approve, roll back, sum up.

It uses the appliance as a hospital would: images over C-STORE, everything else by the `cxrloop` command.
Every number it prints was computed in this run; where the gate says no, it prints that no.
"""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import console
from agent.demo import pacs
from agent.demo.figure import draw_nights
from agent.demo.flow import Flow
from agent.errors import Problem

NIGHTS = 3
ARCHIVE, DAILY = 720, 60  # images on the first day (the archive) and on each later one
LABELS = 80  # labelled training images: few, so that T=0 is weak
SEED = 11
READY_S = 300  # a busy machine needs a minute for the imports alone; one that is dead is noticed at once
POISONED = """base = "distl"
# A bad night on purpose: the teacher's class logits are inverted. The gate's code knows nothing of it.
poison_teacher = true
# And no correction on the labelled images: with it, the labels heal most of the harm before the night is over.
correct_every = 0
"""


@dataclass
class Demo:
    """The site under way: its folder and port, the PACS's images, and what each night answered."""

    root: Path
    port: int
    findings: tuple[str, ...]
    images: list[pacs.Image]
    nights: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, *words: str, allow: tuple[int, ...] = (0,)) -> Any:
        """A `cxrloop` command with --json: its document, or `{"exit", "said"}` where the code is not 0 but allowed."""
        command = [
            sys.executable,
            "-m",
            "agent.cli.main",
            *words,
            "--json",
            "--config",
            str(self.root / "appliance.toml"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in allow:
            raise Problem(f"cxrloop {' '.join(words)} failed ({done.returncode}): {done.stderr.strip()[-800:]}")
        return {"exit": done.returncode, "said": done.stderr.strip()} if done.returncode else json.loads(done.stdout)

    def settled(self) -> dict[str, Any]:
        """`status`, once the inbox and the drop folder are empty and, with a model in service, all images are scored."""
        while True:
            said = self.ask("status")
            images, dropped = said["ingest"], any((self.root / "drop").iterdir())
            if not images["inbox"] and not dropped and (not said["serving"] or images["predicted"] == images["stored"]):
                return said
            time.sleep(0.5)

    def flow(self, images: list[pacs.Image]) -> Flow:
        return Flow([image.path for image in images], self.port, "CXRLOOP", f"http://127.0.0.1:{self.port + 1}")


def tell(folder: Path, source: Path | None) -> None:
    """Run the whole demo in `folder` (made anew), with phantoms or with the images of `source`."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what it started ends with it
    _clear(folder)
    _rule("cxrloop: three nights of a chest X-ray model, on this machine")
    console.people.print(
        "Research software, not a medical device.",
        "" if source else "Phantoms are easy: no figure here says anything clinical.",
    )
    n = ARCHIVE + NIGHTS * DAILY
    images, odd = pacs.own(source, folder / "pacs") if source else pacs.phantoms(folder / "pacs", n, SEED)
    days = pacs.in_days(images, NIGHTS, DAILY if not source else len(images) // 15, SEED)
    demo = _site(folder / "site", images)
    log = folder / "serve.log"
    with log.open("wb") as stderr:
        command = [sys.executable, "-m", "agent.cli.main", "serve", "--config", str(demo.root / "appliance.toml")]
        command += ["--child", str(os.getpid())]
        appliance = subprocess.Popen(command, stderr=stderr)
    try:
        _wait_ready(demo, log, appliance)
        _first_day(demo, days[0], odd)
        for number, later in enumerate(days[1:], start=1):
            _night(demo, number, later)
        _rollback(demo)
        _sum_up(demo, folder, time.monotonic() - started)
    finally:
        appliance.terminate()
        appliance.wait()


def _clear(folder: Path) -> None:
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "pacs").is_dir():
            raise Problem(f"{folder} exists and is not an earlier demo; name another folder with --dir")
        shutil.rmtree(folder)


def _site(root: Path, images: list[pacs.Image]) -> Demo:
    findings = tuple(sorted({name for image in images for name in image.truth}))
    if not findings:
        raise Problem("no image has a label: labels.csv needs rows whose `file` names an image, with value 1 or 0")
    demo = Demo(root, _free_port(), findings, images)
    words = [word for name in findings for word in ("--finding", name)]
    demo_init = ["init", str(root), "--profile", "demo", "--port", str(demo.port), *words]
    subprocess.run([sys.executable, "-m", "agent.cli.main", *demo_init], check=True, stdout=subprocess.DEVNULL)
    settings = root / "appliance.toml"
    text = settings.read_text("utf-8").replace('window = "22:00-05:00"', 'window = ""')
    settings.write_text(text.replace("evaluations_per_year = 52", f"evaluations_per_year = {NIGHTS}"), "utf-8")
    (root / "poisoned.toml").write_text(POISONED, "utf-8")
    gate = demo.ask("config", "show")["gate"]
    console.people.print(
        f"Protocol: findings {', '.join(findings)}; margin {gate['margin']} AUC against the champion and against "
        f"the frozen baseline; {NIGHTS} evaluations planned, alpha {gate['alpha']} / {NIGHTS} = {gate['alpha'] / NIGHTS:.4f} each; "
        f"a finding is decided from {gate['min_class']} patients of its smaller class; {LABELS} labelled training images; "
        "night 2 has a poisoned teacher and no correction (site/poisoned.toml)."
    )
    return demo


def _free_port() -> int:
    for port in range(11112, 60000, 10):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
                return port
            except OSError:
                continue
    raise Problem("no two neighbouring free ports on loopback")


def _wait_ready(demo: Demo, log: Path, appliance: subprocess.Popen) -> None:
    deadline = time.monotonic() + READY_S
    while "\nready" not in "\n" + log.read_text(errors="replace"):
        if (code := appliance.poll()) is not None:
            raise Problem(f"the appliance ended with exit code {code} before it was ready; see {log}")
        if time.monotonic() > deadline:
            raise Problem(f"the appliance was not ready after {READY_S} s; is this machine busy? See {log}")
        time.sleep(0.2)
    console.people.print(f"The appliance is up: CXRLOOP@127.0.0.1:{demo.port} answers C-ECHO; no model yet.")


def _first_day(demo: Demo, images: list[pacs.Image], odd: list[Path]) -> None:
    _rule("day 1: the archive comes in")
    started = time.monotonic()
    statuses = [status for _, status in pacs.deliver([image.path for image in images], demo.port, "CXRLOOP")]
    for path in odd:  # what no C-STORE sender would touch goes through the drop folder
        shutil.copy(path, demo.root / "drop" / path.name)
    seen = demo.settled()["ingest"]
    console.people.print(
        f"{statuses.count(0)} of {len(statuses)} images acknowledged and {len(odd)} odd files dropped; after "
        f"{time.monotonic() - started:.0f} s: {seen['stored']} stored, {seen['rejected']} rejected, {seen['quarantined']} quarantined."
    )
    aside = [row for state in ("rejected", "quarantined") for row in demo.ask("studies", "ls", "--state", state)]
    console.table(("state", "reason"), [(row["state"], row["reason"]) for row in aside])
    _label(demo)


def _label(demo: Demo) -> None:
    """The truth of the reserved ranges, and of LABELS training images, as a CSV; then the golden set is frozen."""
    truth = {image.sop_uid: image.truth for image in demo.images}
    rows = [
        row for row in demo.ask("studies", "ls", "--limit", "1000000") if row["range"] and truth.get(row["sop_uid"])
    ]
    train = [row for row in rows if row["range"] == "train"][-LABELS:]
    path = demo.root / "labels.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sop_uid", "finding", "value", "source", "by"))
        for row in [row for row in rows if row["range"] != "train"] + train:
            for finding, value in truth[row["sop_uid"]].items():
                writer.writerow((row["sop_uid"], finding, value, "radiologist", "demo"))
    demo.ask("labels", "import", str(path))
    golden = demo.ask("golden", "freeze")
    pool = sum(row["range"] == "train" for row in rows)
    console.people.print(
        f"Labelled: {len(train)} of {pool} training images, and the reserved ranges. Golden set frozen: "
        f"{golden['images']} images of {golden['patients']} patients; positives "
        + ", ".join(f"{name} {n}" for name, n in golden["positives"].items())
        + "."
    )


def _night(demo: Demo, number: int, later: list[pacs.Image]) -> None:
    poisoned = number == 2
    _rule(f"night {number}" + (": the teacher is poisoned" if poisoned else ""))
    said = demo.ask("round", "run", "--now", "--evaluate", *(["--recipe", "poisoned.toml"] if poisoned else []))
    if number == 1:
        baseline = demo.settled()
        console.people.print(
            f"First model {baseline['serving']['bundle']} (T=0, {said['labelled']} labelled images): into service, ungated; "
            f"the backlog of {baseline['ingest']['predicted']} images is scored."
        )
    console.people.print(
        f"Round {said['round']}: {said['unlabelled']} images, {said['seconds']:.0f} s, bundle {said['bundle']}."
    )
    if said["verdict"]:
        console.table(
            ("finding", "check", "AUC", "reference", "difference", "interval", "answer"),
            [
                (
                    c["finding"],
                    c["name"],
                    _f(c["candidate"]),
                    _f(c["reference"]),
                    _f(c["observed"], "+"),
                    _span(c["ci"]),
                    c["outcome"],
                )
                for c in said["verdict"]["checks"]
                if c["name"].startswith("vs ")
            ],
        )
        console.people.print(f"The gate: {said['verdict']['line']}")
    else:
        console.people.print(f"No verdict: {said['state']}: {said['reason']}")
    night = {"round": said["round"], "bundle": said["bundle"], "state": said["state"], "poisoned": poisoned}
    with demo.flow(later) as flow:
        if said["bundle"]:
            words = ("approve", said["bundle"], "--by", "Dr. Demo", "--reason", f"verdict of night {number}")
            answer = demo.ask(*words, allow=(0, 2))
            night["swap_seconds"] = answer.get("swap_seconds")
            console.people.print(f"Approve: {_answer(answer)}")
    console.people.print(f"({flow.said()})")
    demo.nights.append(night)
    demo.settled()


def _answer(answer: dict[str, Any]) -> str:
    if answer.get("exit"):
        said = answer["said"]
        return f"exit {answer['exit']}, {said if len(said) < 160 else said[:157] + '...'}"
    return f"{answer['bundle']} is in service ({answer['state']}), swapped in {answer['swap_seconds']} s."


def _rollback(demo: Demo) -> None:
    _rule("a rollback, because someone asks for it")
    with demo.flow([]) as flow:
        answer = demo.ask("rollback", "--by", "Dr. Demo", "--reason", "to show it", allow=(0, 2))
        time.sleep(0.5)
    console.people.print(f"Rollback: {_answer(answer)} ({flow.said()})")


def _sum_up(demo: Demo, folder: Path, seconds: float) -> None:
    _rule("summary")
    trail = demo.ask("audit", "verify")
    figure = folder / "nights.png"
    draw_nights(demo.root, demo.nights, figure, console.people.print)
    status = demo.ask("status")
    console.people.print(
        f"In service: {status['serving']['bundle'] if status['serving'] else 'none'}; evaluations left {status['gate']['evaluations_left']}; "
        f"audit: {trail['entries']} entries, {'unbroken' if trail['ok'] else 'BROKEN'}; {seconds / 60:.1f} minutes in all."
    )
    console.people.print(
        f"Figure: {figure}\nThe site stays in {demo.root}: try `cxrloop status --config {demo.root / 'appliance.toml'}`."
    )


def _f(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}"


def _span(ci: list[float] | None) -> str:
    return f"[{ci[0]:+.3f}, {ci[1]:+.3f}]" if ci else ""


def _rule(title: str) -> None:
    console.people.print(f"\n== {title}", style="bold")
