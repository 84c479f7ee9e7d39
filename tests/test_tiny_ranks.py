"""A tiny model on one agent, on two ranks, and on two groups of two ranks: they write the same texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
from default_model import PROMPTS
from golden_text import metric
from serving_processes import START_SECONDS, Serving, eventually, serving
from tiny_checkpoints import write_tiny

from config.free_ports import free_ports
from config.manifest import read_manifest
from models import export

ON_ONE, ON_TWO = "llama2", "internlm"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("ranks")
    write_tiny("llama", folder / "checkpoint")
    models: list[dict[str, Any]] = []
    for name, ranks in ((ON_ONE, 1), (ON_TWO, 2)):
        options = export.ExportOptions(operators=export.choose_operators("auto"), weights="float32", ranks=ranks)
        manifest = export.export(folder / "checkpoint", folder / name, options)
        assert manifest.world_size == ranks
        models.append({
            "path": str(folder / name), "names": [name], "target": "cpu", "agent_ports": free_ports(ranks),
            "cache_memory": "16MiB", "cache_dtype": "float32",
        })  # fmt: skip
    with serving(folder, models) as started:
        yield started


def ask(deployment: Serving, name: str, prompt: str) -> list[int]:
    """The ids of 24 greedy tokens."""
    parameters = {"max_new_tokens": 24, "ignore_eos": True, "details": True}
    response = deployment.client().post(f"/models/{name}/generate", json={"inputs": prompt, "parameters": parameters})
    assert response.status_code == 200, response.text
    return [token["id"] for token in response.json()["details"]["tokens"]]


def test_two_ranks_write_the_texts_of_one(deployment: Serving) -> None:
    prompts = [prompt[:60] for prompt in PROMPTS[:8]]
    with ThreadPoolExecutor(2 * len(prompts)) as threads:
        answers = list(threads.map(lambda asked: ask(deployment, *asked), product((ON_ONE, ON_TWO), prompts)))
    assert answers[: len(prompts)] == answers[len(prompts) :]
    assert all(len(answer) == 24 for answer in answers)
    assert len({tuple(answer) for answer in answers}) == len(prompts)


def test_a_client_that_leaves_frees_its_blocks_on_both_ranks(deployment: Serving) -> None:
    before = ask(deployment, ON_TWO, "again")
    body = {"inputs": "a b c", "parameters": {"max_new_tokens": 150, "ignore_eos": True}}
    with deployment.client().stream("POST", f"/models/{ON_TWO}/generate_stream", json=body) as response:
        next(response.iter_raw())
    eventually(lambda: metric(deployment, "kv_cache_usage_perc") == 0)
    assert ask(deployment, ON_TWO, "again") == before


def members(deployment: Serving) -> dict[str, set[int]]:
    """The processes of each group, by the port at which its ranks meet."""
    assert deployment.agents is not None
    found: dict[str, set[int]] = defaultdict(set)
    for process in deployment.agents.children():
        found[process.environ()["MS_SCHED_PORT"]].add(process.pid)
    return found


@pytest.mark.slow
def test_each_group_of_ranks_has_a_collective_of_its_own(deployment: Serving, tmp_path: Path) -> None:
    """One of them is lost under load: it is started again alone, and no answer changes."""
    model = {
        "path": str(deployment.config_path.parent / ON_TWO), "names": [ON_TWO], "target": "cpu", "data_parallel": 2,
        "agent_ports": free_ports(4), "cache_memory": "16MiB", "cache_dtype": "float32",
    }  # fmt: skip
    prompts = [prompt[:60] for prompt in PROMPTS[:8]]
    with serving(tmp_path, [model]) as two, ThreadPoolExecutor(len(prompts)) as threads:
        assert two.agents is not None
        two.agents.wait_for("all agents started")
        (_, kept), (_, lost) = members(two).items()
        assert (len(kept), len(lost)) == (3, 3)  # two ranks and where they meet
        answers = threads.map(lambda prompt: ask(two, ON_TWO, prompt), prompts)
        psutil.Process(max(lost)).kill()
        assert list(answers) == [ask(deployment, ON_TWO, prompt) for prompt in prompts]
        eventually(lambda: two.agents is not None and two.agents.output.count(" is ready: ") == 4 + 2, START_SECONDS)
        assert kept in members(two).values()
        assert lost.isdisjoint(set().union(*members(two).values()))


def test_ranks_share_the_weights(deployment: Serving) -> None:
    folder = deployment.config_path.parent
    assert read_manifest(folder / ON_TWO).cache_heads * 2 == read_manifest(folder / ON_ONE).num_kv_heads
    whole = (folder / ON_ONE / "weights.bin").stat().st_size
    for rank in range(2):
        assert (folder / ON_TWO / f"rank_{rank}" / "weights.bin").stat().st_size < 0.6 * whole
