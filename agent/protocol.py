"""What crosses the wire between LLMServer and an agent.

A connection starts with two greetings, in clear: each side sends ``MAGIC``, its protocol version and 16 random bytes.
Both derive the connection's key from the shared secret and the two random values. From then on there are only frames:

====== ===== ====================================================================================================
offset bytes meaning
====== ===== ====================================================================================================
0      4     length of the payload, little endian, at most ``MAX_PAYLOAD`` (``MAX_FIRST_PAYLOAD`` in the first frame)
4      16    keyed BLAKE2b over direction, frame number, length and payload
20     …     payload: one message of the types below as msgpack (a map with its ``type``)
====== ===== ====================================================================================================

A frame is authenticated before it is parsed; a replayed, reordered or reflected one does not pass. Arrays travel as the
bytes of little-endian ``int32`` or ``float32`` numbers; ``ints`` and ``floats`` read them without a copy.

The server's first frame is ``Attach``, which proves that it knows the secret and takes the agent over from an earlier
connection; the agent forgets what that one left in its seats and answers with ``Hello``. From then on it answers every
``StepPlan`` with a ``StepOutput`` or a ``StepError``, in order; the next plan may be sent before that. A ``Heartbeat``
comes twice a second, even before ``Hello``. ``Replaced`` is the last frame to a server whose agent another one has
taken.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from config.manifest import Capabilities

PROTOCOL_VERSION = 3
MAGIC = b"MSLS"
GREETING = struct.Struct("<4sHxx16s")
HEADER = struct.Struct("<I16s")
MAX_PAYLOAD = 256 << 20  # bytes; prompt log-probabilities are the largest messages
LATEST_TOKEN = -1  # in a plan's token ids: the token that the row's seat has got last, whichever that is
MAX_FIRST_PAYLOAD = 64 << 10  # until the peer has proved that it knows the secret

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


class ProtocolError(ConnectionError):
    """The other side does not speak this protocol, does not know the secret, or sent what no peer of ours sends."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token of one request is chosen. Values are validated by the server; the defaults change nothing."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and answer
    frequency_penalty: float = 0.0  # over the answer
    presence_penalty: float = 0.0  # over the answer
    seed: int = 0  # with a token's id and its number in the answer, all the randomness there is
    min_new_tokens: int = 0  # until then, end_token_ids cannot be chosen
    end_token_ids: tuple[int, ...] = ()
    grammar: str = ""  # what the answer must be, as the library of config.grammar_engine takes it
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit), each token once
    logprobs: bool = False  # of the chosen tokens
    top_logprobs: int = 0  # this many best tokens beside the chosen one


class SeatReset(msgspec.Struct, frozen=True, kw_only=True):
    """A request takes a seat (or takes it again after a preemption): all that sampling must know of it."""

    seat: int
    params: SamplingParams
    prompt_ids: bytes  # int32
    output_ids: bytes  # int32, the answer so far


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """Everything an agent needs for one forward pass over R rows with T new tokens.

    A row is one request's share of the step. Its last token may be ``LATEST_TOKEN``: the plan was made while the step
    before, which chooses that token, was running. Block 0 is the null block: anything may be written to it, and what a
    row reads from it means nothing. ``logits_indices`` holds the last token of every sampled row, in the order of
    ``sampled_rows``, and then P positions whose successor is known (``prompt_targets``) and whose log-probability is
    wanted.
    """

    step_id: int
    token_ids: bytes  # int32 [T], the rows one after another
    positions: bytes  # int32 [T], within the request
    slot_mapping: bytes  # int32 [T], block * block_size + offset
    block_tables: bytes  # int32 [R, M], padded with 0
    query_lens: bytes  # int32 [R], new tokens of the row, T in all
    context_lens: bytes  # int32 [R], cached and new tokens of the row
    seats: bytes  # int32 [R], each row's seat in the agent's sampling state
    sampled_rows: bytes  # int32 [S], rows that get a next token
    logits_indices: bytes  # int32 [S + P], indices into token_ids
    prompt_targets: bytes = b""  # int32 [P], the token that follows each of those positions
    prompt_top_logprobs: int = 0  # this many best tokens at each of them
    resets: tuple[SeatReset, ...] = ()  # applied before the step
    block_copies: bytes = b""  # int32 [C, 2], from and to: blocks whose keys and values are copied before the step


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag="output"):
    """The answer to a plan. Log-probabilities are the log-softmax of the raw logits."""

    step_id: int
    token_ids: bytes  # int32 [S]
    digest: bytes = b""  # of the step that was run and these tokens: the same on all ranks, see agent.step_digest
    failed_rows: bytes = b""  # int32, among the S: their grammars cannot go on, and they got an end token for that
    logprobs: bytes = b""  # float32 [S], NaN where not asked for; empty if no row asked
    top_ids: bytes = b""  # int32 [S, N], best first; N is the most that a row asked for
    top_logprobs: bytes = b""  # float32 [S, N]
    prompt_logprobs: bytes = b""  # float32 [P]
    prompt_top_ids: bytes = b""  # int32 [P, prompt_top_logprobs]
    prompt_top_logprobs: bytes = b""  # float32 [P, prompt_top_logprobs]
    device_seconds: float = 0.0  # in the graph
    step_seconds: float = 0.0  # from when the agent took it up to this answer


