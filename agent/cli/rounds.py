"""Commands about rounds of learning: run, resume, list, show, follow, cancel."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent import console
from agent.cli import completion
from agent.cli.options import By, Config, Json, open_site
from agent.errors import Problem

if TYPE_CHECKING:
    from agent.ledger.database import Ledger, Row
    from agent.site.site import Site

round_app = typer.Typer(no_args_is_help=True, help="Rounds of learning.")


def register(app: typer.Typer) -> None:
    """Hang these commands on the root."""
    app.add_typer(round_app, name="round")


@round_app.command("run")
def round_run(
    now: Annotated[bool, typer.Option("--now", help="start at once, whatever the window")] = False,
    with_look: Annotated[
        bool, typer.Option("--look", help="spend a look on the result, also when none is due")
    ] = False,
    recipe: Annotated[str | None, typer.Option(help="a recipe, or a TOML file in the site folder")] = None,
    until: Annotated[str | None, typer.Option(help="pause at HH:MM, site time")] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Run a round; an unfinished one goes on, and one that runs elsewhere is waited for."""
    with console.errors(), open_site(settings) as (site, ledger):
        if not now:
            raise Problem("round run: say --now; at night rounds start by themselves in learn.window")
        end = _clock(site, until) if until else None
        _finish(site, ledger, json_out, lambda: _next_round(site, ledger, recipe, with_look), end, with_look)


