"""The table of bench/node/ingest.py: medians over rounds, ratios of pairs within a round, and the project's bars."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

FIGURES = ("mb_s", "objects_s", "p50_ms", "p99_ms", "cpu_ms_mb", "peak_mb", "associate_ms")
HEAD = "MB/s  obj/s  p50 ms  p99 ms  CPU ms/MB  peak MB  assoc ms  ours is"


def _shown(value: float | None, width: int, digits: int = 0) -> str:
    return f"{value:{width}.{digits}f}" if value is not None else " " * (width - 1) + "-"


def table(cells: list[dict], durable: dict[str, bool]) -> tuple[str, list[dict]]:
    """Return (text, summary rows). "ours is": this node's MB/s over the row's, median [least - most] of the same rounds."""
    groups: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        groups[cell["set"], cell["sender"], cell["associations"]][cell["receiver"]].append(cell)
    lines, summary = [], []
    for (label, sender, associations), receivers in groups.items():
        lines += [f"{label}, {sender}, {associations} at once", " " * 26 + HEAD]
        ours = {cell["round"]: cell["mb_s"] for cell in receivers["ours"]}
        for name, own in sorted(receivers.items(), key=lambda item: -median(cell["mb_s"] for cell in item[1])):
            row = {
                figure: median(values) if (values := [c[figure] for c in own if c.get(figure) is not None]) else None
                for figure in FIGURES
            }
            ratios = sorted(ours[cell["round"]] / cell["mb_s"] for cell in own)
            row |= {"ratio": median(ratios), "ratio_least": ratios[0], "ratio_most": ratios[-1]}
            row |= {"bad": sum(cell["bad"] for cell in own), "durable": durable[name]}
            where = {"set": label, "sender": sender, "associations": associations, "receiver": name}
            summary.append(where | row)
            mark = name if durable[name] else f"{name} *"
            lines.append(
                f"{mark:25}{_shown(row['mb_s'], 5)}  {_shown(row['objects_s'], 5)}  {_shown(row['p50_ms'], 6)}"
                f"  {_shown(row['p99_ms'], 6)}  {_shown(row['cpu_ms_mb'], 9, 1)}  {_shown(row['peak_mb'], 7)}"
                f"  {_shown(row['associate_ms'], 8, 1)}"
                f"  {row['ratio']:.2f} [{ratios[0]:.2f} - {ratios[-1]:.2f}]"
            )
        lines.append("")
    lines += ["* not durable: no fsync before Success", *_bars(summary)]
    return "\n".join(lines), summary


def _bars(summary: list[dict]) -> list[str]:
    """Return one line for each bar of the project: the measured value, met or missed."""
    raw = [row for row in summary if row["sender"] == "raw"]
    lines = []
    for name, wanted in (("Orthanc default", 3.0), ("Orthanc tuned", 2.0)):
        worst = min((row["ratio"] for row in raw if row["receiver"] == name and row["associations"] <= 4), default=0.0)
        lines.append(
            f"bar: >= {wanted} x {name} at 1 and 4: worst {worst:.2f}: {'met' if worst >= wanted else 'MISSED'}"
        )
    for label in dict.fromkeys(row["set"] for row in raw):
        at_4 = {row["receiver"]: row for row in raw if row["associations"] == 4 and row["set"] == label}
        if {"ours", "disk"} <= at_4.keys():
            ratio, peak = at_4["ours"]["p99_ms"] / at_4["disk"]["p99_ms"], at_4["ours"]["peak_mb"]
            lines.append(f"bar: p99 <= 2 x the disk's at 4, {label}: {ratio:.2f}: {'met' if ratio <= 2 else 'MISSED'}")
            lines.append(f"bar: < 100 MB at 4, {label}: {peak:.0f} MB: {'met' if peak < 100 else 'MISSED'}")
    return lines
