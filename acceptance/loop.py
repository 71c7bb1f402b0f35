"""Part 1 of the acceptance run: Kermany images from dcmsend to an approved model, with each process killed once.

Every answer comes from the `cxrloop` command; the AUCs on the golden set are computed independently of the gate.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from acceptance.driver import Appliance
from acceptance.images import choose, composition, read_images, wrap_all, write_labels
from acceptance.record import Record
from acceptance.sending import NAMES, send_all
from agent.demo.figure import estimate, raw_pixels
from agent.demo.flow import Flow
from agent.rounds import evaluation, golden_set
from agent.site.site import Site
from bench.common.appliance import ROOT

GOLDEN_SHARE = 400 / 1500
BY = ("--by", "Acceptance run", "--reason")
ALL = ("--limit", "1000000")


def run(data: Path, root: Path, record: Record, images: int, profile: str, cap: int, seed: int) -> None:
    """Run part 1. A check that fails is recorded; a step that cannot continue raises Failed."""
    changed = {"window": '""', "evaluations_per_year": "3", "max_unlabelled": str(cap)}
    appliance = Appliance.make(root / "site", profile, changed)
    site = Site.open(appliance.root / "appliance.toml")
    chosen = choose(
        read_images(data / "kermany224", site.key("pseudonym.key"), site.config.patients),
        images, round(GOLDEN_SHARE * images), seed,
    )  # fmt: skip
    record.result["composition"] = composition(chosen)
    began = time.monotonic()
    files = wrap_all(chosen, root / "images")
    record.event("images wrapped as DX DICOM", images=len(files), seconds=round(time.monotonic() - began, 1))
    record.event("serve", ready_after_s=round(appliance.start(), 1))
    try:
        acknowledged = send_all(appliance, record, files)
        _stored(appliance, record, files, acknowledged)
        _labels(appliance, record, write_labels(files, root / "labels.csv", seed), root / "labels.csv")
        _rounds(appliance, site, record)
        _end(appliance, record, acknowledged)
    finally:
        record.event("SIGTERM to serve", ended_after_s=round(appliance.stop(), 1))


def _stored(appliance: Appliance, record: Record, files: dict, acknowledged: set[str]) -> None:
    images = appliance.status()["ingest"]
    rows = appliance.ask("images", "ls", *ALL)
    count = Counter(row["sop_uid"] for row in rows)
    twice = appliance.value("SELECT count(*) FROM receipt WHERE outcome = 'duplicate'")
    record.result["intake"] = {**images, "acknowledged": len(acknowledged), "stored_before_the_answer_was_lost": twice}
    record.check("stored == sent", images["stored"] == len(files), f"{images['stored']} of {len(files)}")
    record.check("nothing set aside", images["rejected"] + images["quarantined"] == 0, images)
    record.check(
        "every acknowledged image is in `images ls`", acknowledged <= set(count), f"{len(acknowledged)} images"
    )
    record.check("each image once", set(count.values()) == {1}, f"{len(rows)} rows; {twice} copies recognised")
    ranges = {uid: image.range for uid, image in files.values()}
    wrong = [row for row in rows if ranges.get(row["sop_uid"]) != row["range"]]
    record.check("every patient in the range that the key gives", not wrong, f"{len(wrong)} in another")


def _labels(appliance: Appliance, record: Record, by_range: dict[str, int], table: Path) -> None:
    imported = appliance.ask("labels", "import", str(table))
    record.event("labels import", **imported, by_range=by_range)
    all_known = imported["added"] == imported["rows"] == sum(by_range.values()) and not imported["unknown_images"]
    record.check("every label found its image", all_known, imported)
    frozen = appliance.ask("golden", "freeze")
    record.event("golden freeze", **{key: frozen[key] for key in ("images", "patients", "positives", "negatives")})
    record.check("the golden set holds the chosen images", frozen["images"] == by_range["golden"], frozen["images"])
    record.result |= {"labelled": by_range, "golden": frozen}


def _rounds(appliance: Appliance, site: Site, record: Record) -> None:
    first = _round(appliance, record, evaluate=False, victim="infer")
    backlog = appliance.drained()["ingest"]
    record.check("the backlog is scored: predicted == stored", backlog["predicted"] == backlog["stored"], backlog)
    one_in_service(appliance, record, "after the baseline")
    record.result["power"] = appliance.ask("golden", "power")
    record.event("golden power", **record.result["power"])
    rounds, answers = [first], []
    for victim in ("learner", "round"):
        rounds.append(_round(appliance, record, evaluate=True, victim=victim))
        answers.append(_approve(appliance, record, rounds[-1]["bundle"], "verdict of the gate"))
        one_in_service(appliance, record, f"after {rounds[-1]['round']}")
    if not any("swap_seconds" in answer for answer in answers):
        answers.append(_approve_with_open_gate(appliance, record, rounds[-1]))
    record.result |= {"rounds": rounds, "approvals": answers}
    with Flow([], appliance.port, "", f"http://127.0.0.1:{appliance.port + 1}") as flow:
        back = appliance.ask("rollback", *BY, "acceptance", allow=(0, 2))
        time.sleep(0.5)
    record.event("rollback", **back, requests_answered=sum(flow.answers.values()), requests_failed=flow.failed)
    record.check("rollback works", "swap_seconds" in back and not flow.failed, f"{flow.failed} failed requests")
    record.result["rollback"] = {**back, "answered": dict(flow.answers), "failed": flow.failed}
    one_in_service(appliance, record, "after the rollback")
    record.result["auc"] = _golden_aucs(site, rounds)


def _round(appliance: Appliance, record: Record, evaluate: bool, victim: str) -> dict[str, Any]:
    """Run `round run --now` and kill one process meanwhile; if it is the command itself, run the command again."""
    command_line = appliance.command("round", "run", "--now", *(["--evaluate"] if evaluate else []), "--json")
    began, before = time.monotonic(), appliance.value("SELECT count(*) FROM round")
    command = subprocess.Popen(command_line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
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
                record.event("infer started again by serve", after_s=round(appliance.wait_for("infer"), 1))
        time.sleep(0.1)
    code = command.returncode
    if victim == "round" and killed:
        command = subprocess.Popen(command_line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        record.event("the same `round run` command again")
        code = command.wait()
    rows = appliance.ask("round", "ls")
    round_ = {**rows[0], "wall_seconds": round(time.monotonic() - began, 1), "exit": code, "killed": victim}
    line = round_["verdict"]["line"] if round_["verdict"] else round_["reason"]
    record.event(f"round {round_['round']}", state=round_["state"], bundle=round_["bundle"], verdict=line,
                 seconds=round_["seconds"], wall_seconds=round_["wall_seconds"])  # fmt: skip
    record.check(f"kill -9: {NAMES[victim]}", killed, "done" if killed else "no suitable moment")
    ended = round_["state"] in (("passed", "failed", "inconclusive") if evaluate else ("not_evaluated",))
    no_second_round = len(rows) == before + 1
    record.check(
        f"{round_['round']} resumes after the kill and ends", ended and no_second_round and code == 0, round_["state"]
    )
    return round_


def _moment(appliance: Appliance, victim: str, before: int) -> bool:
    """Return whether to kill now: the backlog is being scored, or a third of the round's steps is done."""
    if victim == "infer":
        return appliance.value("SELECT n FROM counter WHERE name = 'predicted'") > 0
    if appliance.value("SELECT count(*) FROM round") == before:
        return False
    progress = _progress(appliance)
    return bool(progress.get("steps")) and progress.get("step", 0) >= progress["steps"] / 3