@round_app.command("resume")
def round_resume(
    until: Annotated[str | None, typer.Option(help="pause at HH:MM, site time")] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Go on with the unfinished round."""
    from agent.rounds import records

    with console.errors(), open_site(settings) as (site, ledger):
        row = records.open_round(ledger)
        if not row:
            raise Problem("round resume: no round is unfinished")
        _finish(site, ledger, json_out, lambda: row, _clock(site, until) if until else None)


def _next_round(site: Site, ledger: Ledger, recipe: str | None, with_look: bool) -> Row:
    from agent.rounds import records

    now = datetime.now(UTC)
    row = records.open_round(ledger)
    if not row:
        row = records.plan(site, ledger, "now", now, recipe, with_look or records.look_due(site, ledger, now))
        if not row["parent"] and records.parent_of_next(ledger):
            console.logs.print(f"{row['name']} begins anew: its backbone or findings are others than its parent's")
        return row
    if with_look:
        records.want_look(ledger, row["name"])
    console.logs.print(f"{row['name']} is unfinished ({row['state']}); going on with it")
    return records.get(ledger, row["name"])


def _finish(
    site: Site,
    ledger: Ledger,
    json_out: bool,
    start: Callable[[], Row],
    until: datetime | None,
    with_look: bool = False,
) -> None:
    """Run a round to its next resting place and print it; Ctrl-C pauses it in good order."""
    from agent.rounds import records, training
    from agent.site import locks

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with locks.hold(site, "round"), console.logs.status("round") as line:
            row = training.carry_on(site, ledger, start(), until, lambda p: line.update(_progress(p)))
    except locks.Busy:
        row = training.wait_for_other(site, ledger, with_look)
    said = records.summary(ledger, row)
    if json_out:
        console.as_json(said)
    else:
        _print_round(said)
    if row["state"] in ("stopped", "gave_up"):
        raise Problem(f"{row['name']} {row['state']}: {row['reason']}; see {site.rounds / row['name'] / 'learner.log'}")


def _progress(p: dict[str, Any]) -> str:
    if p.get("steps") == 1:  # an export
        return str(p.get("phase"))
    left = f", {p['eta_s']:.0f} s left" if p.get("eta_s") is not None else ""
    loss = f", loss {p['loss']:.4f}" if p.get("loss") is not None else ""
    return f"{p.get('phase')}: step {p.get('step')} of {p.get('steps')}{loss}{left}"


def _clock(site: Site, text: str) -> datetime:
    """The next HH:MM of the site's clock."""
    from agent.site.config import zone
    from agent.site.window import next_window

    try:
        datetime.strptime(text, "%H:%M")
    except ValueError:
        raise Problem(f"--until {text}: not a time; use HH:MM") from None
    minute = (datetime.strptime(text, "%H:%M") + timedelta(minutes=1)).strftime("%H:%M")
    found = next_window(datetime.now(UTC), f"{text}-{minute}", zone(site.config))
    assert found
    return found


def _print_round(said: dict[str, Any], more: Sequence[tuple[str, str]] = ()) -> None:
    line = said["verdict"]["line"] if said["verdict"] else said["reason"]
    console.pairs(
        [
            ("round", f"{said['round']} {said['state']}" + (f": {line}" if line else "")),
            ("bundle", said["bundle"]),
            ("learnt from", f"{said['unlabelled']} images, {said['labelled']} of them labelled"),
            ("seconds", said["seconds"]),
            *more,
        ]
    )


@round_app.command("ls")
def round_ls(settings: Config = None, json_out: Json = False) -> None:
    """All rounds, newest first."""
    from agent.rounds import records

    with console.errors(), open_site(settings) as (_, ledger):
        said = [records.summary(ledger, row) for row in ledger.rows("SELECT * FROM round ORDER BY id DESC")]
        if json_out:
            return console.as_json(said)
        columns = ("round", "state", "bundle", "recipe", "unlabelled", "labelled", "seconds", "reason")
        console.table(columns, [[r[c] for c in columns] for r in said])


@round_app.command("show")
def round_show(
    name: Annotated[
        str,
        typer.Argument(metavar="ROUND", autocompletion=completion.rounds, help="a round, such as r0007, or its bundle"),
    ],
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """One round: its state and verdict, phases and steps, newest losses and collapse monitors, its picture."""
    from agent.rounds import inspection, records

    with console.errors(), open_site(settings) as (site, ledger):
        row = records.get(ledger, name)
        said = records.summary(ledger, row) | inspection.learning(site.rounds / row["name"])
        said["progress"] = records.progress(site, row["name"])
        if json_out:
            return console.as_json(said)
        _print_round(said, _learning(said))


def _learning(said: dict[str, Any]) -> list[tuple[str, str]]:
    """What the learner measured, as far as it has."""
    monitors = (
        f"{name} {_number(m['value'])}" + ("" if m["within"] else " (beyond its limit)")
        for name, m in said["monitors"].items()
    )
    rows = [
        ("phases", ", ".join(f"{p['phase']} {p['step']}/{p['steps']}" for p in said["phases"])),
        ("losses", ", ".join(f"{name} {_number(value)}" for name, value in said["losses"].items())),
        ("monitors", ", ".join(monitors)),
        ("candidate", said["candidate"]),
        ("notes", "; ".join(said["notes"])),
        ("figure", said["figure"]),
    ]
    return [row for row in rows if row[1]]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


@round_app.command("logs")
def round_logs(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="ROUND",
            autocompletion=completion.rounds,
            help="a round, or its bundle; else the one under way or the newest",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="go on until the round rests; Ctrl-C leaves")] = False,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """What the learner wrote in a round."""
    from agent.rounds import inspection, records

    with console.errors(), open_site(settings) as (site, ledger):
        row = records.get(ledger, name) if name else inspection.newest(ledger)
        if not row:
            raise Problem("round logs: no round yet; `cxrloop round run --now` starts one")
        if follow:
            try:
                row = _follow(site, ledger, row["name"], quiet=json_out)
            except KeyboardInterrupt:
                return
        text = inspection.log(site.rounds / row["name"]).decode(errors="replace")
        if json_out:
            console.as_json(
                {"round": row["name"], "state": row["state"], "reason": row["reason"], "log": text.splitlines()}
            )
        elif not follow:
            sys.stdout.write(text)
        else:
            console.logs.print(f"{row['name']} {row['state']}" + (f": {row['reason']}" if row["reason"] else ""))


def _follow(site: Site, ledger: Ledger, name: str, quiet: bool) -> Row:
    """The log on stdout as it grows; at a terminal the progress in a line under it."""
    from agent.rounds import inspection

    def write(new: bytes) -> None:
        if new and not quiet:
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()

    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return inspection.follow(site, ledger, name, write, lambda progress: None)
    with console.logs.status(name) as line:  # it moves what goes to stdout above itself
        return inspection.follow(site, ledger, name, write, lambda progress: line.update(_progress(progress)))


@round_app.command("cancel")
def round_cancel(
    name: Annotated[
        str | None,
        typer.Argument(metavar="ROUND", autocompletion=completion.rounds, help="a round, such as r0007, or its bundle"),
    ] = None,
    by: By = "round cancel",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Stop a round for good (the unfinished one by default)."""
    from agent.rounds import records

    with console.errors(), open_site(settings) as (site, ledger):
        row = records.get(ledger, name) if name else records.open_round(ledger)
        if not row:
            raise Problem("round cancel: no round is unfinished")
        said = records.summary(ledger, records.cancel(site, ledger, row["name"], by))
        console.as_json(said) if json_out else _print_round(said)
