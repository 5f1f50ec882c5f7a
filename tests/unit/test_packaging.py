"""What pyproject.toml promises: every imported package is declared, pins fit the ranges, imports stay
light.
"""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vzip
from tests.conftest import ROOT
from vzip.errors import UserError, check_package

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

OURS = {"vzip", "data", "train", "scripts"}
DISTRIBUTIONS = {"PIL": "pillow", "av": "av", "hydra": "hydra-core", "yaml": "pyyaml"}
"""The package to install for a module of another name."""


def requirements(lines):
    return [Requirement(line) for line in lines]


def declared(lines):
    """Names of the packages in some requirements, also those of the extras of vzip that they name."""
    names = set()
    for requirement in requirements(lines):
        if requirement.name == "vzip":
            for extra in requirement.extras:
                names |= declared(EXTRAS[extra])
        else:
            names.add(canonicalize_name(requirement.name))

    return names


def packages_of(nodes):
    """The packages outside the standard library that some nodes of a syntax tree import."""
    packages = set()
    for node in nodes:
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]

        for module in modules:
            root = module.split(".")[0]
            if root not in OURS and root not in sys.stdlib_module_names:
                packages.add(canonicalize_name(DISTRIBUTIONS.get(root, root)))

    return packages


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_import_is_declared():
    eval_pins = (ROOT / "requirements-eval.txt").read_text().splitlines()
    known = declared(PYPROJECT["project"]["dependencies"])
    known |= declared(line for line in eval_pins if line and not line.startswith("#"))
    for lines in EXTRAS.values():
        known |= declared(lines)

    missing = {}
    for folder in sorted(OURS):
        for path in (ROOT / folder).rglob("*.py"):
            undeclared = packages_of(ast.walk(ast.parse(path.read_text()))) - known
            if undeclared:
                missing[path.relative_to(ROOT).as_posix()] = undeclared

    assert missing == {}


def test_the_library_imports_optional_packages_late():
    core = declared(PYPROJECT["project"]["dependencies"])
    early = {}
    for path in (ROOT / "vzip").rglob("*.py"):
        optional = packages_of(ast.parse(path.read_text()).body) - core
        if optional and "integrations" not in path.parts:
            early[path.name] = optional

    assert early == {}


def test_dev_holds_every_extra_that_tests_can_use():
    # Kernels are built for a GPU, and vLLM has an environment of its own.
    others = set(EXTRAS) - {"dev", "kernels", "serve"}
    (own,) = [requirement for requirement in requirements(EXTRAS["dev"]) if requirement.name == "vzip"]
    assert own.extras == others


def test_pins_fit_the_ranges():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version

    direct = requirements(PYPROJECT["project"]["dependencies"])
    for extra, lines in EXTRAS.items():
        if extra not in ("kernels", "serve"):
            direct += requirements(lines)

    for requirement in direct:
        if requirement.name != "vzip":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_version_is_that_of_the_package():
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vzip.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", vzip.__version__)
    assert (ROOT / "vzip" / "py.typed").is_file()


@pytest.mark.slow
def test_public_names_are_imported_when_they_are_used():
    run_python(
        "import sys, vzip\n"
        "from vzip import UserError, __version__\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert set(vzip.__all__) <= set(dir(vzip))\n"
        "import vzip.handle, vzip.runs.compare\n"
        "assert all(callable(getattr(vzip, name)) for name in vzip.__all__ if name != '__version__')\n"
    )
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        vzip.atach  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("module", ["scripts.report", "scripts.push"])
def test_light_commands_start_without_torch(module):
    run_python(f"import sys, {module}\nassert not {{'torch', 'hydra'}} & set(sys.modules)")


def test_a_missing_package_is_refused_with_its_extra():
    check_package("packaging", extra="train", purpose="reading versions")
    message = re.escape(
        "reading films needs the package filmreader, which is not installed: pip install 'vzip[film]'"
    )
    with pytest.raises(UserError, match=message):
        check_package("filmreader", extra="film", purpose="reading films")


def planned(*words):
    """What make would run if nothing were installed."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "extras"),
    [
        (["tune"], [".[train,smol]"]),
        (["tune", "MODEL=video-llava-7b"], [".[train,smol]", "vzip[video]"]),
        (["cache", "MODEL=mini-gemini-7b"], [".[train,smol]", "vzip[llava]"]),
        (["check"], [".[train,smol]", "vzip[dev]"]),
        (["report"], [".[train,smol]", "vzip[figures]"]),
        (["setup", "EXTRAS=video quantized"], [".[train,smol]", "vzip[video]", "vzip[quantized]"]),
    ],
)
def test_a_command_installs_what_it_needs(words, extras):
    assert re.findall(r"'(\S+\[.+?\])'", planned(*words)) == extras


@pytest.mark.integration
def test_paths_with_spaces_and_budgets_with_brackets_are_quoted():
    assert "'runs/it'\\''s my run' 'hf'" in planned("export", "RUN=runs/it's my run")
    assert "reducer.budget='[4,8,16]'" in planned("tune", "BUDGET=[4,8,16]")
