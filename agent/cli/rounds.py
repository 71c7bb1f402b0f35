"""Commands about rounds of learning: run, resume, list, show, follow, cancel."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent import console
from agent.cli import completion
from agent.cli.options import By, Config, Json, open_site
from agent.errors import Problem

if TYPE_CHECKING:  # a command loads what it needs when it runs
    from collections.abc import Callable, Sequence

    from agent.ledger.database import Ledger
    from agent.rounds.records import Round
    from agent.site.site import Site

round_app = typer.Typer(no_args_is_help=True, help="Rounds of learning.")
RoundName = typer.Argument(
    metavar="ROUND", autocompletion=completion.rounds, help="a round, such as r0007, or its bundle"
)
Until = Annotated[str | None, typer.Option(help="pause at HH:MM, in the site's time zone")]
Look = Annotated[bool, typer.Option("--look", hidden=True, help="the name of --evaluate in version 0.1")]


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    app.add_typer(round_app, name="round")


@round_app.command("run")
def round_run(
    now: Annotated[bool, typer.Option("--now", help="start at once, whatever the window")] = False,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="spend an evaluation on the result, even when none is due")
    ] = False,
    look: Look = False,
    recipe: Annotated[str | None, typer.Option(help="a recipe, or a TOML file in the site folder")] = None,
    until: Until = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Run a round now. If a round is unfinished, resume it; if one is running, wait."""
    with console.errors(), open_site(settings) as (site, ledger):
        evaluate = evaluate_or_look(evaluate, look)
        if not now:
            raise Problem("round run: add --now; at night rounds start by themselves in learn.window")
        end = _next_time(site, until) if until else None
        _run(site, ledger, json_out, lambda: _open_or_planned(site, ledger, recipe, evaluate), end, evaluate)


@round_app.command("resume")
def round_resume(until: Until = None, settings: Config = None, json_out: Json = False) -> None:
    """Resume the unfinished round."""
    from agent.rounds import records

    with console.errors(), open_site(settings) as (site, ledger):
        unfinished = records.open_round(ledger)
        if not unfinished:
            raise Problem("round resume: no round is unfinished; `cxrloop round run --now` starts one")
        _run(site, ledger, json_out, lambda: unfinished, _next_time(site, until) if until else None, evaluate=False)


def evaluate_or_look(evaluate: bool, look: bool) -> bool:
    """Return whether to evaluate; `--look`, the option's name in version 0.1, warns."""
    if look:
        console.logs.print("`--look` is now `--evaluate`; the old name goes away in the next version")
    return evaluate or look


def _open_or_planned(site: Site, ledger: Ledger, recipe: str | None, evaluate: bool) -> Round:
    """Return the unfinished round, else plan a new one."""
    from datetime import UTC

    from agent.rounds import planning, records
    from agent.rounds.evaluation_budget import evaluation_due

    now = datetime.now(UTC)
    unfinished = records.open_round(ledger)
    if unfinished:
        console.logs.print(f"{unfinished.name} is unfinished ({unfinished.state}); resuming it")
        return records.request_evaluation(ledger, unfinished) if evaluate else unfinished
    planned = planning.plan(site, ledger, "now", now, recipe, evaluate or evaluation_due(site, ledger, now))
    if not planned.parent and planning.parent_of_next(ledger):
        console.logs.print(f"{planned.name} starts fresh: its backbone or findings differ from those of its parent")
    return planned


def _run(
    site: Site,
    ledger: Ledger,
    json_out: bool,
    start: Callable[[], Round],
    until: datetime | None,
    evaluate: bool,
) -> None:
    """Run a round until it rests and print it; Ctrl-C pauses it, and `round resume` continues from there."""
    import signal

    from agent.rounds import inspection, training
    from agent.site import locks

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with locks.hold(site, "round"), console.logs.status("round") as line:
            rested = training.carry_on(site, ledger, start(), until, lambda p: line.update(_progress(p)))
    except locks.Busy:
        rested = training.wait_for_running(site, ledger, evaluate)
    summary = inspection.summary(ledger, rested)
    if json_out:
        console.as_json(summary)
    else:
        _print_round(summary)
    if rested.state in ("stopped", "gave_up"):
        log = site.rounds / rested.name / "learner.log"
        raise Problem(f"{rested.name} {rested.state}: {rested.reason}; see {log}")


def _progress(p: dict[str, Any]) -> str:
    if p.get("steps") == 1:  # an export
        return str(p.get("phase"))
    left = f", {p['eta_s']:.0f} s left" if p.get("eta_s") is not None else ""
    loss = f", loss {p['loss']:.4f}" if p.get("loss") is not None else ""
    return f"{p.get('phase')}: step {p.get('step')} of {p.get('steps')}{loss}{left}"


