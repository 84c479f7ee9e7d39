"""The documents say what is: their commands, requests, links, names and defaults are tried against the project."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from legacy_client import events
from serving_processes import Serving, serving

from client.schemas.legacy import DEFAULT_MAX_NEW_TOKENS, LegacyParameters, LegacyRequest
from config import serving_config
from config.server_config import ServerConfig
from config.serving_config import LimitsConfig, LoggingConfig, MetricsConfig, ModelConfig
from config.version import __version__

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README_CN.md")
DOCUMENTS = (*READMES, "CHANGELOG.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")))
PACKAGES = ("agent", "benchmarks", "client", "config", "kernels", "models", "server")
DEFAULT_URL = "http://127.0.0.1:9811"
KNOWN_HOSTS = {
    "127.0.0.1",
    "localhost",
    "test",
    "llm",
    "chat.example.org",
    "www.apache.org",
    "github.com",
    "arxiv.org",
    "www.w3.org",
}  # that a file may name
CONFIG_SECTIONS = {
    "models": ModelConfig,
    "server": ServerConfig,
    "limits": LimitsConfig,
    "logging": LoggingConfig,
    "metrics": MetricsConfig,
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    document: str
    language: str
    content: str

    def __str__(self) -> str:
        return f"{self.document}: {self.content.splitlines()[0][:60]}"


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(language: str) -> list[Block]:
    fenced = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(document, *found)
        for document in DOCUMENTS
        for found in fenced.findall(text_of(document))
        if found[0] == language
    ]


def spans(document: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL))


def commands() -> list[tuple[str, list[str]]]:
    """Every command of the shell blocks and every ``make`` in the text, as words; broken lines are joined."""
    lines = [(b.document, line) for b in blocks("sh") for line in b.content.replace("\\\n", " ").splitlines()]
    lines += [(document, span) for document in DOCUMENTS for span in spans(document) if span.startswith("make ")]
    return [(document, shlex.split(line, comments=True)) for document, line in lines]


def calls(program: str) -> list[tuple[str, ...]]:
    """The different commands that run ``program``, wherever it is installed."""
    return list(dict.fromkeys(tuple(words) for _, words in commands() if Path(words[0]).name == program))


def test_every_command_is_one_that_is_tried_here() -> None:
    assert {Path(words[0]).name for _, words in commands()} == {"make", "curl", "python"}
    for document in READMES:
        assert [words for place, words in commands() if place == document] == [
            words for place, words in commands() if place == READMES[0]
        ], f"{document} has other commands than {READMES[0]}"


@pytest.mark.parametrize("words", calls("make"), ids=" ".join)
def test_a_make_target_exists(words: tuple[str, ...]) -> None:
    makefile = text_of("Makefile")
    for word in words[1:]:
        name, is_setting, value = word.partition("=")
        pattern = rf"^{name} \?=" if is_setting else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {name}"
        assert not value or name == "PEERS" or (ROOT / value).is_file()  # what its reader has yet to set up


@pytest.mark.parametrize("words", calls("python"), ids=" ".join)
def test_a_python_command_has_its_options(words: tuple[str, ...]) -> None:
    program = words[1:3] if words[1] == "-m" else words[1:2]
    if program == ("-m", "client"):  # each of its commands has options of its own
        program = words[1:4]
    help_text = help_of(program)
    for option in (word for word in words[1 + len(program) :] if word.startswith("--")):
        assert re.search(rf"{option}\b", help_text), f"{' '.join(program)} has no {option}"


@cache
def help_of(program: tuple[str, ...]) -> str:
    command = [sys.executable, *program, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def as_request(words: Sequence[str]) -> dict[str, Any]:
    """A curl line as what it sends; an option that is not known here is an error."""
    curl = argparse.ArgumentParser(exit_on_error=False)
    curl.add_argument("url")
    curl.add_argument("-N", action="store_true")
    curl.add_argument("-H", action="append", default=[])
    curl.add_argument("-d")
    line = curl.parse_args(words[1:])
    assert line.url.startswith(DEFAULT_URL), line.url
    headers = dict(header.split(": ", 1) for header in line.H)
    path = line.url.removeprefix(DEFAULT_URL)
    return {"method": "POST" if line.d else "GET", "url": path, "headers": headers, "content": line.d}


@pytest.mark.parametrize("words", calls("curl"), ids=lambda words: words[-1])
def test_a_curl_line_is_answered(words: tuple[str, ...], client: httpx.Client) -> None:
    response = client.request(**as_request(words))
    assert response.status_code == 200, response.text
    streamed = "-N" in words
    assert response.headers["content-type"].startswith("text/event-stream" if streamed else "application/json")


@pytest.mark.slow
@pytest.mark.parametrize("words", calls("curl"), ids=lambda words: words[-1])
def test_curl_itself_takes_the_line(words: tuple[str, ...], standin: Serving) -> None:
    command = [word.replace(DEFAULT_URL, standin.url) for word in words]
    asked = subprocess.run(
        [*command, "--silent", "--show-error", "--fail"], capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr
    if "-N" in words:
        assert "data:" in asked.stdout
    else:
        json.loads(asked.stdout)


@pytest.fixture(scope="module")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of the default model, exported as ``make serve`` does."""
    subprocess.run([sys.executable, "-m", "models.export"], cwd=ROOT, check=True)
    model = {"path": "output/models/smollm2-135m-instruct", "target": "cpu", "cache_memory": "64MiB"}
    with serving(tmp_path_factory.mktemp("shown"), [model]) as deployment:
        yield deployment.client()


