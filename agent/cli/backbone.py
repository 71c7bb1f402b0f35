"""Commands about backbones, the pretrained weights that a first round starts from: check, fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agent import console
from agent.cli.options import Json
from agent.errors import Problem

backbone_app = typer.Typer(no_args_is_help=True, help="Backbones: pretrained weights that a first round starts from.")
Arch = Annotated[str, typer.Option(help="timm name of a convolutional network whose file does not state it")]


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    app.add_typer(backbone_app, name="backbone")


@backbone_app.command("check")
def backbone_check(
    name: Annotated[str, typer.Argument(metavar="FILE_OR_NAME", help="a file of weights, or a name on the hub")],
    arch: Arch = "",
    json_out: Json = False,
) -> None:
    """Show what a backbone is. Exit 1 when tensors are unused or missing, and name them."""
    from agent.rounds import backbones

    with console.errors():
        _show(name, backbones.check(name, arch), json_out)


@backbone_app.command("fetch")
def backbone_fetch(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="a timm name, OWNER/REPOSITORY or OWNER/REPOSITORY/FILE on the hub, or a local file"
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="the new .safetensors file, for learn.backbone")],
    arch: Arch = "",
    json_out: Json = False,
) -> None:
    """Download a backbone, or convert a local file; write it with its licence, mean, std and image size."""
    from agent.rounds import backbones

    with console.errors(), console.logs.status(f"reading {name}"):
        _show(str(out), backbones.fetch(name, out, arch), json_out)


def _show(name: str, report: dict[str, Any], json_out: bool) -> None:
    from agent.rounds import backbones

    if json_out:
        console.as_json(report)
    else:
        counts = ", ".join(f"{len(report[key])} {key.replace('_', ' ')}" for key in ("matched", "unused", "missing"))
        scale = [", ".join(f"{value:.6g}" for value in report[key] or []) or "not stated" for key in ("mean", "std")]
        console.pairs(
            [
                ("family", report["family"] or "unknown"),
                ("network", report["arch"] or "unknown"),
                ("tensors", counts),
                ("set aside", ", ".join(report["set_aside"]) or "none"),
                ("image size", f"{report['image_size']} px" if report["image_size"] else "not stated"),
                ("mean", scale[0]),
                ("std", scale[1]),
                ("licence", report["licence"] or "not stated; ask its publisher"),
                ("source", report["source"] or "not stated"),
                ("sha256", report["sha256"]),
            ]
        )
    if faults := backbones.faults(report):
        raise Problem(f"backbone {name} can't be used: {'; '.join(faults)}")
