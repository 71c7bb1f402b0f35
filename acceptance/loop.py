"""Part 1 of the real-input run: Kermany images from dcmsend to a promoted model, with each process killed once.

Everything is asked of the `cxrloop` command; the numbers on the golden set are computed beside the gate, after it.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from acceptance.driver import REPO, Appliance
from acceptance.images import choose, composition, kermany, wrap_all, write_labels
from acceptance.record import Record
from acceptance.sending import NAMES, send_all
from agent.demo.figure import estimate, raw_pixels
from agent.demo.flow import Flow
from agent.rounds import evaluation, golden_set
from agent.site.site import Site

GOLDEN_SHARE = 400 / 1500
BY = ("--by", "Acceptance run", "--reason")
ALL = ("--limit", "1000000")


def run(data: Path, root: Path, record: Record, images: int, profile: str, cap: int, seed: int) -> None:
    """The whole of part 1; what does not hold is a broken check, what cannot go on raises Failed."""
    changed = {"window": '""', "evaluations_per_year": "3", "max_unlabelled": str(cap)}
    appliance = Appliance.make(root / "site", profile, changed)
    site = Site.open(appliance.root / "appliance.toml")
    chosen = choose(
        kermany(data / "kermany224", site.key("pseudonym.key"), site.config.patients),
        images, round(GOLDEN_SHARE * images), seed,
    )  # fmt: skip
    record.result["composition"] = composition(chosen)
    began = time.monotonic()
    made = wrap_all(chosen, root / "images")
    record.event("images wrapped as DX DICOM", images=len(made), seconds=round(time.monotonic() - began, 1))
    record.event("serve", ready_after_s=round(appliance.start(), 1))
    try:
        acknowledged = send_all(appliance, record, made)
        _stored(appliance, record, made, acknowledged)
        _labels(appliance, record, write_labels(made, root / "labels.csv", seed), root / "labels.csv")
        _rounds(appliance, site, record)
        _end(appliance, record, acknowledged)
    finally:
        record.event("SIGTERM to serve", gone_after_s=round(appliance.stop(), 1))


def _stored(appliance: Appliance, record: Record, made: dict, acknowledged: set[str]) -> None:
    images = appliance.status()["ingest"]
    rows = appliance.ask("studies", "ls", *ALL)
    count = Counter(row["sop_uid"] for row in rows)
    twice = appliance.value("SELECT count(*) FROM receipt WHERE outcome = 'duplicate'")
    record.result["intake"] = {**images, "acknowledged": len(acknowledged), "stored_before_the_answer_was_lost": twice}
    record.check("stored == sent", images["stored"] == len(made), f"{images['stored']} of {len(made)}")
    record.check("nothing set aside", images["rejected"] + images["quarantined"] == 0, images)
    record.check(
        "every acknowledged image is in `studies ls`", acknowledged <= set(count), f"{len(acknowledged)} images"
    )
    record.check("each image once", set(count.values()) == {1}, f"{len(rows)} rows; {twice} copies recognised")
    ranges = {uid: image.range for uid, image in made.values()}
    wrong = [row for row in rows if ranges.get(row["sop_uid"]) != row["range"]]
    record.check("every patient in the range that the key gives", not wrong, f"{len(wrong)} in another")


def _labels(appliance: Appliance, record: Record, told: dict[str, int], table: Path) -> None:
    said = appliance.ask("labels", "import", str(table))
    record.event("labels import", **said, by_range=told)
    all_known = said["added"] == said["rows"] == sum(told.values()) and not said["unknown_images"]
    record.check("every label found its image", all_known, said)
    frozen = appliance.ask("golden", "freeze")
    record.event("golden freeze", **{key: frozen[key] for key in ("images", "patients", "positives", "negatives")})
    record.check("the golden set is the images meant for it", frozen["images"] == told["golden"], frozen["images"])
    record.result |= {"labelled": told, "golden": frozen}


def _rounds(appliance: Appliance, site: Site, record: Record) -> None:
    first = _round(appliance, record, look=False, victim="infer")
    backlog = appliance.drained()["ingest"]
    record.check("the backlog is scored: predicted == stored", backlog["predicted"] == backlog["stored"], backlog)
    one_in_service(appliance, record, "after the baseline")
    record.result["power"] = appliance.ask("golden", "power")
    record.event("golden power", **record.result["power"])
    rounds, answers = [first], []
    for victim in ("learner", "round"):
        rounds.append(_round(appliance, record, look=True, victim=victim))
        answers.append(_approve(appliance, record, rounds[-1]["bundle"], "verdict of the gate"))
        one_in_service(appliance, record, f"after {rounds[-1]['round']}")
    if not any("swap_seconds" in answer for answer in answers):
        answers.append(_opened_wide(appliance, record, rounds[-1]))
    record.result |= {"rounds": rounds, "approvals": answers}
    with Flow([], appliance.port, "", f"http://127.0.0.1:{appliance.port + 1}") as flow:
        back = appliance.ask("rollback", *BY, "acceptance", allow=(0, 2))
        time.sleep(0.5)
    record.event("rollback", **back, requests_answered=sum(flow.answers.values()), requests_failed=flow.failed)
    record.check("rollback works", "swap_seconds" in back and not flow.failed, f"{flow.failed} failed requests")
    record.result["rollback"] = {**back, "answered": dict(flow.answers), "failed": flow.failed}
    one_in_service(appliance, record, "after the rollback")
    record.result["auc"] = _measured(site, rounds)


def _round(appliance: Appliance, record: Record, look: bool, victim: str) -> dict[str, Any]:
    """`round run --now`, with one process killed on the way; the same command is given again when it was the victim."""
    words = appliance.words("round", "run", "--now", *(["--evaluate"] if look else []), "--json")
    began, before = time.monotonic(), appliance.value("SELECT count(*) FROM round")
    command = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPO)
    killed = False
    while command.poll() is None:
        if not killed and _moment(appliance, victim, before):
            if victim == "round":
                command.kill()
                killed = True
            else:
                killed = appliance.kill(victim)
            if killed:
                record.event(f"kill -9: {NAMES[victim]}", progress=_progress(appliance))
            if killed and victim == "infer":
                record.event("infer started again by serve", after_s=round(appliance.back("infer"), 1))
        time.sleep(0.1)
    code = command.returncode
    if victim == "round" and killed:
        command = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPO)
        record.event("the same `round run` command again")
        code = command.wait()
    rows = appliance.ask("round", "ls")
    said = {**rows[0], "wall_seconds": round(time.monotonic() - began, 1), "exit": code, "killed": victim}
    line = said["verdict"]["line"] if said["verdict"] else said["reason"]
    record.event(f"round {said['round']}", state=said["state"], bundle=said["bundle"], said=line,
                 seconds=said["seconds"], wall_seconds=said["wall_seconds"])  # fmt: skip
    record.check(f"kill -9: {NAMES[victim]}", killed, "done" if killed else "the moment never came")
    ended = said["state"] in (("passed", "failed", "inconclusive") if look else ("not_evaluated",))
    only = len(rows) == before + 1
    record.check(f"{said['round']} goes on after the kill, to its end", ended and only and code == 0, said["state"])
    return said


def _moment(appliance: Appliance, victim: str, before: int) -> bool:
    """Whether now is the time: the backlog is being scored, or a third of the round's steps done."""
    if victim == "infer":
        return appliance.value("SELECT n FROM counter WHERE name = 'predicted'") > 0
    if appliance.value("SELECT count(*) FROM round") == before:
        return False
    progress = _progress(appliance)
    return bool(progress.get("steps")) and progress.get("step", 0) >= progress["steps"] / 3