def _next_time(site: Site, text: str) -> datetime:
    """Return the next time at which the site's clock shows HH:MM; raises Problem."""
    from datetime import UTC, timedelta

    from agent.site.config import zone
    from agent.site.window import next_window

    try:
        clock = datetime.strptime(text, "%H:%M")
    except ValueError:
        raise Problem(f"--until {text}: not a time; use HH:MM") from None
    window = f"{clock:%H:%M}-{clock + timedelta(minutes=1):%H:%M}"
    start = next_window(datetime.now(UTC), window, zone(site.config))
    assert start
    return start


def _print_round(summary: dict[str, Any], more: Sequence[tuple[str, str]] = ()) -> None:

    line = summary["verdict"]["line"] if summary["verdict"] else summary["reason"]
    console.pairs(
        [
            ("round", f"{summary['round']} {summary['state']}" + (f": {line}" if line else "")),
            ("bundle", summary["bundle"]),
            ("learnt from", f"{summary['unlabelled']} images, {summary['labelled']} of them labelled"),
            ("seconds", summary["seconds"]),
            *more,
        ]
    )


@round_app.command("ls")
def round_ls(settings: Config = None, json_out: Json = False) -> None:
    """List all rounds, newest first."""
    from agent.rounds import inspection, records

    with console.errors(), open_site(settings) as (_, ledger):
        summaries = [inspection.summary(ledger, each) for each in records.newest_first(ledger)]
        if json_out:
            return console.as_json(summaries)
        columns = ("round", "state", "bundle", "recipe", "unlabelled", "labelled", "seconds", "reason")
        console.table(columns, [[summary[column] for column in columns] for summary in summaries])


@round_app.command("show")
def round_show(name: Annotated[str, RoundName], settings: Config = None, json_out: Json = False) -> None:
    """Show a round: state and verdict, phases and steps, newest losses and collapse monitors, its picture."""
    from agent.rounds import inspection, records

    with console.errors(), open_site(settings) as (site, ledger):
        shown = records.get(ledger, name)
        folder = site.rounds / shown.name
        summary = inspection.summary(ledger, shown) | inspection.learning(folder)
        summary["progress"] = inspection.progress(folder) or None
        if json_out:
            return console.as_json(summary)
        _print_round(summary, learnt(summary))


def learnt(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of `round show` about what the learner measured, without empty ones."""
    monitors = (
        f"{name} {_number(m['value'])}" + ("" if m["within"] else " (beyond its limit)")
        for name, m in summary["monitors"].items()
    )
    rows = [
        ("phases", ", ".join(f"{p['phase']} {p['step']}/{p['steps']}" for p in summary["phases"])),
        ("losses", ", ".join(f"{name} {_number(value)}" for name, value in summary["losses"].items())),
        ("monitors", ", ".join(monitors)),
        ("candidate", summary["candidate"]),
        ("validation", summary["floor"] and summary["floor"]["line"]),
        ("since the parent", summary["forgetting"] and summary["forgetting"]["line"]),
        ("notes", "; ".join(summary["notes"])),
        ("figure", summary["figure"]),
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
            help="a round, or its bundle; else the unfinished or newest round",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="print new lines until it pauses or ends; Ctrl-C stops only the display")
    ] = False,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Print the learner's log of a round."""
    import sys

    from agent.rounds import inspection, records

    with console.errors(), open_site(settings) as (site, ledger):
        shown = records.get(ledger, name) if name else records.open_round(ledger) or records.newest(ledger)
        if not shown:
            raise Problem("round logs: no round yet; `cxrloop round run --now` starts one")
        if follow:
            try:
                shown = _follow(site, ledger, shown.name, quiet=json_out)
            except KeyboardInterrupt:
                return
        text = inspection.log(site.rounds / shown.name).decode(errors="replace")
        if json_out:
            console.as_json(
                {"round": shown.name, "state": shown.state, "reason": shown.reason, "log": text.splitlines()}
            )
        elif not follow:
            sys.stdout.write(text)
        else:
            console.logs.print(f"{shown.name} {shown.state}" + (f": {shown.reason}" if shown.reason else ""))


def _follow(site: Site, ledger: Ledger, name: str, quiet: bool) -> Round:
    """Print the log to stdout as it grows; at a terminal, show the progress in a line under it."""
    import sys

    from agent.rounds import inspection

    def write(new: bytes) -> None:
        if new and not quiet:
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()

    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return inspection.follow(site, ledger, name, write, lambda progress: None)
    with console.logs.status(name) as line:  # rich moves what goes to stdout above this line
        return inspection.follow(site, ledger, name, write, lambda progress: line.update(_progress(progress)))


@round_app.command("cancel")
def round_cancel(
    name: Annotated[str | None, RoundName] = None,
    by: By = "round cancel",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Stop a round for good (the unfinished one by default)."""
    from agent.rounds import inspection, records

    with console.errors(), open_site(settings) as (_, ledger):
        unfinished = records.get(ledger, name) if name else records.open_round(ledger)
        if not unfinished:
            raise Problem("round cancel: no round is unfinished")
        summary = inspection.summary(ledger, records.cancel(ledger, unfinished, by))
        console.as_json(summary) if json_out else _print_round(summary)
