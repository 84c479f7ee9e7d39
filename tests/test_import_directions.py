"""Who may import whom: the edges that docs/architecture.md draws, read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("agent", "client", "config", "kernels", "models", "server")
OURS = (*PACKAGES, "start", "start_agent", "tests", "benchmarks")

# What the sources of a package, or one file, may import of ours. A file's own line stands beside its package's.
MAY_IMPORT = {
    "config/": ["config"],
    "kernels/": ["kernels", "config"],
    "models/": ["models", "kernels", "config"],
    "agent/": ["agent", "config"],
    "agent/doctor_host.py": ["kernels.library"],
    "agent/model_runner.py": ["kernels.library", "models.mindir"],
    "agent/ascend_runner.py": ["models.mindir"],
    "server/": ["server", "config", "agent.protocol"],
    "client/": ["client", "server", "config"],
    "start_agent.py": ["agent", "config"],
    "start.py": ["client", "config"],
}
# The scheduling core: no clock, no sockets, no event loop, and nothing of ours that has them.
PURE = tuple(
    f"server/{noun}.py"
    for noun in (
        "block_manager",
        "dispatcher",
        "prefix_keys",
        "request",
        "request_times",
        "scheduler",
        "step",
        "step_plan",
        "trials",
    )
)
PURE_MAY_IMPORT = ["agent.protocol", *(file.removesuffix(".py").replace("/", ".") for file in PURE)]
# What speaks to a server over HTTP like everybody else, though it lives in the app's package.
CLIENT = (
    "client/__init__.py",
    "client/__main__.py",
    "client/answers.py",
    "client/client_errors.py",
    "client/command_line.py",
    "client/conversation.py",
    "client/http_call.py",
    "client/http_session.py",
    "client/inference_client.py",
    "client/json_request.py",
    "client/patience.py",
    "client/remote_server.py",
    "client/server_status.py",
    "client/terminal.py",
)
CLIENT_MAY_IMPORT = ["config.version", *(file.removesuffix(".py").replace("/", ".") for file in CLIENT)]
IMPURE = ["asyncio", "concurrent", "datetime", "multiprocessing", "os", "select", "socket", "threading", "time"]
UNRESOLVABLE = {"mindformers": ["models/mindformers_export.py"]}  # no extra could install it: see docs/mindformers.md
OPTIONAL = ("server/request_span.py", "server/span_export.py")  # need the packages of the extra ``otel``
RUNNERS = ("agent/compiled_graph.py", "agent/model_runner.py", "agent/paged_pair_runner.py", "agent/ascend_runner.py")
# agent/collective.py: ranks meet in MindSpore, at a process that has no runner.
MINDSPORE_IN = ("agent/collective.py", *RUNNERS, "models/", "kernels/")


def sources() -> list[str]:
    """All sources that are not tests, by their path in the checkout."""
    paths = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def imports(tree: ast.AST) -> Iterator[str]:
    """The full names that a source imports, wherever in it: ``agent.protocol.Hello``, ``time``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(file: str) -> list[str]:
    return list(imports(ast.parse((ROOT / file).read_text(encoding="utf-8"))))


def inside(name: str, modules: Collection[str]) -> bool:
    """Whether an imported name is one of ``modules``, or in one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def may_import(file: str) -> list[str]:
    """What of ours ``file`` may import."""
    return [module for place, modules in MAY_IMPORT.items() if file.startswith(place) for module in modules]


def wrong_turns(file: str, names: Collection[str]) -> list[str]:
    """The names among a file's imports that the file must not import."""
    wrong = [name for name in names if inside(name, OURS) and not inside(name, may_import(file))]
    wrong += [name for name in names if name.startswith(".")]
    if not file.startswith(MINDSPORE_IN):
        wrong += [name for name in names if inside(name, ["mindspore"])]
    if file in PURE:
        wrong += [name for name in names if inside(name, IMPURE)]
        wrong += [name for name in names if inside(name, OURS) and not inside(name, PURE_MAY_IMPORT)]
    if file in CLIENT:
        wrong += [name for name in names if inside(name, OURS) and not inside(name, CLIENT_MAY_IMPORT)]
    return wrong


