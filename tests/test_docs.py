"""The documents say what the program does: generated pages are current, and every command that is shown exists."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from agent.cli.main import app
from agent.site import config

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/operating.md", "docs/commands.md")


def leaves(command, path=()):
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from leaves(child, (*path, name))
    else:
        yield path, command


COMMANDS = dict(leaves(typer.main.get_command(app)))


def shown(page: str) -> list[list[str]]:
    """Every `cxrloop ...` line of the shell blocks of a page."""
    text = (ROOT / page).read_text("utf-8")
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.splitlines():
            words = shlex.split(line.split(" && ")[0], comments=True)
            if words[:1] == ["cxrloop"]:
                found.append([word for word in words[1:] if word != "&"])
    return found


def test_the_generated_pages_are_those_of_this_program():
    done = subprocess.run(
        [sys.executable, "-c", "import runpy; m = runpy.run_path('docs/generate.py'); bad = [str(p) for p, t in m['pages']().items() if p.read_text() != t]; assert not bad, bad"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + "\nrun python docs/generate.py"


def test_the_example_settings_load():
    text = (ROOT / "deploy/appliance.example.toml").read_text("utf-8")
    assert config.checked(tomllib.loads(text)) == config.Config()


@pytest.mark.parametrize("page", PAGES[:2])
def test_every_command_that_a_page_shows_exists_with_its_options(page):
    lines = shown(page)
    assert lines
    for words in lines:
        path = next((tuple(words[:n]) for n in (2, 1) if tuple(words[:n]) in COMMANDS), None)
        assert path or words[0].startswith("--"), words
        if path is None:
            continue
        flags = {flag for parameter in COMMANDS[path].params for flag in parameter.opts}
        asked = {word.split("=")[0] for word in words if word.startswith("-") and len(word) > 1}
        assert asked <= flags | {"--help"}, (words, asked - flags)


def test_every_command_and_every_setting_is_documented():
    text = "".join((ROOT / page).read_text("utf-8") for page in PAGES)
    assert [" ".join(path) for path in COMMANDS if f"cxrloop {' '.join(path)}" not in text] == []
    example = (ROOT / "deploy/appliance.example.toml").read_text("utf-8")
    for name, field in config.Config.model_fields.items():
        for key in field.annotation.model_fields:  # type: ignore[union-attr]
            assert f"\n{key} = " in example, (name, key)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_says_all_that_its_page_says(path):
    done = CliRunner().invoke(app, [*path, "--help"])
    assert done.exit_code == 0, done.exception
    said = re.sub(r"\s+", "", done.output)  # lines are broken anywhere
    options = [p for p in COMMANDS[path].params if not getattr(p, "hidden", False)]
    assert [p.name for p in options if re.sub(r"\s+", "", getattr(p, "help", None) or "") not in said] == []


def test_links_between_pages_lead_somewhere():
    for page in ("README.md", "docs/operating.md", "docs/conformance.md", "docs/decisions.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text("utf-8")):
            if not target.startswith(("http:", "https:")):
                assert ((ROOT / page).parent / target).exists(), (page, target)
