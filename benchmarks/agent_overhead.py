"""What a decode step costs the agent outside the model: ``python -m benchmarks.agent_overhead`` prints a table.

A server's plans come over a socket, and a real agent takes them, builds the model's inputs, samples and answers. In the
model's place there are logits that were worked out before: a token's probability falls with the 1.5th power of its
rank, so that nine tenths of it are at the best 60 tokens. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import msgspec
import numpy as np

from agent.agent import Agent
from agent.connection import Connection
from agent.logits import Logits
from agent.protocol import (
    GREETING,
    HEADER,
    Attach,
    Channel,
    Ints,
    Message,
    SamplingParams,
    SeatReset,
    StepOutput,
    StepPlan,
    pack_ints,
)
from agent.step_batch import StepBatch
from benchmarks import result_files
from benchmarks.report import FOLDER
from config.manifest import read_manifest
from config.serving_config import LimitsConfig

BLOCK_SIZE = 16
SECRET = b"s" * 32
SECONDS = 30.0  # far more than any answer takes
CASES = {
    "greedy": SamplingParams(),
    "top-k 50, top-p 0.9, temperature 0.8": SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
    "top-p 0.9, temperature 0.8": SamplingParams(temperature=0.8, top_p=0.9),
    "min-p 0.05": SamplingParams(temperature=1.0, min_p=0.05),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "greedy, repetition penalty 1.1": SamplingParams(repetition_penalty=1.1),
    "top-k 50, top-p 0.9, repetition penalty 1.1": SamplingParams(
        temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1
    ),
    "greedy, end token forbidden": SamplingParams(min_new_tokens=1 << 20, end_token_ids=(2,)),
    "greedy, 5 log-probabilities": SamplingParams(logprobs=True, top_logprobs=5),
}
STANDIN = Path(__file__).parent.parent / "config" / "standin"
_RECORD = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "age", "tags"],
}
JSON_ROWS = SamplingParams(
    min_new_tokens=1 << 20,
    end_token_ids=(2,),
    grammar=json.dumps({"grammars": [{"json_schema": {"type": "array", "items": _RECORD}}]}),
)


class PreparedModel:
    """A ``Runner`` that knows its logits beforehand."""

    num_blocks = 1 << 13
    cache_dtype = "float32"

    def __init__(self, folder: Path, rows: int, vocab_size: int) -> None:
        self.folder = folder
        self.manifest = msgspec.structs.replace(read_manifest(folder), vocab_size=vocab_size, block_size=BLOCK_SIZE)
        by_rank = -1.5 * np.log(np.arange(1, vocab_size + 1, dtype=np.float32))
        numbers = np.random.default_rng(0)
        logits = [np.stack([numbers.permutation(by_rank) for _ in range(rows)]) for _ in range(4)]
        self._logits = cycle([Logits.of(values) for values in logits])  # more than one: none stays in a small cache

    def copy_blocks(self, copies: Ints) -> None:
        raise NotImplementedError("no plan of this benchmark copies blocks")

    def agree(self, digest: bytes) -> None:
        """There is one rank."""

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        return next(self._logits)[: batch.logits_indices.size]


class Server:
    """The other end of the agent's connection."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._socket = socket.create_connection(listener.getsockname(), timeout=SECONDS)
            accepted, _ = listener.accept()
        self._channel = Channel(SECRET, "server")
        self.agents_end = Connection(accepted, SECRET)
        with ThreadPoolExecutor(1) as thread:
            attached = thread.submit(self.agents_end.authenticate, SECONDS)
            self._socket.sendall(self._channel.greeting)
            self._channel.agree(self._read(GREETING.size))
            self.send(Attach(pid=1))
            attached.result()

    def send(self, message: Message) -> None:
        self._socket.sendall(self._channel.seal(message))

    def receive(self) -> Message:
        header = self._read(HEADER.size)
        return self._channel.unseal(header, self._read(self._channel.payload_size(header)))

    def close(self) -> None:
        self.agents_end.close()
        self._socket.close()

    def _read(self, size: int) -> bytes:
        return self._socket.recv(size, socket.MSG_WAITALL)