@pytest.mark.slow
@pytest.mark.parametrize("document", READMES)
def test_the_answers_that_are_shown_are_those_of_the_default_model(document: str, default_model: httpx.Client) -> None:
    shown = re.findall(
        r"^```sh\n(curl .*?)^```\n\n```(json|text)\n(.*?)^```$", text_of(document), re.MULTILINE | re.DOTALL
    )
    assert len(shown) == text_of(document).count("\ncurl ") == 3
    for line, language, expected in shown:
        content = default_model.request(**as_request(shlex.split(line.replace("\\\n", " ")))).content
        if language == "json":
            assert json.loads(content) == json.loads(expected)
        else:  # how many steps there are depends on how fast they are read
            assert together(content) == together(expected.replace("\n", "\r\n").encode() + b"\r\n")


def together(stream: bytes) -> tuple[str, str]:
    """The steps of a stream as one text, and its last event."""
    *steps, whole = [event["data"] for event in events(stream)]
    return "".join(steps), whole


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    content = json.loads(block.content)
    if "inputs" in content:
        LegacyRequest.model_validate(content)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_configuration_can_be_loaded(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(block.content, encoding="utf-8")
    assert serving_config.load(path).models


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if target.startswith("#"):
            headings = re.findall(r"^#+ (.*)$", text_of(document), re.MULTILINE)
            assert target[1:] in {heading.lower().replace(" ", "-") for heading in headings}, f"{document}: {target}"
        elif not target.startswith("https://"):
            assert ((ROOT / document).parent / target).is_file(), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_modules_and_keys_that_are_named_exist(document: str) -> None:
    for span in spans(document):
        if re.fullmatch(rf"(?:{'|'.join(PACKAGES)}|docs|tests)/[\w./-]*", span):
            assert (ROOT / span).exists(), f"{document}: {span}"
        elif named := re.fullmatch(rf"({'|'.join((*PACKAGES, 'limits', 'logging', 'metrics'))})\.((?!py$)\w+)", span):
            section, name = named.groups()
            key = name in getattr(CONFIG_SECTIONS.get(section), "__struct_fields__", ())
            assert key or (ROOT / section / f"{name}.py").is_file(), f"{document}: {span} is no key and no module"
        elif setting := re.match(r"(\w+): ", span):
            assert any(setting[1] in record.__struct_fields__ for record in CONFIG_SECTIONS.values()), (
                f"{document}: {span}"
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_the_architecture_names_every_file(package: str) -> None:
    section = re.search(
        rf"^\*\*`{package}/`\*\*(.*?)^(?:\*\*`|`output/`)", text_of("docs/architecture.md"), re.M | re.S
    )
    assert section, f"docs/architecture.md has no table of {package}/"
    named = set(re.findall(r"`([\w/]+\.\w+)`", section[1]))
    there = {
        path.relative_to(ROOT / package).as_posix()
        for ending in ("*.py", "*.cc", "*.h", "*.sh", "*.txt", "*.html", "*.css", "*.js", "*.svg")
        for path in (ROOT / package).rglob(ending)
        if path.name != "__init__.py"
    }
    assert named == there, "docs/architecture.md: say what each file is, in the table of its folder"


def test_the_table_of_parameters_is_complete_and_its_defaults_are_true() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text_of("docs/requests.md"), re.MULTILINE))
    assert set(rows) == set(LegacyParameters.model_fields)
    words: dict[object, str] = {"sse": '`"sse"`', None: "off"}
    special = {"seed": "random", "max_new_tokens": str(DEFAULT_MAX_NEW_TOKENS), "stop": "none"}
    for name, field in LegacyParameters.model_fields.items():
        if name in special:
            assert rows[name] == special[name]
        elif isinstance(field.default, bool):
            assert rows[name] == str(field.default).lower(), name
        else:
            assert rows[name] == words.get(field.default, str(field.default)), name


def numbers(document: str) -> list[str]:
    """The numbers of the one table between the two marks."""
    [table] = re.findall(r"^<!-- numbers -->$(.*?)^<!-- /numbers -->$", text_of(document), re.MULTILINE | re.DOTALL)
    return re.findall(r"\d[\d.,]*", "\n".join(line for line in table.splitlines() if line.startswith("|")))


def test_both_readmes_have_the_same_numbers() -> None:
    assert numbers(READMES[0]) == numbers(READMES[1])


def test_the_routes_that_are_listed_are_those_of_the_app(client: httpx.Client) -> None:
    served = {
        f"{method.upper()} {path.replace('{model}', 'M')}"
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method in methods
    }
    for document in READMES:
        listed = {span for span in spans(document) if re.match(r"(GET|POST) /", span)}
        assert listed == served, document


def test_the_changes_begin_with_this_version() -> None:
    assert re.findall(r"^## (\S+)", text_of("CHANGELOG.md"), re.MULTILINE)[0] == __version__


# Spelt so that the expression does not find itself.
LOCAL = re.compile(rf"/(?:work|root|home)/|--(?:extra-)?index-url|python[h]osted|{re.escape(str(ROOT))}/")


def project_files() -> Iterator[Path]:
    """Everything that belongs to the project, as git sees it."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    yield from (path for name in listing.stdout.decode().split("\0") if name and (path := ROOT / name).is_file())


def found_in_project(pattern: re.Pattern[str]) -> dict[str, set[str]]:
    """What ``pattern`` finds, by the file in which it does."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8", "replace") for path in project_files()}
    assert len(texts) > 100
    return {name: found for name, text in texts.items() if (found := set(pattern.findall(text)))}


def test_nothing_names_places_that_only_one_machine_has() -> None:
    assert found_in_project(LOCAL) == {}


def test_every_address_is_a_known_one() -> None:
    found = found_in_project(re.compile(r"https?://([\w.-]+)"))
    assert {name: hosts - KNOWN_HOSTS for name, hosts in found.items() if hosts - KNOWN_HOSTS} == {}
