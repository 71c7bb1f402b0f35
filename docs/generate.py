"""Writes the pages that must not be typed: docs/commands.md and deploy/appliance.example.toml.

Run `python docs/generate.py` after a change of commands or settings; a test compares the files with the code.
"""

import sys
from pathlib import Path

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agent.cli.main import app  # noqa: E402
from agent.site import config  # noqa: E402

HEAD = """# Commands

Made by `python docs/generate.py` from the program itself.

Every command takes `--config FILE`, else `$CXRLOOP_CONFIG`, else `./appliance.toml`. With `--json` it writes exactly one JSON
document to stdout; logs and errors go to stderr. Exit codes: 0 ok, 1 error, 2 refused by policy, 3 degraded.
"""
COMMON = {"settings", "json_out", "help"}


def commands() -> str:
    """The page of all commands, their arguments and options."""
    lines = [HEAD]
    for name, command in _leaves(typer.main.get_command(app), ()):
        words = [f"cxrloop {' '.join(name)}"]
        words += [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
        lines += [f"## `{' '.join(words)}`", "", (command.help or "").strip(), ""]
        options = [p for p in command.params if p.name not in COMMON and not getattr(p, "hidden", False)]
        for p in options:
            what = getattr(p, "help", None) or ""
            need = " (needed)" if p.required else ""
            default = f" Default: {p.default}." if p.default not in (None, False, "", ()) and not p.required else ""
            called = (
                ", ".join(f"`{flag}`" for flag in p.opts)
                if p.param_type_name == "option"
                else f"`{p.metavar or p.name}`"
            )
            lines.append(f"- {called}{need}: {what}.{default}")
        lines += [""] if options else []
    return "\n".join(lines).rstrip() + "\n"


def _leaves(command, path: tuple[str, ...]):
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from _leaves(child, (*path, name))
    else:
        yield path, command


def pages() -> dict[Path, str]:
    """Every generated file and what it must hold."""
    return {
        ROOT / "docs" / "commands.md": commands(),
        ROOT / "deploy" / "appliance.example.toml": config.template(config.Config()),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, "utf-8")
        print(path.relative_to(ROOT))
