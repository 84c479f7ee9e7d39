"""Several groups of agents behind one server: who gets a request, and what becomes of it when they are lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scripted_agent import HELLO, ScriptedAgent, listening, server_of

from server.agent_group import AgentsRefused
from server.errors import NotServing, ServingError
from server.llm_server import LLMServer
from server.metrics import Metrics
from server.request import GenerationParams
from server.request_stream import RequestStream

SEATS = HELLO.max_num_seqs
FIVE = GenerationParams(max_new_tokens=5)
OTHER = msgspec.structs.replace(HELLO, num_blocks=50)  # which is no reason to refuse a group, but one that comes back
UNLIKE = msgspec.structs.replace(HELLO, max_num_seqs=SEATS - 1)

Main = Callable[[LLMServer, list[ScriptedAgent]], Awaitable[None]]


def run(
    folder: Path,
    agents: Sequence[ScriptedAgent],
    main: Main,
    *,
    away: int = 0,
    metrics: Metrics | None = None,
    **limits: Any,
) -> None:
    """Do ``main`` with a server of these groups, when all have come but the last ``away``."""

    async def whole() -> None:
        async with contextlib.AsyncExitStack() as stack:
            ports = [await stack.enter_async_context(listening(agent)) for agent in agents]
            for agent in agents[len(agents) - away :]:
                agent.going.clear()
            server = server_of(folder, ports, metrics, **limits)
            stack.push_async_callback(server.stop)
            await server.start()
            await until(lambda: sum(replica.ready for replica in server.replicas) == len(agents) - away)
            await main(server, list(agents))

    asyncio.run(whole())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("did not happen within 30 s")


async def submit(server: LLMServer, count: int, prompt: str = "hi") -> list[RequestStream]:
    return [await server.submit(prompt, FIVE) for _ in range(count)]


async def texts(streams: Sequence[RequestStream]) -> set[str]:
    return {(await stream.collect()).text for stream in streams}


def unfinished(server: LLMServer) -> list[int]:
    """Requests of each group."""
    return [replica.num_running + replica.num_waiting for replica in server.replicas]


def hold(agents: Sequence[ScriptedAgent]) -> None:
    """Let steps wait."""
    for agent in agents:
        agent.going.clear()


def test_requests_are_spread_and_counted(tmp_path: Path) -> None:
    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        hold(agents)
        streams = await submit(server, 6)
        assert unfinished(server) == [2, 2, 2]
        await until(lambda: server.batch_size == 6)
        several = await server.submit_all("hi", FIVE, 3)
        assert sorted(unfinished(server)) == [2, 2, 5], "all answers to one prompt are in one group"
        for agent in agents:
            agent.going.set()
        assert await texts([*streams, *several]) == {"aaaaa"}
        assert unfinished(server) == [0, 0, 0]

    run(tmp_path, [ScriptedAgent(), ScriptedAgent(), ScriptedAgent()], main)


def test_the_queue_is_limited_for_all_groups_together(tmp_path: Path) -> None:
    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        hold(agents)
        streams = await submit(server, 2)
        await until(lambda: server.batch_size == 2)
        streams += await submit(server, 2)
        assert (server.num_waiting, [replica.num_waiting for replica in server.replicas]) == (2, [1, 1])
        with pytest.raises(ServingError, match="2 requests are waiting already"):
            await submit(server, 1)
        for agent in agents:
            agent.going.set()
        assert await texts(streams) == {"aaaaa"}

    run(tmp_path, [ScriptedAgent(), ScriptedAgent()], main, max_num_seqs=1, max_waiting=2)


def test_a_request_goes_where_its_prefix_is_cached(tmp_path: Path) -> None:
    prompt, metrics = "a prompt of several blocks, " * 8, Metrics()

    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        hold(agents[:1])
        other = await submit(server, 1)
        assert await texts(await submit(server, 1, prompt)) == {"aaaaa"}, "the first group was busy"
        agents[0].going.set()
        assert await texts(other) == {"aaaaa"}
        assert metrics.total("prefix_cache_hits", "llama2") == 0
        hold(agents)
        streams = await submit(server, 1, prompt)
        assert unfinished(server) == [0, 1], "both are idle, and the second one knows the prompt"
        agents[1].going.set()
        assert await texts(streams) == {"aaaaa"}
        assert metrics.total("prefix_cache_hits", "llama2") > 100

    run(tmp_path, [ScriptedAgent(), ScriptedAgent()], main, metrics=metrics)


def test_what_waits_for_lost_agents_goes_on_elsewhere_and_what_ran_waits(tmp_path: Path) -> None:
    metrics = Metrics()

    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        hold(agents)
        streams = await submit(server, 2 * SEATS + 4)
        await until(lambda: server.batch_size == 2 * SEATS)
        agents[0].leave()
        await until(lambda: unfinished(server) == [SEATS, SEATS + 4])
        assert server.ready
        assert metrics.total("requests_moved", "llama2") == 2
        agents[1].going.set()
        await until(lambda: unfinished(server) == [SEATS, 0])
        assert await texts(await submit(server, 3)) == {"aaaaa"}, "new requests do not wait for those that are away"
        agents[0].going.set()
        assert await texts(streams) == {"aaaaa"}

    run(tmp_path, [ScriptedAgent(), ScriptedAgent()], main, metrics=metrics)


def test_who_comes_back_first_takes_what_waits(tmp_path: Path) -> None:
    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        hold(agents)
        for agent in agents:
            agent.leave()
        await until(lambda: not server.ready)
        streams = await submit(server, 4)
        assert unfinished(server) == [2, 2]
        agents[1].going.set()
        assert await texts(streams) == {"aaaaa"}
        assert [replica.ready for replica in server.replicas] == [False, True]

    run(tmp_path, [ScriptedAgent(), ScriptedAgent()], main)


def test_agents_that_are_given_up_leave_all_their_requests_to_others(tmp_path: Path) -> None:
    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        hold(agents)
        streams = await submit(server, 4)
        await until(lambda: server.batch_size == 4)
        agents[0].leave()
        agents[0].going.set()  # with another greeting
        await until(lambda: unfinished(server) == [0, 4])
        agents[1].going.set()
        assert await texts(streams) == {"aaaaa"}
        assert await texts(await submit(server, 2)) == {"aaaaa"}

    run(tmp_path, [ScriptedAgent(hellos=[HELLO, OTHER]), ScriptedAgent()], main)


def test_a_request_that_has_moved_can_be_aborted(tmp_path: Path) -> None:
    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        hold(agents)
        streams = await submit(server, 2 * SEATS + 1)
        agents[0].leave()
        await until(lambda: unfinished(server) == [SEATS, SEATS + 1])
        streams[-1].abort()
        assert unfinished(server) == [SEATS, SEATS]
        assert (await streams[-1].collect()).finish_reason == "abort"

    run(tmp_path, [ScriptedAgent(), ScriptedAgent()], main)


def test_the_first_group_serves_and_the_second_joins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        assert await texts(await submit(server, 2)) == {"aaaaa"}
        [_, second] = server.replicas
        assert second.agents.place not in caplog.text
        agents[1].going.set()
        await until(lambda: second.ready)
        assert f"the agents at {second.agents.place} have 50 cache blocks, context 784" in caplog.text
        assert server.max_model_len == 784, "what any group can take"
        hold(agents)
        streams = await submit(server, 2)
        assert unfinished(server) == [1, 1]
        for agent in agents:
            agent.going.set()
        assert await texts(streams) == {"aaaaa"}

    run(tmp_path, [ScriptedAgent(), ScriptedAgent(hellos=[OTHER])], main, away=1)


def test_a_group_unlike_the_others_is_refused_until_it_is_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.replicas.REFUSED_SECONDS", 0.05)

    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        agents[1].going.set()
        await until(lambda: "than those of the group that came first; restart the agents" in caplog.text)
        assert await texts(await submit(server, 3)) == {"aaaaa"}
        agents[1].hellos = [HELLO]
        await until(lambda: all(replica.ready for replica in server.replicas))

    run(tmp_path, [ScriptedAgent(), ScriptedAgent(hellos=[UNLIKE])], main, away=1)


def test_where_all_groups_are_refused_the_server_does_not_start(tmp_path: Path) -> None:
    wrong = msgspec.structs.replace(HELLO, manifest_digest="another")

    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        pytest.fail("it has started")

    with pytest.raises(AgentsRefused, match="another export"):
        run(tmp_path, [ScriptedAgent(hellos=[wrong]), ScriptedAgent(hellos=[wrong])], main)


def test_the_drain_waits_for_all_groups(tmp_path: Path) -> None:
    async def main(server: LLMServer, agents: list[ScriptedAgent]) -> None:
        hold(agents)
        streams = await submit(server, 4)
        await until(lambda: server.batch_size == 4)
        stopping = asyncio.create_task(server.stop(600))
        await asyncio.sleep(0)
        with pytest.raises(NotServing, match="is stopping"):
            await submit(server, 1)
        agents[0].going.set()
        await until(lambda: unfinished(server) == [0, 2])
        assert not stopping.done()
        agents[1].going.set()
        await stopping
        assert await texts(streams) == {"aaaaa"}

    run(tmp_path, [ScriptedAgent(), ScriptedAgent()], main)
