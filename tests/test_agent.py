"""The agent's loop and door, through a real process on the stand-in, and its answer to a model that fails."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from agent_client import AgentClient, attached
from serving_processes import Serving, standin_deployment
from step_plans import PlanRow, Sequenced, make_plan

from agent.agent import Agent
from agent.arithmetic_model import BEGIN, END, ArithmeticModel, answer
from agent.listener import MAX_HANDSHAKES, Listener
from agent.logits import Logits
from agent.protocol import (
    GREETING,
    HEADER,
    LATEST_TOKEN,
    Attach,
    Hello,
    Replaced,
    SamplingParams,
    StepError,
    StepOutput,
    StepPlan,
    floats,
    ints,
    pack_ints,
)
from agent.runner import RunnerBroken
from agent.step_batch import StepBatch
from config.free_ports import free_ports
from config.manifest import read_manifest
from config.serving_config import LimitsConfig

FOLDER = Path(__file__).parent.parent / "config" / "standin"
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 256}


class RunningAgent:
    """One agent process that a test can take."""

    def __init__(self, deployment: Serving, port: int) -> None:
        self.deployment = deployment
        self.port = port
        self.secret_file = deployment.config_path.parent / "logs" / f"agents-{port}.secret"

    def attach(self) -> AgentClient:
        return attached(self.port, self.secret_file)

    def connect(self, secret: bytes | None = None) -> AgentClient:
        return AgentClient(self.port, self.secret_file.read_bytes() if secret is None else secret)


def start(folder: Path, **model: object) -> RunningAgent:
    deployment = standin_deployment(folder, [model], limits=LIMITS)
    deployment.start_agents()
    assert deployment.agents
    port = int(deployment.agents.lines[0].split(":")[1].split()[0])
    return RunningAgent(deployment, port)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    running = start(tmp_path_factory.mktemp("agent"))
    yield running
    running.deployment.stop()


def prompt(text: str, seat: int = 0, blocks: list[int] | None = None, **params: object) -> Sequenced:
    tokens = [BEGIN, *text.encode()]
    return Sequenced(seat, tokens, blocks or [1, 2, 3, 4], SamplingParams(**params))  # type: ignore[arg-type]


def generate(client: AgentClient, requests: list[Sequenced], steps: int) -> None:
    """Decode all requests together; each takes its seat in the first step."""
    for step in range(steps):
        resets = [request.reset() for request in requests] if step == 0 else []
        tokens = client.tokens(make_plan([request.row() for request in requests], step_id=step, resets=resets))
        for request, token in zip(requests, tokens, strict=True):
            request.tokens.append(token)


def text(request: Sequenced) -> str:
    output = [*request.output, END]
    return bytes(output[: output.index(END)]).decode(errors="ignore")


def test_hello_says_what_the_manifest_and_the_configuration_say(agent: RunningAgent) -> None:
    with agent.connect() as client:
        hello = client.attach()
    manifest = read_manifest(FOLDER)
    assert hello == Hello(
        model="standin",
        target="standin",
        rank=0,
        world_size=1,
        manifest_digest=manifest.digest(),
        num_blocks=(4 << 20) // 128,
        block_size=manifest.block_size,
        vocab_size=manifest.vocab_size,
        context_length=manifest.context_length,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        capabilities=manifest.capabilities,
        cache_dtype="int32",
        pid=hello.pid,
    )
    assert psutil.pid_exists(hello.pid)


def test_rows_of_a_batch_get_their_own_answers(agent: RunningAgent) -> None:
    texts = ["hi", "The quick brown fox", "中"]
    requests = [prompt(one, seat, [10 * seat + place for place in range(1, 9)]) for seat, one in enumerate(texts)]
    with agent.attach() as client:
        generate(client, requests, 40)
    for one, request in zip(texts, requests, strict=True):
        assert text(request) == answer(one, len(text(request)))
        assert len(request.output) == 40


def test_seeded_sampling_does_not_depend_on_neighbours(agent: RunningAgent) -> None:
    settings = {"temperature": 2.0, "top_k": 40, "seed": 11}
    alone, first, second = prompt("hi", **settings), prompt("hi", 5, **settings), prompt("ho", 6, [5, 6, 7, 8])
    with agent.attach() as client:
        generate(client, [alone], 20)
        generate(client, [second, first], 20)
    assert first.output == alone.output
    assert second.output != alone.output


def test_log_probabilities(agent: RunningAgent) -> None:
    """The stand-in's logits are known: 2 for its token, then falling by 0.5 along the vocabulary."""
    request = prompt("hi", logprobs=True, top_logprobs=2)
    plan = make_plan([request.row()], resets=[request.reset()], top=3)
    tokens = request.tokens
    row = PlanRow(1, tokens, 0, [5], sampled=False, known={0: tokens[1], 1: tokens[2]})
    known = make_plan([row], top=3)
    with agent.attach() as client:
        output, prompts = client.run(plan), client.run(known)
    normalizer = np.log(np.exp(2.0) + np.exp(-0.5 * np.arange(1, 261)).sum())
    [token] = ints(output.token_ids)
    assert ints(output.top_ids).tolist() == [token, token + 1]
    np.testing.assert_allclose(floats(output.logprobs), [2 - normalizer], atol=1e-5)
    np.testing.assert_allclose(floats(output.top_logprobs), [2 - normalizer, -0.5 - normalizer], atol=1e-5)
    assert output.prompt_logprobs == output.prompt_top_ids == b""
    assert floats(prompts.prompt_logprobs).shape == (2,)
    assert ints(prompts.prompt_top_ids).shape == (6,)
    assert (np.diff(floats(prompts.prompt_top_logprobs).reshape(2, 3)) < 0).all()
    assert prompts.token_ids == prompts.logprobs == b""


