"""Rules that hold for the whole tree, and the table of docs/security.md that names the tests of all of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_processes import Serving
from test_import_directions import CLIENT

from config.serving_config import ConfigError, load

ROOT = Path(__file__).parent.parent
SERVING = ("agent", "client", "config", "server")  # what runs while clients ask
CLIENTS = {
    "aiohttp",
    "ftplib",
    "http.client",
    "httpx",
    "requests",
    "smtplib",
    "urllib.request",
    "urllib3",
    "websockets",
}
ACCEPTANCE = ("agent/acceptance.py", "agent/golden_text.py")  # a tool that asks the server which it has started
MAY_CALL_OUT = (*CLIENT, *ACCEPTANCE, "server/span_export.py")  # what runs at a client's; where the operator says
REMOTE = (
    "server: {{host: {host}, {switches}}}\nmodels: [{{path: x, names: [a], agent_ports: [9], agent_host: {agent}}}]"
)


def trees(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """The sources in ``folders``, by their path in the checkout."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    return ((ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def callers_out(file: str, tree: ast.AST) -> set[str]:
    """What calls other servers, or parts of the Python client that do."""
    clients = CLIENTS | {path.removesuffix(".py").replace("/", ".") for path in CLIENT}
    found = {name for name in imported(tree) for client in clients if f"{name}.".startswith(f"{client}.")}
    return set() if file in MAY_CALL_OUT else found


