"""What people see in a terminal of 80 columns: no line is longer, and no word or number is broken."""

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from agent import console

SITES = Path(__file__).resolve().parents[2] / "sites"
STYLE = re.compile(r"\x1b\[[0-9;]*m")
COLUMNS = 80


@pytest.fixture(scope="module")
def old_site(tmp_path_factory) -> Path:
    """A copy of the site that version 0.1.0 left."""
    folder = tmp_path_factory.mktemp("old") / "site"
    shutil.copytree(SITES / "0.1.0", folder)
    return folder


def in_terminal(*words: str, columns: int = COLUMNS) -> list[str]:
    """The lines that a command writes to a terminal, without styles."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "agent.cli.main", *words]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm"}
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # Linux: the other side is closed
        pass
    process.wait(60)
    os.close(ours)
    return STYLE.sub("", written.decode()).replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize(
    "words",
    [
        ("status",), ("images", "ls"), ("round", "ls"), ("models", "ls"), ("verdict", "r0002"), ("golden", "show"),
        ("audit", "tail"), ("status", "--help"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_80_columns_hold_every_line_and_break_no_word(old_site, words):
    config = () if "--help" in words else ("--config", str(old_site))
    narrow = in_terminal(*words, *config)
    wide = in_terminal(*words, *config, columns=1000)
    assert narrow
    assert [line for line in narrow if len(line) > COLUMNS and " " in line.strip()] == []
    assert {word for line in narrow for word in line.split()} >= {word for line in wide for word in line.split()}


def test_a_table_that_fits_keeps_its_columns(old_site):
    lines = in_terminal("models", "ls", "--config", str(old_site))
    head = next(line for line in lines if line.startswith("bundle"))
    assert head.split() == ["bundle", "state", "is_baseline", "round", "created_at", "approved_by"]
    assert sum(re.match(r"[0-9a-f]{12} ", line) is not None for line in lines) == 3


def test_a_pipe_gets_no_styles_and_no_broken_lines(old_site):
    command = [sys.executable, "-m", "agent.cli.main", "status", "--config", str(old_site)]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "\x1b" not in done.stdout
    assert "2 rejected, 1 quarantined, p50" in done.stdout


def test_words_stay_whole_and_a_long_one_keeps_its_line():
    digest = "f" * 64
    assert console.wrapped(f"the head {digest} is signed", 20) == ["the head", digest, "is signed"]
    assert console.wrapped("between [-0.012, +0.034] and", 18) == ["between", "[-0.012, +0.034]", "and"]
    assert console.wrapped("two\nlines", 80) == ["two", "lines"]


def test_wide_characters_count_twice():
    assert console.cells("胸部") == 4
    assert console.wrapped("胸部 胸部 胸部", 9) == ["胸部 胸部", "胸部"]


def test_control_characters_do_not_reach_the_terminal(capsys):
    console.table(("reason",), [("\x1b[2Jgone\x07",)])
    console.people.print("\x9b31mred")
    written = capsys.readouterr().out
    assert "\x1b" not in written
    assert "\x07" not in written
    assert "\x9b" not in written
    assert "gone" in written


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120, 300])
def test_a_table_is_complete_at_any_width(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [[f"r{n:04d}", "inconclusive", "a reason of several words " * 3, 0.123456 * n] for n in range(3)]
    console.table(("round", "state", "reason", "value"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    words = {word for line in lines for word in line.split()}
    assert words >= {"round", "state", "reason", "value", "inconclusive", "several", "r0002", "0.123456", "0.246912"}
