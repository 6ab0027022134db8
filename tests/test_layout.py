"""The house: sizes, floors of the top-level modules, and its language. lint-imports checks the packages."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT

PACKAGES = {"attacks", "defenses", "models", "utils"}
MODULES = {"config", "data_loader", "main", "train_badnet"}
# top-level module -> what it may import of this repository; import-linter takes packages only
FLOORS = {
    "config": {"utils"},
    "data_loader": {"attacks", "utils"},
    "main": PACKAGES | {"config", "data_loader"},
    "train_badnet": {"attacks", "models", "utils", "config", "data_loader"},
}
# fmt: off
OLD_NAMES = {
    "ANSWERED", "ANY", "APPLIES", "AT_ONCE", "Case", "FEW", "Found", "HOLDERS", "MOVES", "PLACES", "Pictures",
    "Purified", "RATES", "REACH", "Refused", "SETTLED", "SPENT", "STATED", "_follow", "_own", "_shrink", "_tell",
    "accuracy_figures", "asked", "away", "compares", "counted", "decoy", "descend", "disguise", "draw_head",
    "few", "first_goes_ahead", "its_name", "loss_from", "made_from", "moved_patterns", "of_all", "one_run",
    "scale_back", "shown", "spread", "still_statistics", "takers", "told", "turned", "watched", "watcher", "whose",
}
# fmt: on


def sources():
    """The Python files of the repository, tracked or new."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in names if (ROOT / name).exists()]


def test_no_file_is_longer_than_300_lines():
    assert {path.name: n for path in sources() if (n := len(path.read_text().splitlines())) > 300} == {}


@pytest.mark.parametrize("script", ["main.py", "train_badnet.py"])
def test_each_script_tells_its_story_in_50_lines(script):
    functions = [node for node in ast.parse((ROOT / script).read_text()).body if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: lengths[name] for name in lengths if name in ("main", "run") and lengths[name] > 50} == {}
    assert "main" in lengths


@pytest.mark.parametrize("module", sorted(FLOORS))
def test_a_top_level_module_imports_lower_floors_only(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    imported = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    assert imported & (PACKAGES | MODULES) <= FLOORS[module]


def test_no_module_imports_everything_of_another():
    assert [
        path.name for path in sources() if re.search(r"^\s*from \S+ import \*", path.read_text(), re.MULTILINE)
    ] == []


def test_no_name_of_the_old_language_is_left():
    found = {}
    for path in sources():
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        if left := names.intersection(OLD_NAMES):
            found[path.name] = sorted(left)
    assert found == {}
