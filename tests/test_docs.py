"""The documents agree with the program: generated pages are current, shown commands exist, links lead somewhere."""

import ast
import re
import runpy
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
from agent.site.site import FOLDERS

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = runpy.run_path(str(ROOT / "tools/generate_docs.py"))
HOUSE = runpy.run_path(str(ROOT / "tools/house.py"))
COMMANDS = dict(GENERATOR["leaves"](typer.main.get_command(app)))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
WITH_COMMANDS = [page for page in PAGES if re.search(r"^(sudo .*)?cxrloop ", page.read_text("utf-8"), re.M)]
README_WORDS = 750  # a visitor reads it in four minutes


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def shown(page: Path) -> list[list[str]]:
    """Return the words of every `cxrloop ...` line in the shell blocks of a page, without `cxrloop` itself."""
    lines = []
    for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M):
        for line in block.splitlines():
            for part in line.split(" && "):
                words = shlex.split(re.sub(r"^sudo -u cxrloop ", "", part.strip()), comments=True)
                if words and Path(words[0]).name == "cxrloop":
                    lines.append([word for word in words[1:] if word != "&"])
    return lines


@pytest.mark.parametrize("page", GENERATOR["pages"](), ids=name)
def test_a_generated_page_is_that_of_this_program(page):
    assert page.read_text("utf-8") == GENERATOR["pages"]()[page], "run python tools/generate_docs.py"


def test_the_example_settings_load():
    text = (ROOT / "deploy/appliance.example.toml").read_text("utf-8")
    assert config.checked(tomllib.loads(text)) == config.Config()


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_every_command_that_a_page_shows_exists_with_its_options(page):
    for words in shown(page):
        path = next((tuple(words[:n]) for n in (2, 1) if tuple(words[:n]) in COMMANDS), None)
        assert path or words[0].startswith("--"), words
        if path is None:
            continue
        flags = {flag for parameter in COMMANDS[path].params for flag in parameter.opts}
        used = {word.split("=")[0] for word in words if word.startswith("-") and len(word) > 1}
        assert used <= flags | {"--help"}, (words, used - flags)


def test_readme_and_rounds_show_commands():
    assert len(shown(ROOT / "README.md")) >= 15  # the tour and a new site
    assert len(shown(ROOT / "docs/rounds.md")) >= 10


