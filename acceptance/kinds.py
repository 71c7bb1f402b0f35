"""Part 2 of the acceptance run: a folder of real, odd and hostile files, over the network and through `import`.

The folder's manifest states the expected outcome of each file; this part compares.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

from pydicom import dcmread

from acceptance.driver import Appliance
from acceptance.images import under_new_uid
from acceptance.record import Record
from dicom.dataset.part10 import content_sha256

ADMITTED = ("stored", "predicted", "returned", "labelled")
ALL = ("--limit", "1000000")
BY_SENDER, AT_NEGOTIATION = "rejected by the sender", "rejected at negotiation"


def run(data: Path, root: Path, record: Record) -> None:
    """Send the files with new UIDs, again, and unchanged; then import them on another site."""
    source = data / "dicom"
    with (source / "manifest.csv").open(newline="") as file:
        manifest = list(csv.DictReader(file))
    renamed = root / "renamed"
    table: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(manifest):
        uid = under_new_uid(source / row["file"], renamed / row["file"], number)
        table[row["file"]] = {"file": row["file"], "expect": row["expect"], "why": row["reason"], "uid": uid}
    record.event(
        "files copied with new UIDs", files=len(table), unchanged=[f for f, r in table.items() if not r["uid"]]
    )
    node = Appliance.make(root / "node", "cpu", {"window": '""'})
    record.event("serve, another site", ready_after_s=round(node.start(), 1))
    try:
        _network(node, record, table, renamed)
        _again(node, record, table, source, renamed)
        record.check("the node still answers C-ECHO", node.echo())
    finally:
        node.stop()
    _import(root, record, table, source, renamed)
    _agree(record, table)
    record.result["files"] = list(table.values())


def _send(node: Appliance, files: list[Path], *options: str) -> dict[str, str]:
    """Send the files; return the outcome of each by dcmsend: a status, BY_SENDER or AT_NEGOTIATION."""
    sender = node.dcmsend(files, *options)
    sender.wait()
    node.drained()
    report = node.report()
    outcomes = {}
    for path in files:
        status, _ = report.get(str(path), ("", ""))
        if not status or status == "<not sent>":
            outcomes[path.as_posix()] = BY_SENDER
        elif status.startswith("<no acceptable"):
            outcomes[path.as_posix()] = AT_NEGOTIATION
        else:
            outcomes[path.as_posix()] = status
    return outcomes


def _network(node: Appliance, record: Record, table: dict[str, dict[str, Any]], renamed: Path) -> None:
    """Send each file in its own transfer syntax (-dn); find its row by its new UID or its content."""
    outcomes = _send(node, [renamed / name for name in table], "-dn")
    rows = {row["sop_uid"]: row for row in node.ask("images", "ls", *ALL) if row["sop_uid"]}
    for name, line in table.items():
        line["network"] = outcomes[(renamed / name).as_posix()]
        row = rows.get(line["uid"])
        if row:
            line["state"], line["reason"] = row["state"], row["reason"]
        else:
            digest = content_sha256(renamed / name)
            line["state"] = node.value("SELECT state FROM image WHERE sha256 = ?", digest) or ""
            line["reason"] = node.value("SELECT reason FROM image WHERE sha256 = ?", digest)
    sent = [line for line in table.values() if line["network"].startswith("0x0000")]
    lost = [line["file"] for line in sent if not line["state"]]
    record.event("dcmsend -nh -dn", **Counter(line["network"] for line in table.values()))
    record.check("every file with Success has a row", not lost, lost or f"{len(sent)} files")


def _again(node: Appliance, record: Record, table: dict[str, dict[str, Any]], source: Path, renamed: Path) -> None:
    """Send the same files again, and the originals unchanged, twice: a known image adds nothing."""
    stored = node.status()["ingest"]["stored"]
    counts = []
    for what, folder, options in (
        ("the same again (-dn)", renamed, ("-dn",)),
        ("the same again, dcmsend free to transcode", renamed, ()),
        ("unchanged", source, ()),
        ("unchanged, again", source, ()),
    ):
        outcomes = _send(node, [folder / name for name in table], *options)
        for name, line in table.items():
            # with -dn, dcmsend reports a file that was not accepted as "not sent"
            if line["network"] == BY_SENDER and outcomes[(folder / name).as_posix()] == AT_NEGOTIATION:
                line["network"] = AT_NEGOTIATION
        success = sum(outcome.startswith("0x0000") for outcome in outcomes.values())
        images = node.status()["ingest"]
        counts.append(
            {"sending": what, "success": success, **{k: images[k] for k in ("stored", "rejected", "quarantined")}}
        )
        record.event(f"dcmsend: {what}", **counts[-1])
    record.result["sent_again"] = counts
    record.check(
        "an image sent again is no new image", counts[1]["stored"] == stored, f"{stored} before, {counts[1]} after"
    )
    record.check("unchanged, again: nothing new", counts[3] | {"sending": ""} == counts[2] | {"sending": ""}, counts[3])
    allowed = _admissible(table, source)
    admitted = {row["sop_uid"] for row in node.ask("images", "ls", *ALL) if row["state"] in ADMITTED}
    unexpected = {uid for uid in admitted if uid not in allowed and not uid.startswith("2.25.9")}
    record.check(
        "unchanged: only UIDs of admissible files are admitted", not unexpected, f"{len(unexpected)} unexpected"
    )


def _admissible(table: dict[str, dict[str, Any]], source: Path) -> set[str]:
    """Return the UIDs of the original files that may be admitted."""
    names = [name for name, line in table.items() if line["expect"] != "not admitted"]
    return {str(dcmread(source / name, stop_before_pixels=True).SOPInstanceUID) for name in names}


def _import(root: Path, record: Record, table: dict[str, dict[str, Any]], source: Path, renamed: Path) -> None:
    """Import the same files on a new site that does not serve; find their rows by file name."""
    site = Appliance.make(root / "import", "cpu", {"window": '""'})
    counts = site.ask("import", str(renamed))
    rows = {row["file"]: row for row in site.ask("images", "ls", *ALL) if row["file"]}
    for name, line in table.items():
        row = rows.get(name)
        line["import"], line["import_reason"] = (row["state"], row["reason"]) if row else ("duplicate", None)
    record.event("import, files with new UIDs", **counts)
    record.check("import saw every file", counts["seen"] == len(table), counts)
    again = site.ask("import", str(renamed))
    record.check("imported again: all duplicates", again["duplicate"] == again["seen"], again)
    plain = site.ask("import", str(source))
    record.event("import, files unchanged", **plain)
    record.result["import"] = {"renamed": counts, "again": again, "unchanged": plain}


def _agree(record: Record, table: dict[str, dict[str, Any]]) -> None:
    for line in table.values():
        over_network = line["network"].startswith("0x0000") and line["state"] in ADMITTED
        imported = line["import"] in ADMITTED
        line["agrees"] = line["expect"] == "either" or {over_network, imported} == {line["expect"] == "admitted"}
    wrong = [line["file"] for line in table.values() if not line["agrees"]]
    record.check("every file ends as the manifest expects", not wrong, wrong or f"{len(table)} files")