def _progress(appliance: Appliance) -> dict[str, Any]:
    """Phase and step of the newest round's learner, from its progress.json (a command each time would slow it down)."""
    name = appliance.value("SELECT name FROM round ORDER BY id DESC LIMIT 1")
    path = appliance.root / "rounds" / str(name) / "progress.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    return {key: said[key] for key in ("phase", "step", "steps") if key in said}


def _approve(appliance: Appliance, record: Record, bundle: str, reason: str) -> dict[str, Any]:
    """`approve`, while questions to /predict go on; what the command answered."""
    with Flow([], appliance.port, "", f"http://127.0.0.1:{appliance.port + 1}") as flow:
        answer = appliance.ask("approve", bundle, *BY, reason, allow=(0, 2))
        time.sleep(0.5)
    asked = {"requests_answered": sum(flow.answers.values()), "requests_failed": flow.failed}
    record.event(f"approve {bundle}", **answer, **asked)
    passed = appliance.value("SELECT state FROM round WHERE bundle = ?", bundle) == "passed"
    agrees = ("swap_seconds" in answer) == passed and not flow.failed
    record.check(f"approve {bundle}: into service if and only if the gate passed it", agrees, f"passed: {passed}")
    return {"asked_for": bundle, "reason": reason, **answer, **asked}


