"""``/openapi.json`` is true: schemathesis asks every operation what it may and may not be asked, and compares."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving_processes import ROOT, START_SECONDS, Serving

from client import api_document

# Bounds that depend on each other, on the prompt or on the deployment cannot stand in a schema: a request that keeps to
# it may be refused. All other checks are on; among them: no 5xx, statuses and bodies as documented, wrong data refused.
LEFT_OUT = "positive_data_acceptance"


def run_schemathesis(deployment: Serving, folder: Path, *options: str) -> None:
    """Let schemathesis ask valid and invalid requests; a failure shows its report."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{deployment.url}/openapi.json"]
    command += ["--mode=all", f"--exclude-checks={LEFT_OUT}", f"--request-timeout={START_SECONDS}", "--no-color"]
    command += ["--generation-database=none", *options]  # in the test's own folder, where it keeps a cache
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_few_requests_to_every_operation(standin: Serving, tmp_path: Path) -> None:
    run_schemathesis(standin, tmp_path, "--phases=fuzzing", "--max-examples=5")


@pytest.mark.slow
def test_every_operation_keeps_to_its_description(standin: Serving, tmp_path: Path) -> None:
    run_schemathesis(standin, tmp_path, "--max-examples=10")


def test_every_reference_leads_somewhere_and_every_operation_says_what_it_does(client: httpx.Client) -> None:
    response = client.get("/openapi.json")
    schema = response.json()
    references = set(re.findall(r'"#/components/schemas/(\w+)"', response.text))
    assert references <= set(schema["components"]["schemas"])
    assert response.text.count('"$ref"') == len(re.findall(r'"\$ref":"#/components/schemas/\w+"', response.text))
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], f"{method} {path}"
            assert {"413", "431"} < set(operation["responses"]), f"{method} {path}"


def test_the_served_names_are_those_that_a_path_takes(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    [name] = paths["/models/{model}"]["post"]["parameters"]
    assert name["schema"]["enum"] == ["llama2", "internlm", "internlm-chat", "chat"]


def test_the_document_of_the_routes_is_what_the_app_says(client: httpx.Client) -> None:
    written = (ROOT / api_document.DOCUMENT).read_text(encoding="utf-8")
    said = api_document.document(client.get("/openapi.json").json())
    assert written == said, "run python -m client.api_document"
