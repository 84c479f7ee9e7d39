"""LLMServer on real agent processes of the stand-in, whose answers can be computed without it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from serving_processes import ROOT, Serving, standin_deployment

from agent.arithmetic_model import BEGIN, END, answer
from agent.protocol import SamplingParams
from config.manifest import Capabilities, read_manifest, write_manifest
from config.serving_config import load
from server.errors import GenerationFailed, InvalidRequest, NotServing, Overloaded, ServingError
from server.llm_server import LLMServer
from server.metrics import Metrics
from server.request import GenerationParams
from server.request_stream import Increment, RequestStream

PROMPTS = [f"prompt number {i}" * (1 + i % 7) for i in range(32)]
REASONS = ("stop", "length", "abort", "error")
LONG = GenerationParams(ignore_eos=True, max_new_tokens=1500)  # runs until somebody ends it


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Agents with more cache than the tests need."""
    with agents(tmp_path_factory.mktemp("roomy")) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Agents with a step time, so that requests are still running when something happens to them."""
    with agents(tmp_path_factory.mktemp("slow"), step_seconds=0.01) as deployment:
        yield deployment


@contextlib.contextmanager
def agents(folder: Path, limits: dict[str, int] | None = None, **model: Any) -> Iterator[Serving]:
    deployment = standin_deployment(folder, [model], limits=limits or {})
    try:
        deployment.start_agents()
        yield deployment
    finally:
        deployment.stop()


@contextlib.asynccontextmanager
async def started(deployment: Serving, metrics: Metrics | None = None) -> AsyncIterator[LLMServer]:
    config = load(deployment.config_path)
    server = LLMServer(config.models[0], config, metrics)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


def run(deployment: Serving, main: Callable[[LLMServer], Awaitable[None]], metrics: Metrics | None = None) -> None:
    async def whole() -> None:
        async with started(deployment, metrics) as server:
            await main(server)

    asyncio.run(whole())


def greedy(max_new_tokens: int | None = None, **params: Any) -> GenerationParams:
    return GenerationParams(max_new_tokens=max_new_tokens, **params)


def by_hand(prompt: str, max_new_tokens: int) -> str:
    """The stand-in's answer, cut after so many tokens: bytes, with the begin of a character as U+FFFD."""
    return answer(prompt, max_new_tokens).encode()[:max_new_tokens].decode(errors="replace")


async def collect(server: LLMServer, prompt: str, params: GenerationParams) -> Increment:
    return await (await server.submit(prompt, params)).collect()


async def read(server: LLMServer, prompts: Sequence[str], params: GenerationParams) -> list[str]:
    answers = await asyncio.gather(*(collect(server, prompt, params) for prompt in prompts))
    return [whole.text for whole in answers]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in the server's own time."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("did not happen within 30 s")


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """The only sample of the series that has these labels."""
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    labels["model_name"] = "llama2"
    [value] = [s.value for s in samples if s.name == f"mindspore_llm_{name}" and labels.items() <= s.labels.items()]
    return value


def test_a_batch_answers_as_each_alone(roomy: Serving) -> None:
    async def main(server: LLMServer) -> None:
        assert await read(server, PROMPTS, greedy(200)) == [by_hand(prompt, 200) for prompt in PROMPTS]

    run(roomy, main)


def test_answers_to_one_prompt_compute_it_once(roomy: Serving) -> None:
    metrics = Metrics()
    sampled = greedy(30, sampling=SamplingParams(temperature=3.0, seed=7), ignore_eos=True)
    prompt = "one prompt for several answers, " * 5

    async def main(server: LLMServer) -> None:
        several = [(await stream.collect()).text for stream in await server.submit_all(prompt, sampled, 3)]
        tokens = len(await server.tokenize(prompt))
        assert value(metrics, "prefix_cache_hits_total") == 2 * (tokens - 1)
        assert len(set(several)) == 3
        for index, text in enumerate(several):
            seeded = msgspec.structs.replace(sampled.sampling, seed=7 + index)
            assert (await collect(server, prompt, dataclasses.replace(sampled, sampling=seeded))).text == text

    run(roomy, main, metrics)