def _opened_wide(appliance: Appliance, record: Record, last: dict[str, Any]) -> dict[str, Any]:
    """No candidate passed: the third look with a margin that lets anything in, so that the swap is exercised at all."""
    record.event("no candidate passed: the gate is opened wide for the third look, to exercise swap and rollback")
    appliance.set({"margin": "0.49", "min_class": "2", "require_better": "false"})
    model = appliance.root / "models" / last["bundle"] / "model.onnx"
    said = appliance.ask("models", "import", str(model), "--evaluate", "--by", "Acceptance run")
    record.event("models import --evaluate", bundle=said["bundle"], said=(said["verdict"] or {}).get("line"))
    answer = _approve(appliance, record, said["bundle"], "mechanics only: the gate was opened wide on purpose")
    one_in_service(appliance, record, "after the swap")
    return {**answer, "opened_wide": True}


def one_in_service(appliance: Appliance, record: Record, when: str) -> None:
    """Ledger, status and server name one and the same bundle."""
    states = [(row["bundle"], row["state"]) for row in appliance.ask("models", "ls")]
    serving = [bundle for bundle, state in states if state in ("probation", "live")]
    named = (appliance.status()["serving"] or {}).get("bundle")
    ready = appliance.serves()
    record.check(f"exactly one bundle in service, {when}", serving == [named] == [ready], f"{serving}, {ready}")


def _measured(site: Site, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """AUC with its 95 % interval on the frozen golden set: baseline, each round's bundle, and the raw-pixel floor."""
    with site.ledger() as ledger:
        version = golden_set.current(ledger)
        assert version is not None
        reference, plates = golden_set.load(site, ledger, version)
        baseline = ledger.value("SELECT id FROM bundle WHERE is_baseline = 1")
        named = [("T=0, the baseline", baseline), *((row["round"], row["bundle"]) for row in rounds if row["bundle"])]
        table = [
            (name, bundle, estimate(evaluation.score(site, bundle, plates).probabilities, reference))
            for name, bundle in named
        ]
        table.append(
            ("raw pixels 24 x 24 + logistic, same labels", None, estimate(raw_pixels(site, ledger, plates), reference))
        )
    return [
        {"model": name, "bundle": bundle, "auc": round(auc, 4), "low": round(low, 4), "high": round(high, 4)}
        for name, bundle, (auc, low, high) in table
    ]


def _end(appliance: Appliance, record: Record, acknowledged: set[str]) -> None:
    status = appliance.drained()
    rows = appliance.ask("studies", "ls", *ALL)
    missing = acknowledged - {row["sop_uid"] for row in rows}
    record.check("at the end nothing acknowledged is missing", not missing, f"{len(missing)} missing")
    originals = sum(1 for path in (appliance.root / "store" / "originals").rglob("*.dcm"))
    record.check("an original on disk for every image", originals == status["ingest"]["stored"], originals)
    trail = appliance.ask("audit", "verify", allow=(0, 1))
    record.check("audit verify", trail.get("ok", False), f"{trail.get('entries')} entries")
    record.check("the node answers C-ECHO", appliance.echo())
    record.result |= {"audit": trail, "status": status, "models": appliance.ask("models", "ls")}
