"""The wire: what one side seals the other reads, and nothing else passes."""

from __future__ import annotations

import ast
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import protocol
from agent.protocol import (
    GREETING,
    HEADER,
    MAX_FIRST_PAYLOAD,
    MAX_PAYLOAD,
    Attach,
    Channel,
    Heartbeat,
    Message,
    ProtocolError,
    SamplingParams,
    SeatReset,
    StepError,
    StepOutput,
    StepPlan,
    floats,
    ints,
    pack_floats,
    pack_ints,
)

ROOT = Path(__file__).parent.parent
SECRET = b"s" * 32
MESSAGES: list[Message] = [
    Attach(pid=7),
    Heartbeat(),
    StepError(step_id=1, message="no: \n 中"),
    StepOutput(step_id=2, token_ids=pack_ints([1, -1]), logprobs=pack_floats([0.5, float("nan")])),
]


def channels(secret: bytes = SECRET) -> tuple[Channel, Channel]:
    """A server's and an agent's channel that have greeted each other."""
    server, agent = Channel(SECRET, "server"), Channel(secret, "agent")
    server.agree(agent.greeting)
    agent.agree(server.greeting)
    return server, agent


def take(channel: Channel, frame: bytes) -> Message:
    """Read a frame as the other side does: the header, then as many bytes as it says."""
    header = frame[: HEADER.size]
    return channel.unseal(header, frame[HEADER.size :][: channel.payload_size(header)])


def test_greeting_and_header_are_as_the_table_says() -> None:
    server, agent = channels()
    assert len(server.greeting) == GREETING.size == 24
    assert server.greeting[:4] == b"MSLS"
    frame = server.seal(Attach(pid=1))
    assert int.from_bytes(frame[:4], "little") == len(frame) - 20
    assert msgspec.msgpack.decode(frame[20:]) == {"type": "attach", "pid": 1}
    assert take(agent, frame) == Attach(pid=1)


def test_messages_in_order_both_ways() -> None:
    server, agent = channels()
    for message in MESSAGES * 2:
        assert take(agent, server.seal(message)) == message
        assert take(server, agent.seal(message)) == message


byte_fields = st.binary(max_size=40)
params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 9),
    seed=st.integers(0, 2**64 - 1),
    end_token_ids=st.tuples(st.integers(0, 9)),
)
plans = st.builds(
    StepPlan,
    step_id=st.integers(0, 2**63),
    prompt_targets=byte_fields,
    resets=st.tuples(st.builds(SeatReset, seat=st.integers(0, 99), params=params)),
    **dict.fromkeys(("token_ids", "positions", "slot_mapping", "block_tables", "query_lens"), byte_fields),
    **dict.fromkeys(("context_lens", "seats", "sampled_rows", "logits_indices"), byte_fields),
)


@given(plans)
def test_a_plan_arrives_as_it_was(plan: StepPlan) -> None:
    server, agent = channels()
    assert take(agent, server.seal(plan)) == plan


@given(st.lists(st.integers(-(2**31), 2**31 - 1)), st.lists(st.floats(width=32)))
def test_arrays(numbers: list[int], reals: list[float]) -> None:
    assert ints(pack_ints(numbers)).tolist() == numbers
    np.testing.assert_array_equal(floats(pack_floats(reals)), np.array(reals, np.float32))


def test_another_secret_fails() -> None:
    server, agent = channels(secret=b"t" * 32)
    with pytest.raises(ProtocolError, match="secret"):
        take(agent, server.seal(Attach(pid=1)))


