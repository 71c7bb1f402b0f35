"""The command line: thin; each command opens the site, calls one function and prints what it says."""

import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from agent import console
from agent.cli import erasure, images, models, pull, rounds
from agent.cli.options import MOST, Config, Json, opened
from agent.errors import Problem
from agent.ledger import audit
from agent.service.status import status
from agent.site import config
from agent.site.site import Site, init
from cxrloop import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is plain text: "[/tls]" and "[results]" in it are words, not styles
    help="The closed loop for a hospital's chest X-ray model. Research software, not a medical device.",
)
show = typer.Typer(no_args_is_help=True, help="The settings.")
trail = typer.Typer(no_args_is_help=True, help="The audit.")


@app.command("init")
def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder of the new site")],
    aet: Annotated[str, typer.Option(help="our AE title")] = "CXRLOOP",
    port: Annotated[int, typer.Option(help="port of the DICOM node; the model server takes the next one")] = 11112,
    finding: Annotated[list[str] | None, typer.Option(help="a finding of the vocabulary; repeat it")] = None,
    backbone: Annotated[str, typer.Option(help='"random", a timm name, or a .safetensors file')] = "random",
    profile: Annotated[str, typer.Option(help="sizes: gpu, cpu or demo")] = "cpu",
    json_out: Json = False,
) -> None:
    """Make a site folder: settings with every key commented, keys, ledger."""
    with console.errors():
        values = {
            "site": {"findings": finding or ["abnormal"], "name": folder.resolve().name},
            "node": {"aet": aet, "port": port},
            "infer": {"port": port + 1 if port < 65535 else port - 1},
            "learn": {"profile": profile, "backbone": _absolute(backbone)},
        }
        if profile == "demo":  # a small stream: more of it is judged on, so that the gate can decide
            values["patients"] = {"golden": 0.45, "golden_next": 0.0, "calibration": 0.1, "validation": 0.1}
            values["learn"] |= {"min_new": 20}
        site = init(folder, config.checked(values))
        result = {"site": str(site.root), "config": str(site.root / "appliance.toml"), "findings": list(site.findings)}
        if json_out:
            return console.as_json(result)
        console.people.print(f"site made in {site.root}\nnext: cxrloop serve --config {site.root / 'appliance.toml'}")


def _absolute(backbone: str) -> str:
    path = Path(backbone)
    if not backbone.endswith(".safetensors"):
        return backbone
    if not path.is_file():
        raise Problem(f"--backbone {backbone}: no such file")
    return str(path.resolve())


