"""Print the shape of the code as a Markdown table: files, longest file, imports that run up, circles.

Reads every Python file below the top folders; imports by `ast`, never by running code. A layer is a set of modules
in the `layers` contracts of import-linter in pyproject.toml, and in TOP. `python tools/house.py` prints the table;
`--write` puts it into docs/benchmarks.md. `--rooms` gives each sub-folder its own row; `--json` prints the numbers;
`--names` adds the imports that run up and the modules of each circle.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("agent", "dicom", "learner", "deploy", "cxrloop", "bench", "acceptance", "tools", "tests")
TOP = ("agent", "dicom | learner | deploy", "cxrloop")  # highest first; `|` separates rooms that may not meet
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table of tools/house.py -->\n", "\n<!-- end of the table -->"  # blank lines: a table ends at them
Imports = dict[str, set[str]]  # module -> modules of this repository that it imports


@dataclass(frozen=True)
class Row:
    """One folder with all its sub-folders: counts of files, lines, imports that run up, circles."""

    folder: str
    files: int
    longest: str
    lines: int
    up: int
    circles: int


def modules(root: Path) -> dict[str, Path]:
    """Return the dotted name and path of every Python file below the folders of FOLDERS."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(found: dict[str, Path]) -> Imports:
    """Return what each module imports from this repository, in functions too; `if TYPE_CHECKING` counts as well.

    A script may import its neighbours by their bare name: `bench/node/kill.py` imports `load` as `bench.node.load`.
    """
    edges: Imports = {}
    for name, path in found.items():
        is_package = path.name == "__init__.py"
        wanted = set(_names(ast.parse(path.read_text("utf-8")), name, is_package))
        room = name if is_package else name.rpartition(".")[0]
        edges[name] = {hit for word in wanted if (hit := _module(word, room, found)) and hit != name}
    return edges


def _names(tree: ast.Module, name: str, is_package: bool) -> Iterator[str]:
    """Yield the dotted name of every import; `from a import b` yields `a.b`, `_module` cuts what is no module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _module(word: str, room: str, found: dict[str, Path]) -> str | None:
    """Return the longest module of this repository that `word` names, also beside the importing file; else None."""
    for start in (word, f"{room}.{word}"):
        parts = start.split(".")
        for length in range(len(parts), 0, -1):
            name = ".".join(parts[:length])
            if name in found and (length > 1 or start == word):
                return name if name != room or start == word else None
    return None


def layers(root: Path) -> list[list[list[str]]]:
    """Return every list of layers, highest first; a layer is a list of rooms, a room a module prefix."""
    tables = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    contracts = tables.get("tool", {}).get("importlinter", {}).get("contracts", [])
    lists = [_rooms(TOP, "")]
    for contract in contracts:
        if contract.get("type") == "layers":
            lists += [_rooms(contract["layers"], home) for home in contract.get("containers") or [""]]
    return lists


def _rooms(texts: Iterable[str], home: str) -> list[list[str]]:
    split = [[word.strip().strip("()") for word in re.split(r"[|:]", text)] for text in texts]
    return [[f"{home}.{word}" if home else word for word in layer] for layer in split]


def running_up(edges: Imports, lists: list[list[list[str]]]) -> set[tuple[str, str]]:
    """Return the imports from a lower layer to a higher one, and between two rooms of one layer."""
    bad = set()
    for ranks in lists:
        place = {room: depth for depth, layer in enumerate(ranks) for room in layer}
        for source, targets in edges.items():
            for target in targets:
                low, high = _room(source, place), _room(target, place)
                if low and high and low != high and place[high] <= place[low]:
                    bad.add((source, target))
    return bad


def _room(name: str, place: dict[str, int]) -> str | None:
    return next((room for room in place if name == room or name.startswith(room + ".")), None)


def circles(edges: Imports) -> list[list[str]]:
    """Return the groups of modules that import each other: strongly connected components of two or more (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []
    for start in edges:
        work = [(start, iter(sorted(edges[start])))] if start not in index else []
        if work:
            index[start] = low[start] = len(index)
            stack.append(start)
        while work:
            node, targets = work[-1]
            target = next(targets, None)
            if target is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    group = stack[stack.index(node) :]
                    del stack[stack.index(node) :]
                    groups += [sorted(group)] if len(group) > 1 else []
            elif target not in index:
                index[target] = low[target] = len(index)
                stack.append(target)
                work.append((target, iter(sorted(edges.get(target, ())))))
            elif target in stack:
                low[node] = min(low[node], index[target])
    return groups


def table(root: Path, rooms: bool = False) -> tuple[list[Row], set[tuple[str, str]], list[list[str]]]:
    """Return the rows, the imports that run up and the circles of the repository at `root`.

    A row counts a top folder with its sub-folders; with `rooms` each folder is a row of its own.
    """
    found = modules(root)
    edges = imports(found)
    bad, rings = running_up(edges, layers(root)), circles(edges)
    home = {n: p.relative_to(root).parent.as_posix() if rooms else n.split(".")[0] for n, p in found.items()}
    rows = []
    for folder in sorted(set(home.values()), key=lambda name: (FOLDERS.index(name.split("/")[0]), name)):
        size = {found[name]: len(found[name].read_text("utf-8").splitlines()) for name in found if home[name] == folder}
        longest = max(size, key=lambda path: size[path])
        up = sum(home[source] == folder for source, _ in bad)
        around = sum(any(home[name] == folder for name in ring) for ring in rings)
        rows.append(Row(folder, len(size), longest.relative_to(root).as_posix(), size[longest], up, around))
    return rows, bad, rings


def readme_words(text: str) -> int:
    """Return the number of words of a Markdown text without its code blocks and tables."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return sum(len(line.split()) for line in prose.splitlines() if not line.startswith("|"))


def markdown(rows: list[Row], words: int) -> str:
    """Return the table of the rows, and the sentence on the words of README.md."""
    lines = ["| folder | files | longest file | lines | imports that run up | circles |", "|---|---|---|---|---|---|"]
    lines += [f"| {r.folder} | {r.files} | `{r.longest}` | {r.lines} | {r.up} | {r.circles} |" for r in rows]
    return "\n".join([*lines, "", f"README.md has {words} words, code blocks and tables not counted."])


def main() -> None:
    """Print the table, or its numbers as JSON; write it into docs/benchmarks.md where asked."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", action="store_true", help="one JSON document in place of the table")
    options.add_argument("--names", action="store_true", help="also the imports that run up and the circles, by name")
    options.add_argument("--rooms", action="store_true", help="a row for each folder, without its sub-folders")
    options.add_argument("--write", action="store_true", help="also write the table into docs/benchmarks.md")
    asked = options.parse_args()
    rows, bad, rings = table(ROOT, asked.rooms)
    words = readme_words((ROOT / "README.md").read_text("utf-8"))
    if asked.json:
        print(json.dumps({"folders": [asdict(row) for row in rows], "readme_words": words}, indent=1))
    else:
        print(markdown(rows, words))
    if asked.names:
        print("\n".join([*(f"up: {a} -> {b}" for a, b in sorted(bad)), *("circle: " + ", ".join(r) for r in rings)]))
    if asked.write:
        before, rest = PAGE.read_text("utf-8").split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{markdown(rows, words)}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
