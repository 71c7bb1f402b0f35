"""The rules of the house that no linter knows; the import contracts are checked by `make check`."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("agent", "dicom", "learner", "deploy", "cxrloop")
CODE = (*PACKAGES, "acceptance", "tools", "bench", "tests")
LONGEST_FILE = 300  # lines; a longer file does two things
LONGEST_FUNCTION = 80  # lines
FULLEST_FOLDER = 15  # files; more, and a newcomer does not see the rooms
BROAD_EXCEPTS = 8  # in all packages together: one in each long-running loop
FROZEN = ROOT / "tests" / "sites"  # what older versions made


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return [path for path in found if FROZEN not in path.parents]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def test_the_base_packages_never_load_torch_timm_or_onnxruntime():
    code = (
        "import agent.cli.main, dicom.node.listener, deploy.server.server, learner.evaluation.gate, learner.round.recipe,"
        "learner.round.manifest, sys;"
        "bad = {'torch', 'timm', 'onnxruntime', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_is_longer_than_300_lines():
    lines = {name(path): len(path.read_text("utf-8").splitlines()) for path in files(*CODE)}
    assert {path: n for path, n in lines.items() if n > LONGEST_FILE} == {}


def test_no_function_is_longer_than_80_lines():
    lengths = {
        f"{name(path)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in files(*CODE)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {function: n for function, n in lengths.items() if n > LONGEST_FUNCTION} == {}


def test_no_folder_of_code_holds_more_than_15_files():
    folders = Counter(name(path.parent) for path in files(*CODE))
    assert {folder: n for folder, n in folders.items() if n > FULLEST_FOLDER} == {}


def test_every_file_of_the_packages_says_what_it_holds():
    assert [name(path) for path in files(*PACKAGES) if not ast.get_docstring(tree(path))] == []


def test_table_definitions_live_in_the_schema_alone():
    where = [
        name(path)
        for path in files("agent")
        if any(word in path.read_text("utf-8") for word in ("CREATE TABLE", "CREATE TRIGGER"))
    ]
    assert {str(Path(path).parent) for path in where} == {"agent/ledger"}, where


def test_at_most_8_broad_excepts_stand_in_the_packages():
    def is_broad(handler: ast.ExceptHandler) -> bool:
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)

    broad = [
        f"{name(path)}:{node.lineno}"
        for path in files(*PACKAGES)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler) and is_broad(node)
    ]
    assert len(broad) <= BROAD_EXCEPTS, broad


def exception_classes(package: str) -> dict[str, str]:
    """Exception classes of a package by name, with the names of their bases."""
    classes = {
        node.name: [ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases]
        for path in files(package)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    }
    roots = {"Exception", "ValueError", "RuntimeError", "OSError", "OutOfMemoryError"}
    known: dict[str, str] = {}
    while True:
        more = {
            name_: ", ".join(bases)
            for name_, bases in classes.items()
            if name_ not in known and any(base in roots or base in known for base in bases)
        }
        if not more:
            return known
        known |= more


def caught_names() -> set[str]:
    """Every name in an `except` clause, a tuple of exceptions or a handler table of the code and its tests."""
    caught: set[str] = set()
    for path in files(*CODE):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and node.type is not None:
                caught |= {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)}
                caught |= {part.attr for part in ast.walk(node.type) if isinstance(part, ast.Attribute)}
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):  # REFUSALS = (A, B)
                caught |= {part.id for part in node.value.elts if isinstance(part, ast.Name)}
                caught |= {part.attr for part in node.value.elts if isinstance(part, ast.Attribute)}
    return caught


@pytest.mark.parametrize("package", ["agent", "dicom", "learner", "deploy"])
def test_every_exception_class_is_caught_somewhere(package):
    bases = {"AgentError", "DicomError", "LearnerError", "DeployError"}
    assert sorted(set(exception_classes(package)) - caught_names() - bases) == []
