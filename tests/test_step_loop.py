"""The step loop against an agent that misbehaves on purpose: a scripted peer on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scripted_agent import HELLO, ScriptedAgent, letters, run

from agent.protocol import Message, Replaced, StepError, StepOutput, StepPlan
from server.answer import Answer
from server.errors import GenerationFailed, NotServing
from server.llm_server import LLMServer
from server.request import GenerationParams
from server.request_stream import Increment
from server.scheduler import Scheduler


async def generate(server: LLMServer) -> Increment:
    return await (await server.submit("hi", GenerationParams(max_new_tokens=5))).collect()


async def fails(server: LLMServer) -> None:
    with pytest.raises(GenerationFailed, match="under request"):
        await generate(server)


def test_a_step_error_ends_the_request_and_keeps_the_connection(tmp_path: Path) -> None:
    agent = ScriptedAgent(replies=[letters, lambda plan: StepError(step_id=plan.step_id, message="no")])

    async def main(server: LLMServer) -> None:
        await fails(server)
        assert (await generate(server)).text == "aaaaa"
        assert agent.connections == 1

    run(tmp_path, agent, main)


def test_a_step_error_may_be_the_last_word_of_an_agent(tmp_path: Path) -> None:
    """As when an operator fails, after which MindSpore runs nothing any more; the next step is on its way already."""
    error = [letters, lambda plan: StepError(step_id=plan.step_id, message="broken"), lambda plan: None]
    agent = ScriptedAgent(replies=error)

    async def main(server: LLMServer) -> None:
        assert (await generate(server)).text == "aaaaa"
        assert agent.connections == 2

    run(tmp_path, agent, main)


def too_few(plan: StepPlan) -> StepOutput:
    return StepOutput(step_id=plan.step_id, token_ids=b"")


def no_numbers(plan: StepPlan) -> StepOutput:
    return StepOutput(step_id=plan.step_id, token_ids=b"abc")


@pytest.mark.parametrize("reply", [too_few, no_numbers])
def test_an_answer_that_cannot_be_taken_over_is_asked_for_again(
    tmp_path: Path, reply: Callable[[StepPlan], StepOutput]
) -> None:
    agent = ScriptedAgent(replies=[letters, reply])

    async def main(server: LLMServer) -> None:
        assert (await generate(server)).text == "aaaaa"
        assert agent.connections == 2, "what else is on that connection is not known"

    run(tmp_path, agent, main)


def test_a_request_whose_answers_cannot_be_taken_over_fails_at_the_third(tmp_path: Path) -> None:
    agent = ScriptedAgent(replies=[letters, *[too_few] * 20])

    async def main(server: LLMServer) -> None:
        await fails(server)
        agent.replies.clear()
        assert (await generate(server)).text == "aaaaa"
        assert agent.connections == 4

    run(tmp_path, agent, main)


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(lambda plan: None, id="closed"),
        pytest.param(lambda plan: letters(msgspec.structs.replace(plan, step_id=99)), id="another step"),
        pytest.param(lambda plan: HELLO, id="another message"),
    ],
)
def test_a_connection_that_breaks_costs_no_answer(tmp_path: Path, reply: Callable[[StepPlan], Message | None]) -> None:
    agent = ScriptedAgent(replies=[letters, letters, reply])

    async def main(server: LLMServer) -> None:
        whole = await generate(server)
        assert (whole.text, whole.finish_reason) == ("aaaaa", "length")
        assert len(whole.tokens) == 5
        assert agent.connections == 2

    run(tmp_path, agent, main)


def test_agents_that_come_back_different_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.step_loop.REFUSED_SECONDS", 0.2)
    smaller = msgspec.structs.replace(HELLO, num_blocks=50)
    agent = ScriptedAgent(hellos=[HELLO, smaller, HELLO], replies=[letters, lambda plan: None])

    async def main(server: LLMServer) -> None:
        await fails(server)
        assert "came back with another model" in caplog.text
        with pytest.raises(NotServing, match="do not answer"):
            await generate(server)
        for _ in range(3000):
            if server.ready:
                break
            await asyncio.sleep(0.01)
        assert (await generate(server)).text == "aaaaa"
        assert agent.connections == 3

    run(tmp_path, agent, main)


def test_stopping_in_the_moment_in_which_work_arrives(tmp_path: Path) -> None:
    async def main(server: LLMServer) -> None:
        await generate(server)
        for _ in range(10):
            await asyncio.sleep(0)  # the loop is idle then
        (await server.submit("hi", GenerationParams(max_new_tokens=5))).abort()
        await asyncio.wait_for(server.stop(), 30)

    run(tmp_path, ScriptedAgent(), main)


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("broken")


def test_a_scheduler_that_breaks_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(server: LLMServer) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "schedule", broken)
            patch.setattr(Scheduler, "finish", broken)
            await fails(server)
        assert (await generate(server)).text == "aaaaa"

    run(tmp_path, ScriptedAgent(), main)


def test_an_answer_whose_text_raises_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = ScriptedAgent()
    add_token = Answer.add_token

    def first_raises(answer: Answer, *arguments: Any) -> Any:
        if answer.request.request_id == "bad":
            raise RuntimeError("broken")
        return add_token(answer, *arguments)

    monkeypatch.setattr(Answer, "add_token", first_raises)

    async def main(server: LLMServer) -> None:
        params = GenerationParams(max_new_tokens=5)
        streams = [await server.submit("hi", params, request_id=name) for name in ("bad", "good")]
        with pytest.raises(GenerationFailed, match="under request"):
            await streams[0].collect()
        assert (await streams[1].collect()).text == "aaaaa"
        assert agent.connections == 1

    run(tmp_path, agent, main)


def test_a_loss_that_cannot_be_seen_to_costs_requests_and_not_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = ScriptedAgent(replies=[letters, lambda plan: None])

    async def main(server: LLMServer) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "requeue", broken)
            await fails(server)
        assert (await generate(server)).text == "aaaaa"

    run(tmp_path, agent, main)


def test_a_loop_that_ends_ends_its_requests_and_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(server: LLMServer) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "schedule", broken)
            patch.setattr(Scheduler, "__init__", broken)
            await fails(server)
        assert not server.ready
        with pytest.raises(NotServing):
            await generate(server)

    run(tmp_path, ScriptedAgent(), main)


def test_requests_queue_while_the_agents_are_away(tmp_path: Path) -> None:
    agent = ScriptedAgent(replies=[letters, lambda plan: None])

    async def main(server: LLMServer) -> None:
        first = await server.submit("hi", GenerationParams(max_new_tokens=5))
        for _ in range(3000):
            if not server.ready:
                break
            await asyncio.sleep(0.001)
        second = await server.submit("hi", GenerationParams(max_new_tokens=5))
        assert [(await stream.collect()).text for stream in (first, second)] == ["aaaaa"] * 2

    run(tmp_path, agent, main)


def test_a_server_that_is_replaced_says_by_whom_and_holds_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agent = ScriptedAgent(replies=[letters, lambda plan: Replaced(pid=77)])

    async def main(server: LLMServer) -> None:
        first = await server.submit("hi", GenerationParams(max_new_tokens=5))
        for _ in range(3000):
            if "replaced by the server with pid 77" in caplog.text:
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("not said within 30 s")
        assert not server.ready
        first.abort()
        await server.stop()
        assert agent.connections == 1, "the agent is left alone for a while"

    run(tmp_path, agent, main)


def test_a_server_that_is_replaced_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.step_loop.TAKEN_SECONDS", 0.0)
    agent = ScriptedAgent(replies=[letters, lambda plan: Replaced(pid=77)])

    async def main(server: LLMServer) -> None:
        assert (await generate(server)).text == "aaaaa"
        assert agent.connections == 2

    run(tmp_path, agent, main)