@given(st.sampled_from(MESSAGES), st.data())
def test_a_flipped_bit_fails(message: Message, data: st.DataObject) -> None:
    """Also one of the length, after which as many bytes are read as it says."""
    server, agent = channels()
    frame = bytearray(server.seal(message))
    place = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[place // 8] ^= 1 << place % 8
    with pytest.raises(ProtocolError):
        take(agent, bytes(frame) + bytes(MAX_FIRST_PAYLOAD))


def test_a_changed_length_fails() -> None:
    """A frame that is cut or drawn out, with a header that agrees, is not the frame that was sealed."""
    server, agent = channels()
    frame = server.seal(MESSAGES[1])
    for payload in (frame[HEADER.size : -1], frame[HEADER.size :] + b"\0", b""):
        with pytest.raises(ProtocolError):
            agent.unseal(HEADER.pack(len(payload), frame[4 : HEADER.size]), payload)


def test_a_replayed_frame_fails() -> None:
    server, agent = channels()
    frame = server.seal(Attach(pid=1))
    take(agent, frame)
    with pytest.raises(ProtocolError):
        take(agent, frame)


def test_a_frame_of_another_connection_fails() -> None:
    server, _ = channels()
    _, agent = channels()
    with pytest.raises(ProtocolError):
        take(agent, server.seal(Attach(pid=1)))


def test_a_replayed_greeting_gives_another_key() -> None:
    """Whoever recorded a whole connection cannot play it to the agent again: the agent's greeting is fresh."""
    server, _ = channels()
    recorded = server.greeting, server.seal(Attach(pid=1))
    again = Channel(SECRET, "agent")
    again.agree(recorded[0])
    with pytest.raises(ProtocolError):
        take(again, recorded[1])


def test_a_frame_out_of_order_fails() -> None:
    server, agent = channels()
    server.seal(Attach(pid=1))
    with pytest.raises(ProtocolError):
        take(agent, server.seal(Attach(pid=2)))


def test_a_reflected_frame_fails() -> None:
    server, _ = channels()
    with pytest.raises(ProtocolError):
        take(server, server.seal(Attach(pid=1)))


def test_a_reflected_greeting_fails() -> None:
    """A peer without the secret echoes what a server sends, greeting and frames."""
    server = Channel(SECRET, "server")
    server.agree(server.greeting)
    with pytest.raises(ProtocolError):
        take(server, server.seal(Attach(pid=1)))


@pytest.mark.parametrize("size", [MAX_FIRST_PAYLOAD + 1, MAX_PAYLOAD, 2**32 - 1])
def test_a_large_frame_is_refused_before_proof(size: int) -> None:
    _, agent = channels()
    with pytest.raises(ProtocolError, match=str(size)):
        agent.payload_size(HEADER.pack(size, bytes(16)))


def test_a_large_frame_is_read_after_proof_up_to_the_limit() -> None:
    server, agent = channels()
    take(agent, server.seal(Attach(pid=1)))
    assert agent.payload_size(HEADER.pack(MAX_PAYLOAD, bytes(16))) == MAX_PAYLOAD
    with pytest.raises(ProtocolError):
        agent.payload_size(HEADER.pack(MAX_PAYLOAD + 1, bytes(16)))


def test_a_message_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_PAYLOAD", 100)
    server, _ = channels()
    with pytest.raises(ProtocolError, match="StepError of"):
        server.seal(StepError(step_id=1, message="x" * 100))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "exec", "pid": 1}),
        msgspec.msgpack.encode({"pid": 1}),
        msgspec.msgpack.encode({"type": "attach"}),
        msgspec.msgpack.encode({"type": "attach", "pid": "1"}),
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"type": "attach", "pid": 1}) + b"\0",
    ],
)
def test_a_sealed_frame_without_a_known_message_fails(payload: bytes) -> None:
    server, agent = channels()
    header = HEADER.pack(len(payload), server._mac("server", 0, payload))
    with pytest.raises(ProtocolError, match="no known message"):
        agent.unseal(header, payload)


@given(st.binary(min_size=GREETING.size, max_size=GREETING.size))
def test_random_greetings_are_refused(greeting: bytes) -> None:
    with pytest.raises(ProtocolError, match="not one of our"):
        Channel(SECRET, "agent").agree(greeting)


def test_another_version_is_named() -> None:
    greeting = GREETING.pack(protocol.MAGIC, protocol.PROTOCOL_VERSION + 1, bytes(16))
    with pytest.raises(ProtocolError, match=f"version {protocol.PROTOCOL_VERSION + 1}"):
        Channel(SECRET, "server").agree(greeting)


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
SOURCE_FOLDERS = ("agent", "server", "client", "models", "kernels", "config", "benchmarks")


def sources() -> list[Path]:
    return [*ROOT.glob("*.py"), *(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py"))]


def dangers(tree: ast.AST) -> list[str]:
    """What a source imports or calls that turns bytes into code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES or "multiprocessing.Queue" in names:
                found.append(node.module or "")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name == "multiprocessing.Queue":
                found.append(name)
            if any(
                argument.arg == "allow_pickle" and ast.unparse(argument.value) != "False" for argument in node.keywords
            ):
                found.append("allow_pickle")
    return found


def test_nothing_turns_received_bytes_into_code() -> None:
    assert len(sources()) > 20
    found = {str(path.relative_to(ROOT)): dangers(ast.parse(path.read_text(encoding="utf-8"))) for path in sources()}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_search_finds_each_danger() -> None:
    code = (
        "import pickle.x\nfrom marshal import loads\nfrom multiprocessing import Queue\n"
        "eval('1')\nnp.load(f, allow_pickle=True)\nmultiprocessing.Queue()"
    )
    assert len(dangers(ast.parse(code))) == 6