def test_preempted_answers_as_undisturbed(tmp_path: Path) -> None:
    metrics = Metrics()

    async def main(server: LLMServer) -> None:
        prompts = [prompt[:100] for prompt in PROMPTS]
        expected = [by_hand(prompt, 150) for prompt in prompts]
        assert await read(server, prompts, greedy(150)) == expected
        assert await read(server, prompts[::-1], greedy(150)) == expected[::-1]

    with agents(tmp_path, cache_memory="4KiB") as deployment:  # 32 blocks of 16 tokens
        run(deployment, main, metrics)
    assert value(metrics, "num_preemptions_total") > 0
    assert value(metrics, "kv_cache_usage_perc") == 0


@pytest.mark.parametrize("graphs", [{"mixed_steps": False, "prompt_logits": False}, {"cached_context": False}], ids=str)
def test_graphs_that_can_do_less_answer_as_others(tmp_path: Path, graphs: dict[str, bool]) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "config/standin", model)
    write_manifest(model, msgspec.structs.replace(read_manifest(model), capabilities=Capabilities(**graphs)))

    async def main(server: LLMServer) -> None:
        assert await read(server, PROMPTS[:8], greedy(60)) == [by_hand(prompt, 60) for prompt in PROMPTS[:8]]
        with pytest.raises(InvalidRequest, match="context of 300" if "cached_context" in graphs else "context of 8192"):
            await collect(server, "x" * 8192, greedy(1))
        scored = greedy(1, prompt_logprobs=True)
        if "cached_context" in graphs:
            longest = await collect(server, [BEGIN, *b"x" * 256], scored)
            assert all(token.logprob is not None for token in longest.prompt_tokens[1:])
            with pytest.raises(InvalidRequest, match=r"the prompt has 258 tokens; .* score one of 257 at most"):
                await collect(server, [BEGIN, *b"x" * 257], scored)
        else:
            with pytest.raises(InvalidRequest, match="nothing of a prompt's own tokens"):
                await collect(server, "hi", scored)

    with agents(tmp_path, path=str(model), limits={"max_num_batched_tokens": 300}) as deployment:
        run(deployment, main)


def test_a_prompt_in_chunks_answers_as_in_one(tmp_path: Path) -> None:
    prompt = "one and two and three, " * 30

    async def main(server: LLMServer) -> None:
        running = asyncio.create_task(collect(server, "hi", greedy(100)))
        assert (await collect(server, prompt, greedy(60))).text == by_hand(prompt, 60)
        assert (await running).text == by_hand("hi", 100)

    with agents(tmp_path, limits={"max_num_batched_tokens": 16, "max_num_seqs": 4}) as deployment:
        run(deployment, main)


def test_increments_joined_are_the_whole_answer(roomy: Serving) -> None:
    async def main(server: LLMServer) -> None:
        for prompt in PROMPTS[:8]:
            stream = await server.submit(prompt, greedy(120))
            parts = [increment async for increment in stream]
            whole = await collect(server, prompt, greedy(120))
            assert "".join(part.text for part in parts) == whole.text == by_hand(prompt, 120)
            assert [token for part in parts for token in part.tokens] == list(whole.tokens)
            assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
            assert parts[-1].finish_reason == whole.finish_reason
            assert all("\ufffd" not in part.text for part in parts[:-1])

    run(roomy, main)