@pytest.mark.parametrize("file", sources())
def test_imports_keep_their_direction(file: str) -> None:
    if file == "setup.py":
        assert not [name for name in imports_of(file) if inside(name, OURS)]
    else:
        assert may_import(file), f"{file}: say in MAY_IMPORT what it may import, and in docs/architecture.md what it is"
        assert not wrong_turns(file, imports_of(file)), f"{file} may import of ours: {', '.join(may_import(file))}"


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("server/scheduler.py", "import time"),
        ("server/scheduler.py", "from time import monotonic"),
        ("server/step_plan.py", "from server.agent_group import AgentGroup"),
        ("server/llm_server.py", "from agent import agent"),
        ("server/llm_server.py", "from agent.sampler import Sampler"),
        ("agent/agent.py", "def late():\n    from server import request"),
        ("agent/agent.py", "import mindspore as ms"),
        ("agent/model_runner.py", "from models.network import Network"),
        ("client/deployment.py", "import agent.protocol"),
        ("client/inference_client.py", "from server.errors import ServingError"),
        ("client/inference_client.py", "from client.schemas.legacy import LegacyRequest"),
        ("config/manifest.py", "from models import export"),
        ("models/export.py", "from server.tokenizer import Tokenizer"),
        ("models/export.py", "from . import graphs"),
        ("start.py", "from tests import serving_processes"),
    ],
)
def test_a_wrong_turn_is_seen(file: str, code: str) -> None:
    assert wrong_turns(file, list(imports(ast.parse(code))))


@pytest.mark.parametrize("module", ["client.server_app_post", "start", "start_agent", "agent.__main__", "agent.doctor"])
def test_what_needs_no_mindspore_starts_without_it(module: str) -> None:
    code = f"import sys, {module}; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_python_client_starts_without_the_server() -> None:
    code = (
        "import sys, client.command_line; from client import MindsporeInferenceClient; "
        "sys.exit(str([name for name in sys.modules if name.split('.')[0] in ('server', 'agent', 'fastapi')]) != '[]')"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def requirements(argument: str, extra: str | None = None) -> set[str]:
    """The distributions that setup.py lists under ``install_requires``, or in one or all of ``extras_require``."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    [value] = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == argument]
    found = ast.literal_eval(value)
    lines = (
        found
        if isinstance(found, list)
        else [line for name, lines in found.items() if extra in (None, name) for line in lines]
    )
    return {normal(re.split(r"[\s<>=!~;\[]", line)[0]) for line in lines}


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def undeclared(files: Collection[str], declared: Collection[str], ours: Collection[str]) -> dict[str, list[str]]:
    """Imported packages that none of the ``declared`` distributions brings, with the files that import them."""
    known = packages_distributions()
    found: dict[str, list[str]] = {}
    for file in files:
        for package in {name.split(".")[0] for name in imports_of(file)} - sys.stdlib_module_names - set(ours):
            if not {normal(distribution) for distribution in known.get(package, [])} & set(declared):
                found.setdefault(package, []).append(file)
    return found


def test_all_that_is_imported_is_declared() -> None:
    files = {*sources()} - {"setup.py", *OPTIONAL}
    found = undeclared(files, requirements("install_requires"), OURS)
    assert found == UNRESOLVABLE, "add them to install_requires in setup.py"
    declared = requirements("install_requires") | requirements("extras_require", "otel")
    assert undeclared(OPTIONAL, declared, OURS) == {}, "add them to the extra otel in setup.py"


def test_what_is_optional_is_imported_late() -> None:
    modules = {file.removesuffix(".py").replace("/", ".") for file in OPTIONAL}
    code = f"import sys, client.server_app_post; sys.exit(not {modules}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_all_that_tests_import_is_declared() -> None:
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))
    helpers = {Path(file).stem for file in files}
    declared = requirements("install_requires") | requirements("extras_require")
    assert undeclared(files, declared, {*OURS, *helpers}) == {}, "add them to extras_require in setup.py"
