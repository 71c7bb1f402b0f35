"""The page of an acceptance run, from its JSON; it computes nothing.

python acceptance/table.py bench/results/real_input.json     (writes the .md file beside it)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESTARTED_BY = {
    "whole `serve`": "a person: `cxrloop serve`",
    "`round run`": "a person: the same command (the agent would resume the round as well)",
    "the learner,": "the `round run` command",
    "examining": "the learn agent",
}


def markdown(result: dict[str, Any], events: list[dict[str, Any]], checks: list[dict[str, Any]]) -> str:
    """Return the whole page."""
    setup = result["setup"]
    parts = [
        "# The appliance on real images",
        f"Made by `{setup['command']}` on {setup['cores']} cores ({setup['load']}); {setup['seconds'] / 60:.0f} minutes. "
        f"Profile `{setup['profile']}`, {setup['images']} images. All numbers come from this run.",
        *(_loop(result) if "audit" in result else []),
        *(_kills(events) if "audit" in result else []),
        *(_kinds(result) if "files" in result else []),
        "## Invariants",
        _table(
            ("check", "holds", "found"), [(c["check"], "yes" if c["holds"] else "**NO**", c["found"]) for c in checks]
        ),
        "## Events",
        _table(("second", "event", "facts"), [(e["at_s"], e["what"], _facts(e)) for e in events]),
    ]
    return "\n\n".join(parts) + "\n"


def _loop(result: dict[str, Any]) -> list[str]:
    status, golden, setup = result["status"], result["golden"], result["setup"]
    sizes = result["composition"].items()
    return [
        "## Kermany images, from dcmsend to an approved model",
        "The composition is chosen. With default shares a tenth of a site's patients is golden (profile demo: 45 %). Here "
        f"{golden['images']} of {setup['images']} images come from that range, one of every patient first, so that the gate can "
        "decide. The site's key alone assigns the ranges. Labels: one training image in ten, and all images of the golden, "
        "calibration and validation ranges. "
        f"A round takes at most {setup['cap']} unlabelled training images (`learn.max_unlabelled`) and all labelled ones. "
        "Three evaluations are planned: two rounds and one in reserve; alpha .05 / 3 each, margin .02. "
        "Images of the public test split are used like all others, by their range.",
        _table(
            ("range", "images", "patients", "with pneumonia", "without", "labelled images"),
            [
                (
                    name,
                    s["images"],
                    s["patients"],
                    s["patients_with"],
                    s["patients_without"],
                    result["labelled"].get(name, 0),
                )
                for name, s in sizes
            ],
        ),
        "Sending (`dcmsend -nh`; images that were not acknowledged were sent again):",
        _table(
            ("sending", "images", "seconds", "images a second", "statuses"),
            [
                (
                    n,
                    s["sent"],
                    s["seconds"],
                    f"{s['statuses'].get('0x0000 (Success)', 0) / max(s['seconds'], 0.1):.0f}",
                    ", ".join(f"{word}: {n}" for word, n in s["statuses"].items()),
                )
                for n, s in enumerate(result["sending"], 1)
            ],
        ),
        f"At the end {status['ingest']['stored']} images stored, {status['ingest']['predicted']} scored; "
        f"{result['intake']['stored_before_the_answer_was_lost']} images came twice because their Success was lost; the "
        f"copies were recognised. Audit: {result['audit']['entries']} entries, {'unbroken' if result['audit']['ok'] else 'BROKEN'}.",
        _table(
            ("round", "killed meanwhile", "state", "images (labelled)", "seconds", "verdict or reason"),
            [
                (
                    r["round"],
                    r["killed"],
                    r["state"],
                    f"{r['unlabelled']} ({r['labelled']})",
                    r["seconds"],
                    r["verdict"]["line"] if r["verdict"] else r["reason"],
                )
                for r in result["rounds"]
            ],
        ),
        _table(
            ("command", "answer"),
            [
                *((f"approve {a['asked_for']} ({a['reason']})", _answer(a)) for a in result["approvals"]),
                ("rollback", _answer(result["rollback"])),
            ],
        ),
        f"AUC for pneumonia on the golden set ({golden['images']} images of {golden['patients']} patients), 95 % interval by "
        "patient. Kermany is easy and has shortcuts: read every line against the raw-pixel floor.",
        _table(
            ("model", "bundle", "AUC", "interval"),
            [
                (a["model"], a["bundle"] or "", f"{a['auc']:.3f}", f"{a['low']:.3f} to {a['high']:.3f}")
                for a in result["auc"]
            ],
        ),
    ]


def _kills(events: list[dict[str, Any]]) -> list[str]:
    """Return the table of the kills: the state at each kill, and what restarted the process."""
    rows = []
    for event in events:
        name = event["what"].removeprefix("kill -9: ")
        if name != event["what"]:
            restarted_by = next((starter for word, starter in RESTARTED_BY.items() if word in name), "`serve`")
            rows.append((name, event["at_s"], _facts(event), restarted_by))
    return [
        "## Killed with -9, each process once",
        "After each kill: no acknowledged image is missing, the round ends, one bundle is in service (see Invariants).",
        _table(("process", "at second", "state", "restarted by"), rows),
    ]


def _answer(answer: dict[str, Any]) -> str:
    if "swap_seconds" not in answer:
        return f"exit {answer['exit']}: {answer.get('message') or answer['said']}"  # "said": results of version 0.1
    return f"{answer['bundle']} {answer['state']}, swapped in {answer['swap_seconds']} s"


def _kinds(result: dict[str, Any]) -> list[str]:
    lines = result["files"]
    agreed = sum(line["agrees"] for line in lines)
    return [
        "## Real, odd and hostile files",
        f"{len(lines)} files, {agreed} as the manifest expects. Each was sent with `dcmsend -nh -dn` in its own transfer "
        "syntax, with a new UID of the same length and no other change (unreadable files unchanged), then imported on a new site.",
        _table(
            ("file", "expected", "over the network", "final state and reason", "through `import`", "agrees"),
            [
                (
                    line["file"],
                    line["expect"],
                    line["network"],
                    _state(line["state"], line["reason"]),
                    _state(line["import"], line["import_reason"]),
                    "yes" if line["agrees"] else "**NO**",
                )
                for line in lines
            ],
        ),
        "The same files sent again, and unchanged (several share a UID); counts are those of the site, cumulative:",
        _table(
            ("sending", "Success", "stored", "rejected", "quarantined"),
            [(s["sending"], s["success"], s["stored"], s["rejected"], s["quarantined"]) for s in result["sent_again"]],
        ),
    ]


def _state(state: str, reason: str | None) -> str:
    return (f"{state}: {reason}" if reason else state) or "(no row)"


def _facts(event: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value}" for key, value in event.items() if key not in ("at_s", "what") and value is not None
    )


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(columns)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the page of a result file beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    source = parser.parse_args().result
    document = json.loads(source.read_text("utf-8"))
    source.with_suffix(".md").write_text(markdown(document, document["events"], document["checks"]), "utf-8")


if __name__ == "__main__":
    main()