def test_how_answers_end(roomy: Serving) -> None:
    prompt, ended = "question 74", "br!es,中o"

    async def main(server: LLMServer) -> None:
        assert answer(prompt, 100) == ended
        whole = await collect(server, prompt, greedy())
        assert (whole.text, whole.finish_reason, whole.stop_kind) == (ended, "stop", "eos")
        assert whole.tokens[-1].token_id == END
        assert whole.tokens[-1].special
        whole = await collect(server, prompt, greedy(3))
        assert (whole.text, whole.finish_reason, whole.stop_kind) == (ended[:3], "length", "length")
        whole = await collect(server, prompt, greedy(stop=("never", ended[4:6])))
        assert (whole.text, whole.finish_reason, whole.stop_kind) == (ended[:4], "stop", "stop_string")
        assert len(whole.tokens) == 6
        whole = await collect(server, prompt, greedy(stop_token_ids=(ord(ended[2]),)))
        assert (whole.text, whole.finish_reason, whole.stop_kind) == (ended[:2], "stop", "stop_token")
        whole = await collect(server, prompt, greedy(60, ignore_eos=True))
        assert (len(whole.tokens), whole.finish_reason) == (60, "length")
        assert whole.text.startswith(ended)
        assert END in [token.token_id for token in whole.tokens]
        patient = SamplingParams(min_new_tokens=40)
        whole = await collect(server, prompt, greedy(60, sampling=patient))
        assert len(whole.tokens) > 40
        assert END not in [token.token_id for token in whole.tokens[:40]]

    run(roomy, main)


def test_a_prompt_is_text_or_tokens_and_can_be_truncated(roomy: Serving) -> None:
    async def main(server: LLMServer) -> None:
        stream = await server.submit("hi", greedy(5), "my-request")
        assert stream.request_id == "my-request"
        assert stream.prompt_ids == (BEGIN, *b"hi")
        assert (await stream.collect()).text == by_hand("hi", 5)
        stream = await server.submit([BEGIN, *b"hi"], greedy(5))
        assert (await stream.collect()).text == by_hand("hi", 5)
        stream = await server.submit("hi", greedy(5, add_special_tokens=False))
        assert stream.prompt_ids == tuple(b"hi")
        for truncate, kept in ((1, b""), (3, b"hi"), (9, b"ello, hi"), (10, b"hello, hi"), (99, b"hello, hi")):
            stream = await server.submit("hello, hi", greedy(5, truncate=truncate))
            assert stream.prompt_ids == (BEGIN, *kept), "the begin token stays in front"
        stream = await server.submit("hello, hi", greedy(5, truncate=2, add_special_tokens=False))
        assert stream.prompt_ids == tuple(b"hi")
        stream = await server.submit([BEGIN, *b"hello, hi"], greedy(5, truncate=2))
        assert stream.prompt_ids == tuple(b"hi")

    run(roomy, main)


def test_log_probabilities(roomy: Serving) -> None:
    """The stand-in's logits are 2 for the rule's token and fall by 0.5 from there."""
    scored = SamplingParams(logprobs=True, top_logprobs=3)
    prompt = "a long prompt, " * 40

    async def main(server: LLMServer) -> None:
        params = greedy(4, sampling=scored, prompt_logprobs=True, prompt_top_logprobs=2)
        neighbours = asyncio.gather(*(collect(server, other, params) for other in PROMPTS[:6]))
        stream = await server.submit(prompt, params)
        parts = [increment async for increment in stream]
        assert [bool(part.prompt_tokens) for part in parts] == [True] + [False] * (len(parts) - 1)
        tokens = parts[0].prompt_tokens
        assert tuple(token.token_id for token in tokens) == stream.prompt_ids
        assert tokens[0].logprob is None
        assert all(token.logprob is not None and token.logprob < 0 and len(token.top) == 2 for token in tokens[1:])
        after = [answer(prompt[:length], 1).encode()[0] for length in (5, 99)]
        assert [tokens[length + 1].top[0][0] for length in (5, 99)] == after
        for token in (token for part in parts for token in part.tokens):
            assert token.logprob == pytest.approx(token.top[0][1]) == pytest.approx(-0.1895, abs=1e-4)
            assert token.token_id == token.top[0][0]
            assert token.text == bytes([token.token_id]).decode(errors="replace")
            assert len(token.top) == 3
        for other in await neighbours:
            assert len(other.prompt_tokens) > 1
        plain = await collect(server, prompt, greedy(4))
        assert plain.prompt_tokens == ()
        assert [(token.logprob, token.top) for token in plain.tokens] == [(None, ())] * 4

    run(roomy, main)