def test_every_command_and_every_setting_is_documented():
    text = (ROOT / "docs/commands.md").read_text("utf-8")
    assert [" ".join(path) for path in COMMANDS if f"## `cxrloop {' '.join(path)}" not in text] == []
    example = (ROOT / "deploy/appliance.example.toml").read_text("utf-8")
    settings = (ROOT / "docs/settings.md").read_text("utf-8")
    for section, field in config.Config.model_fields.items():
        for key, spec in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert spec.deprecated or (f"\n{key} = " in example and f"| `{key}` |" in settings), (section, key)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_has_all_that_its_page_has(path):
    done = CliRunner().invoke(app, [*path, "--help"])
    assert done.exit_code == 0, done.exception
    output = re.sub(r"\s+", "", done.output)  # lines are broken anywhere
    options = [p for p in COMMANDS[path].params if not getattr(p, "hidden", False)]
    assert [p.name for p in options if re.sub(r"\s+", "", getattr(p, "help", None) or "") not in output] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [t for t in targets if not t.startswith(("http:", "https:")) and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_commands_on_a_page_name_files_that_exist(page):
    scripts = re.findall(r"`python ((?:bench|acceptance|tools)/[\w/]+\.py)", page.read_text("utf-8"))
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def definitions(path: Path) -> set[str]:
    """Return the functions and classes of a Python file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def folder_exists(folder: str, package: str) -> bool:
    """Return True for a folder of the repository, a room of `package`, or a folder of a site."""
    is_room = bool(package) and (ROOT / package / folder).is_dir()
    return (ROOT / folder).is_dir() or is_room or folder.split("/")[0] in FOLDERS


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_folders_and_names_of_code_on_a_page_exist(page):
    wrong, package, places = [], "", 0
    for line in (ROOT / page).read_text("utf-8").splitlines():
        if line.startswith("#"):
            heading = re.fullmatch(r"### `(\w+)/`.*", line)
            package = heading[1] if heading else ""
        wrong += [folder for folder in re.findall(r"`([\w./]+/)`", line) if not folder_exists(folder, package)]
        for file, name in re.findall(r"`((?:\w+/)+\w+\.(?:py|md|toml))(?::([\w.]+))?`", line):
            paths = sorted(ROOT.glob(file.replace("NAME", "[!_]*")))  # NAME stands for every file there
            has_name = not name or all(name in definitions(path) for path in paths)
            wrong += [] if paths and has_name else [f"{file}:{name}"]
            places += bool(name)
    assert wrong == []
    assert places > 5, "this test finds no names on the page: has their form changed?"


def test_readme_quotes_the_committed_output_of_the_demo():
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", readme, re.S | re.M)
    quote = next(block for block in blocks if "== summary" in block)
    printed = (ROOT / "docs/demo.txt").read_text("utf-8").splitlines()
    assert [line for line in quote.splitlines() if line != "..." and line not in printed] == []


def test_readme_is_short():
    assert HOUSE["readme_words"]((ROOT / "README.md").read_text("utf-8")) <= README_WORDS


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", tmp_path / "doctrees", ".", site],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    index = (site / "searchindex.js").read_text("utf-8")
    assert (site / "index.html").is_file() and "docs/glossary" in index
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = page.read_text("utf-8")
        loaded = re.findall(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//[^"']*""", text)
        loaded += re.findall(r"""<link\b[^>]*\bhref=["'](?:https?:)?//[^"']*""", text)
        loaded += re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^)"']*""", text)
        assert loaded == [], page


def repository(tmp_path: Path, layers: str, **files: str) -> Path:
    """Return a folder with a pyproject.toml and Python files; `agent__a` names agent/a.py."""
    for stem, text in files.items():
        path = tmp_path / (stem.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    contract = f'[[tool.importlinter.contracts]]\nname = "rooms"\ntype = "layers"\n{layers}\n'
    (tmp_path / "pyproject.toml").write_text(contract)
    return tmp_path


def test_house_counts_imports_that_run_up_and_circles(tmp_path):
    root = repository(
        tmp_path,
        'layers = ["rounds", "site"]\ncontainers = ["agent"]',
        agent__rounds__a="from agent.site import b\nfrom dicom import c\n",
        agent__site__b="def late():\n    from ..rounds import a\n",
        dicom__c="import learner.d\n",
        learner__d="import json\n",
        cxrloop__e="from agent.site.b import late\n",
    )
    rows, up, circles = HOUSE["table"](root)
    assert up == {
        ("agent.site.b", "agent.rounds.a"),  # a room below
        ("dicom.c", "learner.d"),  # two rooms of one layer
        ("cxrloop.e", "agent.site.b"),  # the ground floor
    }
    assert circles == [["agent.rounds.a", "agent.site.b"]]
    assert [(row.folder, row.files, row.up, row.circles) for row in rows] == [
        ("agent", 2, 1, 1), ("dicom", 1, 1, 0), ("learner", 1, 0, 0), ("cxrloop", 1, 1, 0),
    ]  # fmt: skip


def test_house_follows_a_script_that_imports_its_neighbour(tmp_path):
    root = repository(
        tmp_path, "layers = []", bench__node__kill="import load\n", bench__node__load="import kill\nimport os\n"
    )
    _, up, circles = HOUSE["table"](root)
    assert (up, circles) == (set(), [["bench.node.kill", "bench.node.load"]])


def test_words_of_code_and_tables_are_not_counted():
    assert HOUSE["readme_words"]("# One two\n\n```sh\na b c\n```\n\n| d | e |\n|---|---|\n\nthree four\n") == 5
