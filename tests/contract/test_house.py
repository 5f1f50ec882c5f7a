"""The rules of the house: sizes, imports in one direction, one thought a line, no path of one machine,
docstrings.
"""

import ast
import re
import sys
from fnmatch import fnmatch

import pytest

from tests.conftest import ROOT

MAX_LINES = 400
MAX_LINES_OF = {"train/tune.py": 120, "train/loop.py": 150}
MAX_FUNCTION_LINES = 60
MAX_FILES_IN_A_FOLDER = 21

GIT_IGNORED = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split())]
OURS = {"data", "train", "scripts", "tests"}
RECIPE = {"hydra", "omegaconf", "deepspeed", "wandb"}

# Put together here, or this file would break its own rule.
HOSTS = ["pypi" + ".org", "files.python" + "hosted.org"]
MACHINE = re.compile(rb"(?<![\w.])/(?:work\b|tmp/)")

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def walk(folder):
    """All files that git does not ignore."""
    for path in sorted(folder.iterdir()):
        # A pattern with a leading slash is anchored at the root.
        names = (path.name, f"/{path.relative_to(ROOT).as_posix()}")
        if any(fnmatch(name, pattern) for name in names for pattern in GIT_IGNORED):
            continue

        if path.is_dir():
            yield from walk(path)
        else:
            yield path


def name(path):
    return path.relative_to(ROOT).as_posix()


FILES = list(walk(ROOT))
SOURCES = {
    name(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in FILES
    if path.suffix == ".py" and ROOT / "tests" not in path.parents
}


def imported(tree):
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(folder):
    return {path: tree for path, tree in SOURCES.items() if path.startswith(f"{folder}/")}


def is_conditional_in_another(node):
    """Whether a conditional expression holds another one, or a walrus around one."""
    if isinstance(node, ast.NamedExpr):
        return isinstance(node.value, ast.IfExp)

    inside = [child for part in (node.test, node.body, node.orelse) for child in ast.walk(part)]
    return any(isinstance(child, ast.IfExp) for child in inside)


def is_tuple_of_unrelated_values(node):
    """Whether one line assigns several values that were not made together: `a, b = f(x), g(y)`."""
    if not isinstance(node.targets[0], ast.Tuple) or not isinstance(node.value, ast.Tuple):
        return False

    # `a, b = b, a` and `low, high = 0, 10` are plain; two calls are two thoughts.
    return sum(isinstance(value, ast.Call) for value in node.value.elts) > 1


def test_the_rules_see_the_project():
    assert {path.split("/")[0] for path in SOURCES} >= {"data", "scripts", "train", "vzip"}
    assert not any("__pycache__" in path.parts or ".git" in path.parts for path in FILES)


def test_files_and_folders_are_small():
    num_lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: n for path, n in num_lines.items() if n > MAX_LINES_OF.get(path, MAX_LINES)} == {}

    folders = [path.rpartition("/")[0] for path in SOURCES]
    assert {folder for folder in folders if folders.count(folder) > MAX_FILES_IN_A_FOLDER} == set()


def test_functions_are_short():
    long = [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_a_line_holds_one_thought():
    broken = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, COMPREHENSIONS):
                inside = [child for child in ast.walk(node) if child is not node]
                if any(isinstance(child, COMPREHENSIONS) for child in inside):
                    broken.append(f"{path}:{node.lineno} a comprehension inside a comprehension")

            if isinstance(node, ast.IfExp | ast.NamedExpr) and is_conditional_in_another(node):
                broken.append(f"{path}:{node.lineno} a conditional expression inside another, or in a walrus")

            if isinstance(node, ast.Assign) and is_tuple_of_unrelated_values(node):
                broken.append(f"{path}:{node.lineno} a tuple assignment of unrelated values")

    assert broken == []


def test_top_level_names_mean_one_thing():
    homes = {}
    for path, tree in SOURCES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                homes.setdefault(node.name, []).append(path)

    # The layouts of original checkpoints share one interface, and every command has a `main`.
    shared = {"main", "is_original", "load_model", "load_processor", "_check_config"}
    assert {key: paths for key, paths in homes.items() if len(paths) > 1 and key not in shared} == {}


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("vzip", OURS | RECIPE),
        ("data", {"train", "scripts", "tests"} | RECIPE),
        ("train", {"scripts", "tests"}),
        ("scripts", {"tests"}),
    ],
)
def test_floors_import_downwards(folder, forbidden):
    broken = {}
    for path, tree in below(folder).items():
        roots = {module.split(".")[0] for module in imported(tree)}
        if roots & forbidden:
            broken[path] = roots & forbidden

    assert broken == {}


def room_of(path):
    """The room of a file: its folder below a floor, or the file itself where it stands in the hall."""
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:2])


@pytest.mark.parametrize("floor", ["vzip", "data", "scripts", "train"])
def test_rooms_do_not_import_in_circles(floor):
    rooms = {room_of(path) for path in below(floor)} - {f"{floor}.__init__"}
    arrows = {room: set() for room in rooms}
    for path, tree in below(floor).items():
        if path.endswith("__init__.py") and path.count("/") == 1:
            continue
        targets = {".".join(module.split(".")[:2]) for module in imported(tree)}
        arrows[room_of(path)] |= (targets & rooms) - {room_of(path)}

    # Take away rooms that import no other one until none is left; what stays is a circle.
    while leaves := {room for room, targets in arrows.items() if not targets}:
        arrows = {room: targets - leaves for room, targets in arrows.items() if room not in leaves}
    assert arrows == {}


def test_reducers_need_torch_alone():
    allowed = ("torch", "vzip.reducers", "vzip.errors", *sys.stdlib_module_names)
    for path, tree in below("vzip/reducers").items():
        others = [m for m in imported(tree) if not any(f"{m}.".startswith(f"{root}.") for root in allowed)]
        assert others == [], path


def test_no_file_names_a_machine():
    broken = []
    for path in FILES:
        content = path.read_bytes()
        has_host = path.name != "LICENSE" and any(host.encode() in content for host in HOSTS)
        if has_host or MACHINE.search(content):
            broken.append(name(path))

    assert broken == []


def test_every_public_thing_of_the_library_has_a_docstring():
    missing = [path for path, tree in below("vzip").items() if not ast.get_docstring(tree)]
    for path, tree in below("vzip").items():
        for node in tree.body:
            is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path}: {node.name}")

    assert missing == []


def test_docstrings_read_as_sentences():
    stilted = re.compile(r"^(Of|As) |\b(is|are) none\b|\bhas not\b|\bas it is\b|\bthat is none\b")
    broken = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                docstring = ast.get_docstring(node) or ""
                if stilted.search(docstring):
                    broken.append(f"{path}: {docstring.splitlines()[0]}")

    assert broken == []