def unbounded_caches(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        for decorator in getattr(node, "decorator_list", ()):
            text = ast.unparse(decorator)
            if re.match(r"(functools\.)?cache\b|(functools\.)?lru_cache\(.*\bNone\b", text):
                found.append(text)
    return found


def made_up_patterns(tree: ast.AST) -> list[str]:
    """Regular expressions that a function makes of what it is given."""
    return [
        ast.unparse(call)
        for function in functions(tree)
        for name, call in calls(function)
        if re.fullmatch(r"re\.\w+", name) and name != "re.escape" and not isinstance(call.args[0], ast.Constant)
    ]


def test_nothing_is_fetched() -> None:
    assert {file: found for file, tree in trees(*SERVING) if (found := callers_out(file, tree))} == {}


def test_no_cache_is_unbounded() -> None:
    assert {file: found for file, tree in trees(*SERVING) if (found := unbounded_caches(tree))} == {}


def test_no_regular_expression_is_made_of_a_request() -> None:
    found = {file: names for file, tree in trees("agent", "client", "server") if (names := made_up_patterns(tree))}
    assert found == {}


def test_no_code_of_a_checkpoint_is_run() -> None:
    trees_of_all = dict(trees("agent", "client", "config", "kernels", "models", "server", "benchmarks"))
    with_torch = {file for file, tree in trees_of_all.items() if "torch" in {n.split(".")[0] for n in imported(tree)}}
    assert with_torch == {"benchmarks/onednn.py"}, "which multiplies random numbers and reads no file"
    keywords = {keyword.arg for tree in trees_of_all.values() for _, call in calls(tree) for keyword in call.keywords}
    assert "trust_remote_code" not in keywords


def test_the_searches_find_each_danger() -> None:
    for code in (
        "import requests",
        "from urllib import request",
        "import http.client as c",
        "from client import http_session",
    ):
        assert callers_out("server/x.py", ast.parse(code)), code
    for code in ("urllib.parse", "http", "socket"):
        assert not callers_out("server/x.py", ast.parse(f"import {code}")), code
    for code in ("@cache", "@functools.cache", "@lru_cache(maxsize=None)", "@functools.lru_cache(None)"):
        assert unbounded_caches(ast.parse(f"{code}\ndef f(): ...")), code
    assert not unbounded_caches(ast.parse("@lru_cache(maxsize=64)\ndef f(): ..."))
    assert made_up_patterns(ast.parse("def f(x): return re.search(x, 'y')"))
    assert not made_up_patterns(ast.parse("A = re.compile(f'{B}')\ndef f(x): return re.search('y', x)"))


@pytest.mark.parametrize("file", ["client/api_keys.py", "agent/protocol.py"])
def test_what_proves_who_asks_is_compared_in_constant_time(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert "hmac.compare_digest" in {name for name, _ in calls(tree)}


@pytest.mark.parametrize(
    ("host", "agent", "switches", "problem"),
    [
        ("0.0.0.0", "127.0.0.1", "", r"server\.host: 0\.0\.0\.0 is not loopback; set server\.allow_remote"),
        ("127.0.0.1", "10.0.0.1", "", r"models\[0\]\.agent_host: 10\.0\.0\.1 is not loopback"),
        ("0.0.0.0", "127.0.0.1", "allow_remote: true", r"server\.api_key_file: 0\.0\.0\.0 is not loopback"),
        ("127.0.0.1", "127.0.0.1", "tls_key: k", r"server\.tls_certificate: TLS needs a certificate and its key"),
        (
            "127.0.0.1",
            "127.0.0.1",
            "cors_origins: [chat.example.org]",
            r"server\.cors_origins: 'chat.example.org' is no",
        ),
    ],
)
def test_other_machines_are_let_in_on_purpose_only(
    tmp_path: Path, host: str, agent: str, switches: str, problem: str
) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text(REMOTE.format(host=host, agent=agent, switches=switches))
    with pytest.raises(ConfigError, match=problem):
        load(path)


PATHS_OUT = [
    "/../../../etc/passwd",
    "/models/../../../../etc/passwd",
    "/models/..%2f..%2f..%2fetc%2fpasswd",
    "/models/%2e%2e/%2e%2e/etc/passwd/generate",
    "/models//etc/passwd",
    "/ui/../config/smollm2_cpu.yaml",
    "/ui/..%2f..%2fconfig/smollm2_cpu.yaml",
    "/ui/%2fetc/passwd",
    "/health/../metrics",
    "/serving/get_bs?model=../../etc/passwd",
]


@pytest.mark.parametrize("path", PATHS_OUT)
def test_no_path_leads_to_a_file(standin: Serving, path: str) -> None:
    connection = HTTPConnection("127.0.0.1", standin.port, timeout=20)
    for method in ("GET", "POST"):
        connection.request(method, path, body=b"{}", headers={"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        assert response.status in (404, 405), content
        assert b"root:" not in content
        assert b"agent_ports" not in content
    connection.close()


BODIES: list[Any] = [None, {}, [], "x", 7, {"inputs": []}, {"inputs": {}}, {"prompt": -1}, {"messages": {"a": None}}]


def test_no_route_method_or_body_is_an_internal_error(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) > 5
    for path in (re.sub(r"\{\w+\}", "llama2", path) for path in paths):
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X"):
            for body in BODIES if method == "POST" else BODIES[:2]:
                response = client.request(method, path, json=body)
                assert response.status_code < 500, (method, path, body)
                assert response.headers["x-request-id"]


def named_tests() -> dict[str, list[str]]:
    """The tests that docs/security.md names, by the class of danger."""
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    [table] = re.findall(r"^\| danger .*?\n\|[-| ]+\n(.*)\Z", text, re.MULTILINE | re.DOTALL)
    rows = [row.strip("|").split("|") for row in table.splitlines() if row]
    return {row[0].strip(): re.findall(r"`(test_\w+\.py::test_\w+)`", row[2]) for row in rows}


def test_every_danger_has_a_rule_and_every_rule_a_test_that_exists() -> None:
    named = named_tests()
    assert len(named) >= 19
    assert [danger for danger, tests in named.items() if not tests] == []
    for place in (place for tests in named.values() for place in tests):
        file, name = place.split("::")
        assert (ROOT / "tests" / file).is_file(), place
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {function.name for function in functions(tree) if isinstance(function, ast.FunctionDef)}, place
