"""One model over several agents: the text is that of one, in whatever way its requests are run."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from agent_client import attached
from default_model import NEW_TOKENS, PROMPTS, default_model
from golden_text import Answer, agreement, ask, ask_together, metric
from serving_processes import STOP_SECONDS, Serving, eventually, serving, standin_deployment
from step_plans import Sequenced, make_plan

from agent.protocol import StepError
from config.free_ports import free_ports
from config.manifest import read_manifest
from config.serving_config import load
from kernels import library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler: ranks of this size take too long"),
]

RANKS = 2
START_SECONDS = 30.0


def on_ranks(ranks: int, cache_memory: str) -> dict[str, Any]:
    """The default model in the reference format on so many agents, as a deployment names it."""
    return {
        "path": str(default_model("float32", ranks)),
        "target": "cpu",
        "agent_ports": free_ports(ranks),
        "cache_memory": cache_memory,
        "cache_dtype": "float32",
    }


@contextlib.contextmanager
def deployed(ranks: int, folder: Path, cache_memory: str) -> Iterator[Serving]:
    """Its agents and app, ready for requests."""
    with serving(folder, [on_ranks(ranks, cache_memory)]) as started:
        yield started


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with deployed(RANKS, tmp_path_factory.mktemp("ranks"), "128MiB") as started:
        yield started


@pytest.fixture(scope="module")
def answers(deployment: Serving) -> list[Answer]:
    """All prompts at once."""
    return ask_together(deployment, PROMPTS)


def check(answers: list[Answer]) -> None:
    """See that all tokens before a near tie are the reference's, and that these are most of them."""
    assert all(len(answer.token_ids) == NEW_TOKENS for answer in answers)
    assert sum(agreement(answer) for answer in answers) > len(answers) * NEW_TOKENS / 2


def test_two_ranks_write_the_text_of_one(answers: list[Answer]) -> None:
    assert len(answers) >= 30
    check(answers)


def test_alone_is_as_in_a_batch(deployment: Serving, answers: list[Answer]) -> None:
    for prompt, together in list(zip(PROMPTS, answers, strict=True))[::12]:
        alone = ask(deployment.client(), prompt)
        same = min(agreement(alone), agreement(together))
        assert alone.token_ids[:same] == together.token_ids[:same]


def test_a_stream_is_the_full_text(deployment: Serving) -> None:
    parameters = {"max_new_tokens": 24, "return_full_text": False, "return_protocol": "raw"}
    body = {"inputs": PROMPTS[0], "parameters": parameters}
    full = deployment.client().post("/models/internlm/generate", json=body).json()["generated_text"]
    with deployment.client().stream("POST", "/models/internlm/generate_stream", json=body) as response:
        pieces = [httpx.Response(200, content=line[5:]).json()["token"]["text"] for line in response.iter_lines()]
    assert "".join(pieces) == full


def test_a_seed_gives_the_same_sample_on_its_own_and_beside_others(deployment: Serving) -> None:
    parameters = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.0, "top_k": 20, "seed": 7}
    body = {"inputs": PROMPTS[1], "parameters": parameters}
    first, second = (
        deployment.client().post("/models/llama2/generate", json=body).json()["generated_text"] for _ in range(2)
    )
    assert first == second
    greedy = deployment.client().post("/models/llama2/generate", json={**body, "parameters": {"max_new_tokens": 12}})
    assert greedy.json()["generated_text"] != first


def test_a_client_that_leaves_frees_its_blocks_on_all_ranks(deployment: Serving) -> None:
    body = {"inputs": PROMPTS[2], "parameters": {"max_new_tokens": 1000, "ignore_eos": True}}
    with deployment.client().stream("POST", "/models/llama2/generate_stream", json=body) as response:
        pieces = response.iter_raw()
        next(pieces)
        assert metric(deployment, "num_requests_running") == 1
    eventually(lambda: metric(deployment, "kv_cache_usage_perc") == 0)
    check([ask(deployment.client(), PROMPTS[2])])


def test_each_rank_holds_about_half_of_the_weights() -> None:
    whole, cut = default_model("float32"), default_model("float32", RANKS)
    size = (whole / "weights.bin").stat().st_size
    for rank in range(RANKS):
        assert 0.5 <= (cut / f"rank_{rank}" / "weights.bin").stat().st_size / size < 0.56
    manifest = read_manifest(cut)
    assert (manifest.world_size, manifest.num_kv_heads, manifest.cache_heads) == (RANKS, 3, 2)


def test_preempted_requests_give_the_same_text(tmp_path: Path) -> None:
    with deployed(RANKS, tmp_path, "8MiB") as crowded:
        check(ask_together(crowded, PROMPTS[::3]))
        assert metric(crowded, "num_preemptions_total") > 0