def test_a_bad_plan_is_refused_and_the_agent_serves_on(agent: RunningAgent) -> None:
    request = prompt("hi")
    good = make_plan([request.row()], resets=[request.reset()])
    with agent.attach() as client:
        for field in ("token_ids", "block_tables", "slot_mapping", "context_lens", "seats", "logits_indices"):
            bad = msgspec.structs.replace(good, **{field: pack_ints([2**31 - 1])})
            assert "refused" in client.refused(bad)
        assert "token_ids: 2147483647 is outside 0 … 260" in client.refused(
            msgspec.structs.replace(good, token_ids=pack_ints([256, 104, 2**31 - 1]))
        )
        assert client.tokens(good) == [ord("d")]


def test_a_seat_has_to_be_taken(agent: RunningAgent) -> None:
    with agent.attach() as client:
        assert "holds no request" in client.refused(make_plan([prompt("hi").row()]))


def test_a_new_server_takes_over_and_the_agent_forgets_the_old_one(agent: RunningAgent) -> None:
    old_request, request = prompt("hi", seat=2), prompt("hi", seat=2)
    with agent.attach() as old:
        generate(old, [old_request], 3)
        with agent.attach() as new:
            assert old.receive() == Replaced(pid=1)
            assert old.is_closed()
            assert "holds no request" in new.refused(make_plan([old_request.row()]))
            generate(new, [request], 20)
    assert text(request) == answer("hi", len(text(request)))