def main() -> int:
    """Measure and print all, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agent_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32, help="of a step (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=49152, help="default: %(default)s")
    parser.add_argument("--context", type=int, default=500, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of each case (default: %(default)s)")
    parser.add_argument(
        "--model", type=Path, default=STANDIN, help="whose tokens grammars speak of (default: stand-in)"
    )
    arguments = parser.parse_args()
    model, server = PreparedModel(arguments.model, arguments.rows, arguments.vocabulary), Server()
    agent = Agent(model, LimitsConfig(max_num_seqs=arguments.rows), rank=0, world_size=1)
    lines = [
        f"| {arguments.rows} rows of {arguments.context} tokens, vocabulary {arguments.vocabulary} | best | median |",
        "|---|--:|--:|",
    ]
    print("\n".join(lines))
    cases = {name: [params] * arguments.rows for name, params in CASES.items()}
    for formed in (1, arguments.rows):
        cases[f"greedy, {formed} of the rows JSON"] = [JSON_ROWS] * formed + [SamplingParams()] * (
            arguments.rows - formed
        )
    for name, params in cases.items():
        plan = decode_plan(arguments.rows, arguments.context)
        requests = resets(params, arguments.context, arguments.vocabulary)
        start = msgspec.structs.replace(plan, resets=requests)
        step_seconds(agent, server, start)
        times = [step_seconds(agent, server, plan) for _ in range(arguments.steps)]
        lines.append(f"| {name} | {min(times) * 1e3:.2f} ms | {statistics.median(times) * 1e3:.2f} ms |")
        print(lines[-1], flush=True)
    server.close()
    result_files.write(FOLDER / "agent", {".md": "\n".join(lines) + "\n"})
    return 0


def step_seconds(agent: Agent, server: Server, plan: StepPlan) -> float:
    """Seconds from a plan that waits in the socket to the answer that is sent, without those in the model."""
    server.send(plan)
    begin = time.perf_counter()
    message = server.agents_end.receive()
    assert isinstance(message, StepPlan)
    answer = agent.answer(message)
    server.agents_end.send(answer)
    seconds = time.perf_counter() - begin
    if not isinstance(answer, StepOutput):
        raise RuntimeError(answer.message)
    assert server.receive() == answer
    return seconds - answer.device_seconds


def decode_plan(rows: int, context: int) -> StepPlan:
    """A step in which every row has one new token, the last of ``context``."""
    width = -(-context // BLOCK_SIZE)
    tables = 1 + np.arange(rows * width).reshape(rows, width)
    ones = np.ones(rows, np.int32)
    return StepPlan(
        step_id=1,
        token_ids=pack_ints(ones),
        positions=pack_ints(ones * (context - 1)),
        slot_mapping=pack_ints(tables[:, -1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE),
        block_tables=pack_ints(tables),
        query_lens=pack_ints(ones),
        context_lens=pack_ints(ones * context),
        seats=pack_ints(range(rows)),
        sampled_rows=pack_ints(range(rows)),
        logits_indices=pack_ints(range(rows)),
    )


def resets(params: Sequence[SamplingParams], context: int, vocab_size: int) -> tuple[SeatReset, ...]:
    """New requests with these settings, one in each seat, their prompts of tokens from everywhere."""
    prompts = np.random.default_rng(1).integers(0, vocab_size, (len(params), context))
    return tuple(
        SeatReset(
            seat=seat,
            params=msgspec.structs.replace(params[seat], seed=seat),
            prompt_ids=pack_ints(prompt),
            output_ids=b"",
        )
        for seat, prompt in enumerate(prompts)
    )


if __name__ == "__main__":
    raise SystemExit(main())