def test_two_ranks_need_less_than_half_a_minute_to_start(tmp_path: Path) -> None:
    """Of processors and of waiting for each other; how long it takes says more of who else uses the machine.

    The rank that came last waited for nothing but the meeting itself.
    """
    deployment = standin_deployment(tmp_path, [on_ranks(RANKS, "128MiB")])
    try:
        launcher = psutil.Process(deployment.start_agents().pid)
        ranks = agents_of(deployment)
        busy = [sum(process.cpu_times()[:2]) for process in (launcher, *ranks)]  # user and system, in seconds
        logs = [path.read_text(encoding="utf-8") for path in tmp_path.glob("logs/agent-*.log")]
        meetings = [float(seconds) for log in logs for seconds in re.findall(r"met the others after ([\d.]+) s", log)]
        assert len(ranks) == len(meetings) == RANKS
        assert busy[0] + max(busy[1:]) + min(meetings) < START_SECONDS
    finally:
        deployment.stop()


@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_write_the_text_of_one(ranks: int, tmp_path: Path) -> None:
    with deployed(ranks, tmp_path, "128MiB") as started:
        check(ask_together(started, PROMPTS[::3]))
        assert len(agents_of(started)) == ranks


def agents_of(deployment: Serving) -> list[psutil.Process]:
    """The processes of its agents."""
    assert deployment.agents is not None
    return [process for process in deployment.agents.children() if process.cmdline()[-2:] == ["-m", "agent"]]


def member(deployment: Serving, name: str) -> psutil.Process:
    """The process of a rank by its number, or the ``rendezvous``."""
    assert deployment.agents is not None
    roles = [(process, process.environ()) for process in deployment.agents.children()]
    [found] = [
        process
        for process, role in roles
        if name == role.get("MS_NODE_ID") or (name == "rendezvous" and role.get("MS_ROLE") == "MS_SCHED")
    ]
    return found


@pytest.mark.parametrize(
    ("name", "number"),
    [("0", signal.SIGKILL), ("rendezvous", signal.SIGKILL), ("1", signal.SIGSTOP)],
    ids=["rank 0 is killed", "the rendezvous is killed", "rank 1 is stopped"],
)
def test_a_lost_process_is_a_pause(deployment: Serving, name: str, number: signal.Signals) -> None:
    """All processes of the group are started again, and no text changes."""
    everyone = {member(deployment, one).pid for one in ("0", "1", "rendezvous")}
    prompts = PROMPTS[:6]
    with ThreadPoolExecutor(len(prompts)) as threads:
        asked = [threads.submit(ask, deployment.client(), prompt) for prompt in prompts]
        eventually(lambda: metric(deployment, "num_requests_running") == len(prompts))
        member(deployment, name).send_signal(number)
        check([answer.result() for answer in asked])
    assert everyone.isdisjoint(member(deployment, one).pid for one in ("0", "1", "rendezvous"))
    eventually(lambda: metric(deployment, "kv_cache_usage_perc") == 0)
    assert deployment.client().get("/health/ready").status_code == 200


def test_nothing_outlives_the_launcher(tmp_path: Path) -> None:
    """Killed in the middle of steps, with ranks that wait for each other."""
    body = {"inputs": PROMPTS[2], "parameters": {"max_new_tokens": 1000, "ignore_eos": True}}
    with deployed(RANKS, tmp_path, "128MiB") as started:
        assert started.agents is not None
        children = started.agents.children()
        with started.client().stream("POST", "/models/llama2/generate_stream", json=body) as response:
            pieces = response.iter_raw()
            next(pieces)
            started.agents.send(signal.SIGKILL)
            left = psutil.wait_procs(children, timeout=STOP_SECONDS)[1]
            assert left == [], [process.cmdline() for process in left]


def test_ranks_that_are_sent_different_steps_start_anew(deployment: Serving) -> None:
    """As when the app dies between sending a plan to one rank and to the next. It is dead for the tests that follow."""
    assert deployment.app is not None
    assert deployment.agents is not None
    deployment.app.send(signal.SIGKILL)
    deployment.app.wait()
    config = load(deployment.config_path)
    model = config.models[0]
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(attached(port, config.secret_path(model))) for port in model.agent_ports]
        for rank, client in enumerate(ranks):
            request = Sequenced(0, [1, 2, 3 + rank], [1])
            client.send(make_plan([request.row()], resets=[request.reset()]))
        for client in ranks:
            answer = client.receive()
            assert isinstance(answer, StepError)
            assert "were sent different steps" in answer.message
    deployment.agents.wait_for(" exited with code ")  # 1 of a rank, or 0 of the rendezvous that they left
