"""Shell completion: the script works in a real bash, and offers commands, options and values."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from agent.cli import completion
from agent.cli.main import app
from agent.images import listing
from agent.results import explain

SITES = Path(__file__).resolve().parents[2] / "sites"
ASK = """
source /dev/stdin <<< "$(cxrloop completion bash)"
COMP_WORDS=("$@")
COMP_CWORD=$(( $# - 1 ))
$(complete -p cxrloop | sed 's/.*-F \\([^ ]*\\).*/\\1/') cxrloop
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> dict[str, str]:
    """An environment in which `cxrloop` is a program, as after an installation."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "cxrloop"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m agent.cli.main "$@"\n')
    program.chmod(0o755)
    without = {name: value for name, value in os.environ.items() if name != "CXRLOOP_CONFIG"}
    return {**without, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def old_site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "site"
    shutil.copytree(SITES / "0.1.0", folder)
    return folder


def offered(command: dict[str, str], *words: str, **environment: str) -> list[str]:
    """What bash offers after these words; the last one is what was typed so far."""
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", "cxrloop", *words],
        capture_output=True, text=True, env={**command, **environment}, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_and_options(command):
    assert {"status", "images", "round", "completion"} <= set(offered(command, ""))
    assert "studies" not in offered(command, "")  # the old name is hidden
    assert offered(command, "stat") == ["status"]
    assert offered(command, "images", "e") == ["export"]
    assert {"--state", "--limit", "--json", "--config"} <= set(offered(command, "images", "ls", "--"))


def test_bash_completes_states_methods_and_shells(command):
    assert offered(command, "images", "ls", "--state", "re") == ["received", "returned", "rejected"]
    assert offered(command, "images", "rerun", "--state", "p") == ["predicted"]
    assert offered(command, "explain", "1", "--method", "smooth") == ["smoothgrad", "smoothgrad-ig"]
    assert offered(command, "completion", "") == ["bash", "zsh", "fish"]


def test_bash_completes_rounds_and_bundles_of_the_site(command, old_site):
    before = (old_site / "ledger.db").read_bytes()
    assert offered(command, "round", "show", "r", CXRLOOP_CONFIG=str(old_site)) == ["r0003", "r0002", "r0001"]
    assert offered(command, "approve", "14", CXRLOOP_CONFIG=str(old_site)) == ["14be6da4baed"]
    settings = str(old_site / "appliance.toml")
    assert offered(command, "models", "show", "--config", settings, "b2") == ["b28de33b801b"]
    assert (old_site / "ledger.db").read_bytes() == before


def test_without_a_site_no_round_is_offered_and_nothing_is_said(command, tmp_path):
    assert offered(command, "round", "show", "") == []
    assert offered(command, "round", "show", "r", CXRLOOP_CONFIG=str(tmp_path / "none")) == []
    (tmp_path / "ledger.db").write_bytes(b"no database" * 100)
    assert offered(command, "round", "show", "r", CXRLOOP_CONFIG=str(tmp_path)) == []


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_of_a_shell_calls_the_program_and_is_read_by_that_shell(command, shell):
    done = subprocess.run(["cxrloop", "completion", shell], capture_output=True, text=True, env=command, check=True)
    assert f"{completion.VARIABLE}=complete_{shell}" in done.stdout
    reader = shutil.which(shell) or shutil.which("bash")
    if shutil.which(shell):  # its own parser reads it without running it
        subprocess.run([str(reader), "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize("words", ["images ls --", "pull --", "round show ", ""])
@pytest.mark.parametrize(
    ("shell", "more"), [("zsh", {}), ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"})], ids=("zsh", "fish")
)
def test_the_other_shells_get_an_answer_with_descriptions(command, words, shell, more):
    asked = {"_CXRLOOP_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": f"cxrloop {words}", **more}
    done = subprocess.run(["cxrloop"], capture_output=True, text=True, env={**command, **asked}, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    if "--" in words:
        assert "one JSON document on stdout" in done.stdout


def test_no_help_holds_what_zsh_and_fish_would_get_as_a_style():
    def texts(command):
        yield command.help or ""
        yield from (getattr(parameter, "help", "") or "" for parameter in command.params)
        for child in getattr(command, "commands", {}).values():
            yield from texts(child)

    assert [text for text in texts(typer.main.get_command(app)) if re.search(r"\[[a-z/#@]", text)] == []


def test_an_unknown_shell_is_an_error(command):
    done = subprocess.run(["cxrloop", "completion", "tcsh"], capture_output=True, text=True, env=command)
    assert done.returncode == 1
    assert "one of bash, zsh, fish" in done.stderr


def test_the_values_offered_are_those_of_the_program():
    assert listing.STATES == completion.STATES
    assert listing.SCORABLE == completion.RERUN_STATES
    assert explain.METHODS == completion.METHODS