@app.command()
def serve(
    only: Annotated[str, typer.Option(help="run only these parts, by comma: listen, infer, learn")] = "",
    child: Annotated[int, typer.Option(hidden=True)] = 0,
    settings: Config = None,
) -> None:
    """Run the appliance: the DICOM node, the model server, and the agent."""
    from agent.network import node
    from agent.service import supervisor

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=node.LOG_FORMAT, force=True)
    for chatty in ("apscheduler", "httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with console.errors():
        parts = tuple(name.strip() for name in only.split(",") if name.strip())
        unknown = [name for name in parts if name not in supervisor.PARTS]
        if unknown:
            raise Problem(
                f"--only {unknown[0]}: parts are {', '.join(supervisor.PARTS)} (the web console is not in this version)"
            )
        supervisor.serve(Site.open(settings), settings, parts, child or None)


@app.command()
def demo(
    source: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="your own DICOM, or PNG + labels.csv")
    ] = None,
    folder: Annotated[
        Path, typer.Option("--dir", help="where the demo's site goes; an earlier demo there is replaced")
    ] = Path("demo"),
) -> None:
    """Three nights on this machine in minutes: send, score, learn, judge, approve, roll back. Nothing staged."""
    with console.errors():
        missing = [name for name in ("torch", "matplotlib", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise Problem(
                f"the demo learns, draws and serves; {missing[0]} is missing: pip install 'cxrloop[cpu,train]'"
            )
        from agent.demo.story import tell

        tell(folder, source)


@app.command("status")
def status_command(settings: Config = None, json_out: Json = False) -> None:
    """One screen: images, the model in service, rounds, looks left, disk, alerts. Exit 3 when degraded."""
    with console.errors(), opened(settings) as (site, ledger):
        said = status(site, ledger)
        if json_out:
            console.as_json(said)
        else:
            _print_status(said)
    if said["degraded"]:
        raise typer.Exit(3)


def _print_status(said: dict) -> None:
    counts, serving, last = said["ingest"], said["serving"], said["rounds"]["last"]
    kinds = ("inbox", "stored", "predicted", "returned", "labelled", "rejected", "quarantined")
    wait = f", p50 {counts['p50_s']} s, p95 {counts['p95_s']} s to a score" if counts["p50_s"] is not None else ""
    model = "none"
    if serving:
        kind = "baseline, " if serving["is_baseline"] else ""
        model = f"{serving['bundle']} ({kind}{serving['state']} since {serving['since']}, {serving['provider'] or 'not answering'})"
    console.pairs(
        [
            ("site", said["site"]),
            ("in service", model),
            ("images", ", ".join(f"{counts[kind]} {kind}" for kind in kinds) + wait),
            (
                "last round",
                f"{last['round']} {last['state']}" + (f": {last['reason']}" if last["reason"] else "")
                if last
                else "none yet",
            ),
            ("next round", said["rounds"]["next"] or "no window set"),
            ("looks left", f"{said['gate']['looks_left']} (alpha left {said['gate']['alpha_left']:.4f})"),
            ("disk", f"{said['disk']['free_bytes'] / 1e9:.1f} GB free"),
            *((f"! {alert['kind']}", alert["detail"]) for alert in said["alerts"]),
        ]
    )


@show.command("show")
def config_show(settings: Config = None, json_out: Json = False) -> None:
    """All settings, as understood."""
    with console.errors():
        found = config.load(config.config_path(settings))
        if json_out:
            return console.as_json(found.model_dump(mode="json"))
        sys.stdout.write(config.template(found))


@trail.command("verify")
def audit_verify(
    head: Annotated[str | None, typer.Option(help="a hash noted earlier that the chain must contain")] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Check the whole chain and its signed heads. Exit 1 at the first broken link, named."""
    with console.errors(), opened(settings) as (site, ledger):
        said = audit.verify(ledger, site.root / "audit.heads", site.key("signing.pub"), head)
        if json_out:
            console.as_json(said)
        elif said["ok"]:
            console.people.print(f"{said['entries']} entries, unbroken; head {said['head']}")
        if not said["ok"]:
            raise Problem(f"audit: {said['broken']}")


@trail.command("tail")
def audit_tail(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=MOST)] = 20,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """The newest entries."""
    with console.errors(), opened(settings) as (_, ledger):
        entries = audit.tail(ledger, limit)
        if json_out:
            return console.as_json(entries)
        console.table(
            ("seq", "at", "who", "what", "why", "after"),
            [(e["seq"], e["at"], e["who"], e["what"], e["why"], e["after"]) for e in entries],
        )


def _version(wanted: bool) -> None:
    if wanted:
        console.people.print(f"cxrloop {__version__}")
        raise typer.Exit


@app.callback()
def common(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """The closed loop for a hospital's chest X-ray model. Research software, not a medical device."""


app.add_typer(show, name="config")
images.register(app)
erasure.register(app)
pull.register(app)
rounds.register(app)
models.register(app)
app.add_typer(trail, name="audit")


def main() -> None:
    """Entry point of the `cxrloop` command."""
    usage = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
    usage.exit_code = 1  # a wrong option is an error; 2 is kept for "refused by policy"
    for library in ("pynetdicom", "pydicom", "highdicom"):  # their messages print UIDs and values; ours don't
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=UserWarning, module="pydicom")
    app()


if __name__ == "__main__":
    main()