def _progress(appliance: Appliance) -> dict[str, Any]:
    """Return phase and step of the newest round from its progress.json; a command each time would slow it down."""
    name = appliance.value("SELECT name FROM round ORDER BY id DESC LIMIT 1")
    path = appliance.root / "rounds" / str(name) / "progress.json"
    progress = json.loads(path.read_text()) if path.exists() else {}
    return {key: progress[key] for key in ("phase", "step", "steps") if key in progress}


def _approve(appliance: Appliance, record: Record, bundle: str, reason: str) -> dict[str, Any]:
    """Run `approve` while requests to /predict continue; return the answer of the command."""
    with Flow([], appliance.port, "", f"http://127.0.0.1:{appliance.port + 1}") as flow:
        answer = appliance.ask("approve", bundle, *BY, reason, allow=(0, 2))
        time.sleep(0.5)
    requests = {"requests_answered": sum(flow.answers.values()), "requests_failed": flow.failed}
    record.event(f"approve {bundle}", **answer, **requests)
    passed = appliance.value("SELECT state FROM round WHERE bundle = ?", bundle) == "passed"
    agrees = ("swap_seconds" in answer) == passed and not flow.failed
    record.check(f"approve {bundle}: into service if and only if the gate passed it", agrees, f"passed: {passed}")
    return {"asked_for": bundle, "reason": reason, **answer, **requests}


def _approve_with_open_gate(appliance: Appliance, record: Record, last: dict[str, Any]) -> dict[str, Any]:
    """After no candidate passed: spend the third evaluation with an open gate, to exercise the swap."""
    record.event("no candidate passed: the third evaluation uses an open gate, to exercise swap and rollback")
    appliance.set({"margin": "0.49", "min_class": "2", "require_better": "false"})
    model = appliance.root / "models" / last["bundle"] / "model.onnx"
    imported = appliance.ask("models", "import", str(model), "--evaluate", "--by", "Acceptance run")
    record.event("models import --evaluate", bundle=imported["bundle"], verdict=(imported["verdict"] or {}).get("line"))
    answer = _approve(appliance, record, imported["bundle"], "mechanics only: the gate was opened on purpose")
    one_in_service(appliance, record, "after the swap")
    return {**answer, "open_gate": True}


def one_in_service(appliance: Appliance, record: Record, when: str) -> None:
    """Check that ledger, status and server name the same bundle."""
    states = [(row["bundle"], row["state"]) for row in appliance.ask("models", "ls")]
    serving = [bundle for bundle, state in states if state in ("probation", "live")]
    named = (appliance.status()["serving"] or {}).get("bundle")
    ready = appliance.bundle_of_server()
    record.check(f"exactly one bundle in service, {when}", serving == [named] == [ready], f"{serving}, {ready}")


def _golden_aucs(site: Site, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return AUC and 95 % interval on the golden set: baseline, each round's bundle, and the raw-pixel floor."""
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
    rows = appliance.ask("images", "ls", *ALL)
    missing = acknowledged - {row["sop_uid"] for row in rows}
    record.check("at the end nothing acknowledged is missing", not missing, f"{len(missing)} missing")
    originals = sum(1 for path in (appliance.root / "store" / "originals").rglob("*.dcm"))
    record.check("an original on disk for every image", originals == status["ingest"]["stored"], originals)
    trail = appliance.ask("audit", "verify", allow=(0, 1))
    record.check("audit verify", trail.get("ok", False), f"{trail.get('entries')} entries")
    record.check("the node answers C-ECHO", appliance.echo())
    record.result |= {"audit": trail, "status": status, "models": appliance.ask("models", "ls")}