def test_strangers_do_not_disturb_the_server(agent: RunningAgent) -> None:
    request = prompt("hi")
    with agent.attach() as client:
        generate(client, [request], 1)
        strangers = [socket.create_connection(("127.0.0.1", agent.port)) for _ in range(MAX_HANDSHAKES - 8)]
        http = socket.create_connection(("127.0.0.1", agent.port))
        http.sendall(b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n")
        with agent.connect(secret=b"w" * 32) as guess:
            guess.greet()
            guess.send(Attach(pid=1))
            assert guess.is_closed()
        with agent.connect() as announcer:
            announcer.greet()
            announcer.socket.sendall(HEADER.pack(1 << 30, bytes(16)))
            assert announcer.is_closed()
        with agent.connect() as impatient:
            impatient.greet()
            impatient.send(StepError(step_id=0, message="not an Attach"))
            assert impatient.is_closed()
        for _ in range(20):
            request.tokens += client.tokens(make_plan([request.row()]))
        with agent.attach() as newcomer:  # while strangers still wait
            generate(newcomer, [prompt("hi")], 2)
        for stranger in [*strangers, http]:
            stranger.close()
    assert text(request) == answer("hi", len(text(request)))


def test_a_slow_stranger_is_turned_away(agent: RunningAgent) -> None:
    """One that greets and then says nothing is closed in time, without a server's help."""
    with agent.connect() as stranger:
        stranger.greet()
        assert stranger.is_closed()


def test_too_many_strangers_are_turned_away_at_once(agent: RunningAgent) -> None:
    with agent.attach() as client:
        strangers = [socket.create_connection(("127.0.0.1", agent.port)) for _ in range(MAX_HANDSHAKES + 1)]
        for stranger in strangers:
            stranger.settimeout(30)
        assert strangers[-1].recv(GREETING.size) == b""
        generate(client, [prompt("hi")], 2)
        for stranger in strangers:
            stranger.close()
    while not admits(agent):  # until it has seen that they left: the next test's client is no stranger
        pass


def admits(agent: RunningAgent) -> bool:
    """Whether the agent takes one more server. Its place at the door is free again when it has answered."""
    try:
        with agent.attach():
            return True
    except (EOFError, ConnectionResetError):
        return False


@pytest.mark.parametrize("message", [Attach(pid=1), StepError(step_id=1, message="")])
def test_a_server_that_talks_nonsense_is_dropped_and_the_next_one_served(
    agent: RunningAgent, message: Attach | StepError
) -> None:
    with agent.attach() as client:
        client.send(message)
        assert client.is_closed()
    with agent.attach() as client:
        generate(client, [prompt("hi")], 1)


def test_a_frame_that_is_not_authentic_ends_the_connection(agent: RunningAgent) -> None:
    with agent.attach() as client:
        frame = bytearray(client.channel.seal(make_plan([prompt("hi").row()])))
        frame[-1] ^= 1
        client.socket.sendall(frame)
        assert client.is_closed()


class PausingModel(ArithmeticModel):
    """Waits in the middle of a step until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__(FOLDER, cache_bytes=1 << 16)
        self.working, self.resume = threading.Event(), threading.Event()

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        self.working.set()
        assert self.resume.wait(30)
        return super().run(batch)


def test_it_finishes_its_step_when_told_to_stop() -> None:
    model, [port] = PausingModel(), free_ports(1)
    listener = Listener("127.0.0.1", port, b"s" * 32)
    agent = Agent(model, LimitsConfig(), rank=0, world_size=1)
    serving = threading.Thread(target=agent.serve, args=(listener,))
    serving.start()
    with AgentClient(port, b"s" * 32) as client:
        client.attach()
        request = prompt("hi")
        client.send(make_plan([request.row()], resets=[request.reset()]))
        assert model.working.wait(30)
        listener.close()  # what SIGTERM does
        model.resume.set()
        output = client.receive()
        assert isinstance(output, StepOutput)
        assert ints(output.token_ids).tolist() == [ord("d")]
        assert client.is_closed()
    serving.join(30)
    assert not serving.is_alive()


class DisagreeingModel(ArithmeticModel):
    """One rank of several, as if another were given another step at the third."""

    def __init__(self) -> None:
        super().__init__(FOLDER, cache_bytes=1 << 16)
        self.digests: list[bytes] = []

    def agree(self, digest: bytes) -> None:
        self.digests.append(digest)
        if len(self.digests) == 3:
            raise RunnerBroken("rank 1 runs another step")


def test_ranks_agree_on_a_step_with_the_latest_tokens_before_they_run_it() -> None:
    model, other = DisagreeingModel(), DisagreeingModel()
    agents = [Agent(runner, LimitsConfig(), rank=rank, world_size=2) for rank, runner in enumerate((model, other))]
    request, another = prompt("hi"), prompt("ho")
    latest = make_plan([PlanRow(0, [LATEST_TOKEN], 3, request.blocks)], step_id=2)
    for agent, started in zip(agents, (request, another), strict=True):
        assert isinstance(agent.answer(make_plan([started.row()], resets=[started.reset()])), StepOutput)
    one, two = (agent.answer(latest) for agent in agents)
    assert isinstance(one, StepOutput)
    assert isinstance(two, StepOutput)
    assert model.digests[1] != other.digests[1], "the plan was the same, the tokens that it goes on from were not"
    assert one.digest != two.digest
    refused = agents[0].answer(latest)
    assert refused == StepError(step_id=2, message="RunnerBroken: rank 1 runs another step")


def test_ranks_that_sample_the_same_tokens_otherwise_run_other_steps() -> None:
    """Whether a seat wants more than the best token decides which collectives a step has."""
    model, other = DisagreeingModel(), DisagreeingModel()
    for runner, request in ((model, prompt("hi")), (other, prompt("hi", temperature=0.5))):
        agent = Agent(runner, LimitsConfig(), rank=0, world_size=2)
        assert isinstance(agent.answer(make_plan([request.row()], resets=[request.reset()])), StepOutput)
    assert model.digests != other.digests


def test_times_of_a_step() -> None:
    agent = Agent(ArithmeticModel(FOLDER, cache_bytes=1 << 16, step_seconds=0.1), LimitsConfig(), rank=0, world_size=1)
    request = prompt("hi")
    output = agent.answer(make_plan([request.row()], resets=[request.reset()]))
    assert isinstance(output, StepOutput)
    assert 0.1 <= output.device_seconds <= output.step_seconds


def test_plans_are_sent_ahead_of_the_tokens_that_they_go_on_from(agent: RunningAgent) -> None:
    request = prompt("hi")
    with agent.attach() as client:
        client.send(make_plan([request.row()], resets=[request.reset()]))
        for start in range(3, 40):
            client.send(make_plan([PlanRow(0, [LATEST_TOKEN], start, request.blocks)], step_id=start))
        for _ in range(38):
            output = client.receive()
            assert isinstance(output, StepOutput)
            request.tokens += ints(output.token_ids).tolist()
    assert text(request) == answer("hi", len(text(request)))


def test_a_token_that_a_seat_has_not_got_is_refused(agent: RunningAgent) -> None:
    request = prompt("hi")
    with agent.attach() as client:
        plan = make_plan([PlanRow(0, [LATEST_TOKEN], 3, request.blocks)], resets=[request.reset()])
        assert "its seat has got none" in client.refused(plan)


def test_blocks_are_copied_before_the_step(agent: RunningAgent) -> None:
    one, copy = prompt("hi"), prompt("hi", seat=1, blocks=[9, 10])
    with agent.attach() as client:
        one.tokens += client.tokens(make_plan([one.row()], resets=[one.reset()]))
        last = PlanRow(1, copy.tokens[2:], 2, copy.blocks)  # its first two tokens come from the other one's block
        plan = msgspec.structs.replace(make_plan([last], resets=[copy.reset()]), block_copies=pack_ints([[1, 9]]))
        assert client.tokens(plan) == one.output


class FailingModel(ArithmeticModel):
    """Fails in the third step, as a broken device would."""

    steps = 0

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("the device is on fire")
        return super().run(batch)


def test_a_model_that_fails_is_an_answer_and_nothing_of_the_step_counts() -> None:
    agent = Agent(FailingModel(FOLDER, cache_bytes=1 << 16), LimitsConfig(), rank=0, world_size=1)
    request = prompt("hi", temperature=1.0, seed=3)
    undisturbed = prompt("hi", temperature=1.0, seed=3)
    other = Agent(ArithmeticModel(FOLDER, cache_bytes=1 << 16), LimitsConfig(), rank=0, world_size=1)
    for step in range(6):
        plan: StepPlan = make_plan([request.row()], step_id=step, resets=[request.reset()] if step == 0 else [])
        result = agent.answer(plan)
        if step == 2:
            assert result == StepError(step_id=2, message="RuntimeError: the device is on fire")
            result = agent.answer(plan)
        assert isinstance(result, StepOutput)
        request.tokens += ints(result.token_ids).tolist()
        same = other.answer(make_plan([undisturbed.row()], resets=[undisturbed.reset()] if step == 0 else []))
        assert isinstance(same, StepOutput)
        undisturbed.tokens += ints(same.token_ids).tolist()
    assert request.output == undisturbed.output


class BrokenModel(ArithmeticModel):
    """Cannot run any more, as a graph whose operator has failed."""

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        raise RunnerBroken("the graph cannot be run any more")


def test_an_agent_whose_model_is_broken_answers_the_step_and_ends() -> None:
    [port] = free_ports(1)
    listener = Listener("127.0.0.1", port, b"s" * 32)
    agent = Agent(BrokenModel(FOLDER, cache_bytes=1 << 16), LimitsConfig(), rank=0, world_size=1)
    with ThreadPoolExecutor(1) as threads:
        serving = threads.submit(agent.serve, listener)
        with AgentClient(port, b"s" * 32) as client:
            client.attach()
            request = prompt("hi")
            client.send(make_plan([request.row()], resets=[request.reset()]))
            result = client.receive()
            assert isinstance(result, StepError)
            assert "cannot be run any more" in result.message
            assert client.is_closed()
        with pytest.raises(RunnerBroken):
            serving.result(30)
    listener.close()
