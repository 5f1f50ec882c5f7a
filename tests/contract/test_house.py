"""The house rules: budgets of size, imports in one direction, no path of one machine, docstrings."""

import ast
import re
import sys
from fnmatch import fnmatch

import pytest

from tests.conftest import ROOT

BUDGETS = {"train/tune.py": 100, "train/loop.py": 150, "README.md": 200}
IGNORED = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split())]
OURS = {"data", "train", "scripts", "tests"}
RECIPE = {"hydra", "omegaconf", "deepspeed", "wandb"}
# Put together, or this file would break its own rule.
HOSTS = ["pypi" + ".org", "files.python" + "hosted.org"]
MACHINE = re.compile(rb"(?<![\w.])/(?:work\b|tmp/)")


def walk(folder):
    """All files that are not ignored by git."""
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in IGNORED):
            continue
        if path.is_dir():
            yield from walk(path)
        else:
            yield path


FILES = list(walk(ROOT))
PYTHON = [path for path in FILES if path.suffix == ".py"]
SOURCES = [path for path in PYTHON if ROOT / "tests" not in path.parents]


def name(path):
    return path.relative_to(ROOT).as_posix()


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield node.module


def roots(path):
    return {module.split(".")[0] for module in imported(path)}


def below(folder):
    found = [path for path in SOURCES if name(path).startswith(f"{folder}/")]
    assert found, folder
    return found


def test_the_rules_see_the_project():
    assert {name(path).split("/")[0] for path in SOURCES} >= {"data", "scripts", "train", "vzip"}
    assert not any("__pycache__" in path.parts or ".git" in path.parts for path in FILES)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_fits_its_budget(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= BUDGETS.get(name(path), 300)


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_a_function_has_at_most_60_lines(path):
    functions = [
        node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in functions
        if node.end_lineno - node.lineno >= 60
    }
    assert long == {}


def test_the_readme_fits_its_budget():
    path = ROOT / "README.md"
    if not path.is_file():
        pytest.skip("there is no README.md yet")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= BUDGETS["README.md"]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("vzip", OURS | RECIPE),
        ("data", {"train", "scripts", "tests"} | RECIPE),
        ("train", {"scripts", "tests"}),
        ("scripts", {"tests"}),
    ],
)
def test_imports_go_one_way(folder, forbidden):
    broken = {name(path): roots(path) & forbidden for path in below(folder) if roots(path) & forbidden}
    assert broken == {}


def test_reducers_need_torch_alone():
    allowed = ("torch", "vzip.reducers", "vzip.errors", *sys.stdlib_module_names)
    for path in below("vzip/reducers"):
        others = [
            module
            for module in imported(path)
            if not any(f"{module}.".startswith(f"{root}.") for root in allowed)
        ]
        assert others == [], name(path)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_names_no_machine(path):
    content = path.read_bytes()
    assert MACHINE.search(content) is None
    if path.name != "LICENSE":
        assert not any(host.encode() in content for host in HOSTS)


@pytest.mark.parametrize("path", [path for path in SOURCES if name(path).startswith("vzip/")], ids=name)
def test_what_is_public_in_the_library_has_a_docstring(path):
    module = tree(path)
    public = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]
    assert ast.get_docstring(module)
    assert [node.name for node in public if not ast.get_docstring(node)] == []
