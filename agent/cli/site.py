"""Commands about the site as a whole: init, status, config show, audit verify, audit tail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from agent import console
from agent.cli.options import MOST, Config, Json, open_site
from agent.errors import Problem

config_app = typer.Typer(no_args_is_help=True, help="The settings.")
audit_app = typer.Typer(no_args_is_help=True, help="The audit log.")


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    app.command("init")(init_command)
    app.command("status")(status_command)
    app.add_typer(config_app, name="config")
    app.add_typer(audit_app, name="audit")


def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder of the new site")],
    aet: Annotated[str, typer.Option(help="AE title of the DICOM node")] = "CXRLOOP",
    port: Annotated[int, typer.Option(help="port of the DICOM node; the model server takes the next one")] = 11112,
    finding: Annotated[
        list[str] | None, typer.Option(help="a finding that the model predicts; may be given several times")
    ] = None,
    backbone: Annotated[
        str, typer.Option(help='starting weights: "random", a name on the hub, or a .safetensors file')
    ] = "random",
    profile: Annotated[str, typer.Option(help="sizes of the recipe: gpu, cpu or demo")] = "cpu",
    json_out: Json = False,
) -> None:
    """Create a site folder: settings with every key commented, keys, ledger."""
    from agent.site import config
    from agent.site.expectation import expectation
    from agent.site.site import init

    with console.errors():
        values: dict[str, dict[str, Any]] = {
            "site": {"findings": finding or ["abnormal"], "name": folder.resolve().name},
            "node": {"aet": aet, "port": port},
            "infer": {"port": port + 1 if port < 65535 else port - 1},
            "learn": {"profile": profile, "backbone": _absolute(backbone)},
        }
        if profile == "demo":  # few images: a larger share is golden, so that the gate can decide
            values["patients"] = {"golden": 0.45, "golden_next": 0.0, "calibration": 0.1, "validation": 0.1}
            values["learn"] |= {"min_new": 20}
        site = init(folder, config.checked(values))
        settings, expect = site.root / "appliance.toml", expectation(values["learn"]["backbone"])
        if json_out:
            answer = {"site": str(site.root), "config": str(settings), "findings": list(site.findings)}
            return console.as_json(answer | {"expect": expect})
        console.people.print(f"site created in {site.root}\n{expect}\nnext: cxrloop serve --config {settings}")


def _absolute(backbone: str) -> str:
    from learner.round.backbone_file import is_file_name

    path = Path(backbone)
    if not is_file_name(backbone):
        if path.is_file():
            raise Problem(f"--backbone {backbone}: not a .safetensors file; convert it with `cxrloop backbone fetch`")
        return backbone
    if not path.is_file():
        raise Problem(f"--backbone {backbone}: no such file")
    return str(path.resolve())


def status_command(settings: Config = None, json_out: Json = False) -> None:
    """Show images, the model in service, rounds, evaluations left, disk and alerts. Exit 3 when degraded."""
    from agent.service.status import status

    with console.errors(), open_site(settings) as (site, ledger):
        state = status(site, ledger)
        if json_out:
            console.as_json(state)
        else:
            _print_status(state)
    if state["degraded"]:
        raise typer.Exit(3)


def _print_status(state: dict[str, Any]) -> None:
    counts, serving, last = state["ingest"], state["serving"], state["rounds"]["last"]
    stages = ("inbox", "stored", "predicted", "returned", "labelled", "rejected", "quarantined")
    latency = f", p50 {counts['p50_s']} s, p95 {counts['p95_s']} s to a score" if counts["p50_s"] is not None else ""
    model = "none"
    if serving:
        kind = "baseline, " if serving["is_baseline"] else ""
        provider = serving["provider"] or "not answering"
        model = f"{serving['bundle']} ({kind}{serving['state']} since {console.shown(serving['since'])}, {provider})"
    round_line = "none yet"
    if last:
        round_line = f"{last['round']} {last['state']}" + (f": {last['reason']}" if last["reason"] else "")
    gate = state["gate"]
    console.pairs(
        [
            ("site", state["site"]),
            ("in service", model),
            ("images", ", ".join(f"{counts[stage]} {stage}" for stage in stages) + latency),
            ("last round", round_line),
            ("next round", console.shown(state["rounds"]["next"]) or "no window set"),
            ("evaluations left", f"{gate['evaluations_left']} (alpha left {gate['alpha_left']:.4f})"),
            ("disk", f"{state['disk']['free_bytes'] / 1e9:.1f} GB free"),
            *((f"! {alert['kind']}", alert["detail"]) for alert in state["alerts"]),
        ]
    )


@config_app.command("show")
def config_show(settings: Config = None, json_out: Json = False) -> None:
    """Show all settings as this version reads them."""
    from agent.site import config

    with console.errors():
        values = config.load(config.config_path(settings))
        if json_out:
            return console.as_json(values.model_dump(mode="json"))
        sys.stdout.write(config.template(values))


@audit_app.command("verify")
def audit_verify(
    head: Annotated[str | None, typer.Option(help="a hash noted earlier, which the chain must contain")] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Check the whole chain and its signed heads. Exit 1 at the first broken link, and name it."""
    from agent.ledger import audit

    with console.errors(), open_site(settings) as (site, ledger):
        result = audit.verify(ledger, site.root / "audit.heads", site.key("signing.pub"), head)
        if json_out:
            console.as_json(result)
        elif result["ok"]:
            console.people.print(f"{result['entries']} entries, unbroken; head {result['head']}")
        if not result["ok"]:
            raise Problem(f"audit: {result['broken']}")


@audit_app.command("tail")
def audit_tail(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=MOST, help="at most this many")] = 20,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Show the newest entries."""
    from agent.ledger import audit

    with console.errors(), open_site(settings) as (_, ledger):
        entries = audit.tail(ledger, limit)
        if json_out:
            return console.as_json(entries)
        columns = ("seq", "at", "who", "what", "why", "after")
        console.table(columns, [[entry[column] for column in columns] for entry in entries])