class StepError(msgspec.Struct, frozen=True, kw_only=True, tag="error"):
    """The plan could not be run; the agent serves on."""

    step_id: int
    message: str


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """The agent's process lives; nothing is said of the step that it may be working on."""


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag="attach"):
    """The server takes the agent."""

    pid: int


class Replaced(msgspec.Struct, frozen=True, kw_only=True, tag="replaced"):
    """The agent serves another server now, the one with this ``pid``, and closes the connection."""

    pid: int


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """What an agent says of itself when a server connects: shapes from its manifest, the rest from its own start."""

    model: str
    target: str
    rank: int
    world_size: int
    manifest_digest: str  # the same on all ranks' servers and agents, or they do not serve together
    num_blocks: int  # with the null block
    block_size: int
    vocab_size: int
    context_length: int
    max_num_seqs: int  # seats, and rows of a step
    max_num_batched_tokens: int
    capabilities: Capabilities
    cache_dtype: str
    pid: int


Message = Attach | Heartbeat | Hello | Replaced | StepPlan | StepOutput | StepError

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def ints(data: bytes) -> Ints:
    """The int32 numbers of a message field, read-only, without a copy."""
    return np.frombuffer(data, dtype="<i4")


def floats(data: bytes) -> Floats:
    """The float32 numbers of a message field, read-only, without a copy."""
    return np.frombuffer(data, dtype="<f4")


def pack_ints(values: Any) -> bytes:
    """Any sequence or array of integers as a message field."""
    return np.asarray(values, dtype="<i4").tobytes()


def pack_floats(values: Any) -> bytes:
    """Any sequence or array of numbers as a message field."""
    return np.asarray(values, dtype="<f4").tobytes()


class Channel:
    """One side of a connection, without its socket: greetings and frames in, greetings and frames out.

    ``greeting`` is sent first; ``agree`` takes the other side's. Then ``seal`` makes the frame of a message, and
    ``payload_size`` and ``unseal`` read one in two parts, header and payload.
    """

    def __init__(self, secret: bytes, role: str) -> None:
        """``role`` is ``"server"`` or ``"agent"``: who speaks here."""
        self._secret = secret
        self._role = role
        self._nonce = os.urandom(16)
        self._key = b""
        self._sent = self._received = 0

    @property
    def greeting(self) -> bytes:
        return GREETING.pack(MAGIC, PROTOCOL_VERSION, self._nonce)

    def agree(self, greeting: bytes) -> None:
        """Take the other side's greeting.

        Raises:
            ProtocolError: it is of another protocol or version.
        """
        magic, version, nonce = GREETING.unpack(greeting)
        if magic != MAGIC:
            raise ProtocolError("the other side is not one of our agents or servers")
        if version != PROTOCOL_VERSION:
            raise ProtocolError(f"the other side speaks protocol version {version}, this one {PROTOCOL_VERSION}")
        nonces = (self._nonce, nonce) if self._role == "server" else (nonce, self._nonce)
        self._key = hashlib.blake2b(b"".join(nonces), key=self._secret, digest_size=32).digest()

    def seal(self, message: Message) -> bytes:
        """The frame of ``message``; each message of this side is sealed once and sent in this order."""
        payload = _encoder.encode(message)
        if len(payload) > MAX_PAYLOAD:
            raise ProtocolError(f"a {type(message).__name__} of {len(payload)} bytes is too large for a frame")
        mac = self._mac(self._role, self._sent, payload)
        self._sent += 1
        return HEADER.pack(len(payload), mac) + payload

    def payload_size(self, header: bytes) -> int:
        """Bytes that follow this header."""
        size: int = HEADER.unpack(header)[0]
        if size > (MAX_PAYLOAD if self._received else MAX_FIRST_PAYLOAD):
            raise ProtocolError(f"the other side announces {size} bytes in one frame")
        return size

    def unseal(self, header: bytes, payload: bytes) -> Message:
        """The message of a received frame.

        Raises:
            ProtocolError: the frame is not the next one of a peer that knows the secret, or holds no message.
        """
        peer = "agent" if self._role == "server" else "server"
        if not hmac.compare_digest(HEADER.unpack(header)[1], self._mac(peer, self._received, payload)):
            raise ProtocolError("a frame fails authentication; do app and agents use the same secret file?")
        self._received += 1
        try:
            return _decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"a frame holds no known message: {error}") from None

    def _mac(self, role: str, number: int, payload: bytes) -> bytes:
        mac = hashlib.blake2b(key=self._key, digest_size=16)
        mac.update(b"%s %d %d\n" % (role.encode(), number, len(payload)))
        mac.update(payload)
        return mac.digest()