def test_a_seed_decides_whatever_else_is_in_the_batch(roomy: Serving) -> None:
    def sampled(seed: int) -> GenerationParams:
        return greedy(60, sampling=SamplingParams(temperature=3.0, seed=seed), ignore_eos=True)

    async def main(server: LLMServer) -> None:
        alone = [(await collect(server, "hi", sampled(seed))).text for seed in (1, 2)]
        assert alone[0] != alone[1]
        noise = asyncio.gather(*(collect(server, prompt, sampled(9)) for prompt in PROMPTS))
        together = await asyncio.gather(*(collect(server, "hi", sampled(seed)) for seed in (1, 2)))
        assert [whole.text for whole in together] == alone
        await noise

    run(roomy, main)


def test_a_long_prompt_does_not_hold_up_the_others(roomy: Serving) -> None:
    async def main(server: LLMServer) -> None:
        submitting = asyncio.create_task(server.submit("long prompt " * 10_000, greedy(1, truncate=5)))
        turns = 0
        while not submitting.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 10
        assert (await submitting).prompt_ids == (BEGIN, *b"mpt ")

    run(roomy, main)


@pytest.mark.parametrize(
    ("prompt", "params", "field", "message"),
    [
        ("", greedy(), "prompt", "empty"),
        ([], greedy(), "prompt", "empty"),
        ("x" * 9000, greedy(), "prompt", "9001 tokens"),
        ([5, 261], greedy(), "prompt", "261"),
        ([-1], greedy(), "prompt", "-1"),
        ("hi", greedy(0), "max_new_tokens", "at least 1"),
        ("hi", greedy(8190), "max_new_tokens", "8189"),
        ("hi", greedy(5, sampling=SamplingParams(min_new_tokens=6)), "min_new_tokens", "5"),
        ("hi", greedy(stop_token_ids=(300,)), "stop_token_ids", "300"),
        ("hi", greedy(stop=("a", "")), "stop", "empty"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    roomy: Serving, prompt: str | list[int], params: GenerationParams, field: str, message: str
) -> None:
    async def main(server: LLMServer) -> None:
        with pytest.raises(InvalidRequest, match=message) as caught:
            await server.submit(prompt, params)
        assert caught.value.field == field
        assert server.num_waiting == 0

    run(roomy, main)


def test_a_default_length_is_cut_to_the_context(roomy: Serving) -> None:
    async def main(server: LLMServer) -> None:
        prompt = "x" * 8170
        whole = await collect(server, prompt, greedy(default_max_new_tokens=300, ignore_eos=True))
        assert (len(whole.tokens), whole.finish_reason) == (8192 - 8171, "length")
        whole = await collect(server, "hi", greedy(default_max_new_tokens=7, ignore_eos=True))
        assert len(whole.tokens) == 7

    run(roomy, main)


def test_a_client_that_leaves_frees_its_blocks(slow: Serving) -> None:
    metrics = Metrics()

    async def leave(stream: RequestStream) -> None:
        async for _ in stream:
            break

    async def main(server: LLMServer) -> None:
        streams = [await server.submit(prompt, LONG) for prompt in PROMPTS[:3]]
        await asyncio.gather(*map(leave, streams))
        assert value(metrics, "num_requests_running") == 3
        assert server.batch_size in (0, 3)  # 0 between two steps
        streams[0].abort()
        await streams[1].aclose()
        del streams
        gc.collect()
        await until(lambda: value(metrics, "kv_cache_usage_perc") == 0)
        assert value(metrics, "request_success_total", finished_reason="abort") == 3
        assert (await collect(server, "hi", greedy(5))).text == by_hand("hi", 5)

    run(slow, main, metrics)


def test_an_aborted_stream_ends(slow: Serving) -> None:
    async def main(server: LLMServer) -> None:
        stream = await server.submit("hi", LONG)
        first = await stream.__anext__()
        stream.abort()
        stream.abort()
        rest = await stream.collect()
        assert rest.finish_reason == "abort"
        assert by_hand("hi", 1500).startswith(first.text + rest.text)
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()

    run(slow, main)


def test_a_slow_client_finds_its_increments_joined(roomy: Serving) -> None:
    async def main(server: LLMServer) -> None:
        stream = await server.submit("hi", greedy(300, ignore_eos=True))
        await collect(server, "hi there", greedy(400, ignore_eos=True))
        parts = [increment async for increment in stream]
        assert len(parts) == 1
        assert len(parts[0].tokens) == 300

    run(roomy, main)


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    async def main(server: LLMServer) -> None:
        streams = [await server.submit(prompt, LONG) for prompt in PROMPTS[:1]]
        await until(lambda: server.num_waiting == 0)
        streams += [await server.submit(prompt, LONG) for prompt in PROMPTS[:2]]
        assert server.num_waiting == 2
        with pytest.raises(Overloaded) as caught:
            await server.submit("one too many", LONG)
        assert caught.value.retry_after > 0
        for stream in streams:
            stream.abort()
        assert (await collect(server, "hi", greedy(5))).text == by_hand("hi", 5)

    with agents(tmp_path, limits={"max_num_seqs": 1, "max_waiting": 2}, step_seconds=0.01) as deployment:
        run(deployment, main)


def test_prompts_in_tokenization_count_as_waiting(roomy: Serving) -> None:
    async def main(server: LLMServer) -> None:
        params = greedy(1, truncate=5)
        submitting = [asyncio.create_task(server.submit("long prompt " * 10_000, params)) for _ in range(1100)]
        answers = await asyncio.gather(*submitting[1024:], return_exceptions=True)
        assert [type(answer) for answer in answers] == [Overloaded] * (1100 - 1024)
        assert not any(task.done() and task.exception() for task in submitting[:1024])
        for task in submitting:
            task.cancel()
        await asyncio.gather(*submitting, return_exceptions=True)
        assert (await collect(server, "hi", greedy(5))).text == by_hand("hi", 5)

    run(roomy, main)


def test_two_servers_on_the_same_agents_do_not_take_turns(roomy: Serving, caplog: pytest.LogCaptureFixture) -> None:
    async def main(first: LLMServer) -> None:
        assert (await collect(first, "hi", greedy(5))).text == by_hand("hi", 5)
        async with started(roomy) as second:
            await until(lambda: not first.ready)
            assert await read(second, PROMPTS, greedy(50)) == [by_hand(prompt, 50) for prompt in PROMPTS]
            assert second.ready
            await until(lambda: f"replaced by the server with pid {os.getpid()}" in caplog.text)  # at its next probe

    run(roomy, main)


def test_agents_that_die_cost_a_pause_and_no_answer(tmp_path: Path) -> None:
    """Killed in the middle, they are started again, and every answer goes on where it was."""
    metrics = Metrics()
    prompts = PROMPTS[:12]

    async def main(server: LLMServer) -> None:
        running = asyncio.gather(*(collect(server, prompt, greedy(150, ignore_eos=True)) for prompt in prompts))
        sampled = greedy(150, sampling=SamplingParams(temperature=3.0, seed=5), ignore_eos=True)
        drawn = asyncio.create_task(collect(server, "hi", sampled))
        await until(lambda: value(metrics, "generation_tokens_total") > 300)
        agent.kill()
        await until(lambda: not server.ready)
        late = asyncio.create_task(collect(server, "late", greedy(20)))
        assert [whole.text for whole in await running] == expected
        assert (await late).text == by_hand("late", 20)
        assert server.ready
        assert (await drawn).text == (await collect(server, "hi", sampled)).text
        assert value(metrics, "kv_cache_usage_perc") == 0

    async def undisturbed(server: LLMServer) -> None:
        nonlocal expected
        expected = await read(server, prompts, greedy(150, ignore_eos=True))

    expected: list[str] = []
    with agents(tmp_path, step_seconds=0.01) as deployment:
        assert deployment.agents
        (agent,) = [child for child in deployment.agents.children() if child.children() == []]
        assert isinstance(agent, psutil.Process)
        run(deployment, undisturbed)
        run(deployment, main, metrics)
    assert value(metrics, "agent_connections_lost_total") == 1
    reasons = {reason: value(metrics, "request_success_total", finished_reason=reason) for reason in REASONS}
    assert reasons["stop"] + reasons["length"] == 15
    assert reasons["abort"] == reasons["error"] == 0


def test_a_step_that_cannot_be_run_ends_its_requests_alone(slow: Serving) -> None:
    async def main(server: LLMServer) -> None:
        # The edge lets no such value through; the agent refuses the plan that brings it.
        impossible = greedy(5, prompt_logprobs=True, prompt_top_logprobs=1_000_000)
        with pytest.raises(ServingError) as caught:
            await collect(server, "hi", impossible)
        assert isinstance(caught.value, GenerationFailed)
        assert (await collect(server, "hi", greedy(5))).text == by_hand("hi", 5)

    run(slow, main)


@pytest.mark.slow
def test_stopping_lets_answers_finish_within_the_time(slow: Serving) -> None:
    async def main(server: LLMServer) -> None:
        short = asyncio.create_task(collect(server, "hi", greedy(10)))
        long = asyncio.create_task(collect(server, "hi", LONG))
        await until(lambda: server.batch_size == 2)
        stopping = asyncio.create_task(server.stop(drain_seconds=3))
        await asyncio.sleep(0)
        with pytest.raises(NotServing):
            await server.submit("too late", greedy())
        assert not server.ready
        await stopping
        assert (await short).text == by_hand("hi", 10)
        assert (await long).finish_reason == "abort"

    run(slow, main)


def test_a_second_stop_ends_at_once(slow: Serving) -> None:
    async def main(server: LLMServer) -> None:
        long = asyncio.create_task(collect(server, "hi", LONG))
        await until(lambda: server.batch_size == 1)
        stopping = asyncio.create_task(server.stop(drain_seconds=600))
        await asyncio.sleep(0)
        await server.stop()
        await stopping
        assert (await long).finish_reason == "abort"

    run(slow, main)


def test_before_the_agents_are_there_nothing_is_accepted(tmp_path: Path) -> None:
    async def main() -> None:
        config = load(standin_deployment(tmp_path).config_path)
        server = LLMServer(config.models[0], config)
        starting = asyncio.create_task(server.start())
        await asyncio.sleep(0)
        with pytest.raises(NotServing, match="waits for its agents"):
            await server.submit("hi", greedy())
        assert not server.ready
        starting.cancel()
        await asyncio.wait([starting])
        await server.stop()

    asyncio.run(main())


@pytest.mark.slow
def test_idle_agents_are_asked_for_a_sign_of_life(roomy: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.step_loop.PROBE_SECONDS", 0.02)
    monkeypatch.setattr("server.step_loop.READY_SECONDS", 2.0)
    assert roomy.agents
    (agent,) = [child for child in roomy.agents.children() if child.children() == []]

    async def main(server: LLMServer) -> None:
        await asyncio.sleep(2.5)  # idle for longer than an answer counts as a sign
        assert server.ready
        agent.suspend()
        try:
            await until(lambda: not server.ready)
        finally:
            agent.resume()
        await until(lambda: server.ready)

    run(roomy, main)
