"""The whole chain on this machine, stage by stage, for one report: ``python -m agent.doctor --accept``.

Each stage runs the command that a user would. A stage that fails stops only those that need what it makes.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec

from agent import golden_text
from agent.served_model import NAME, ROOT, NotServed, served
from config.serving_config import Target

COMMAND_SECONDS = 1800.0  # a first compilation on a device can take many minutes
NEAR_TIES: dict[Target, float] = {"cpu": 0.01, "ascend": 0.25}  # of logits: in float32; in half the digits
PROOF = "prefill and decode share cache and weights"  # what every runner logs once it has proved it
OPERATOR_CHECKS: dict[Target, str] = {
    "cpu": "benchmarks.operator_check",
    "ascend": "benchmarks.ascend_operator_check",
}
LOAD = ("-c", "4", "-n", "16")  # of the benchmark: requests at a time, in all

Outcome = Literal["passed", "failed", "skipped"]
Details = dict[str, Any]
Found = tuple[str, Details]  # in words, and as data


class Failed(Exception):
    """A stage did not come to its end; the message says why, ``details`` what was found before."""

    def __init__(self, message: str, details: Details | None = None) -> None:
        super().__init__(message)
        self.details = details or {}


class StageResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage came to."""

    stage: str
    outcome: Outcome
    seconds: float
    found: str
    details: Details = {}


@dataclass
class Acceptance:
    """One run of all stages, in a folder of its own."""

    target: Target
    folder: Path
    devices: int | None = None  # that the host has; None: as many as are wanted
    passed: set[str] = field(default_factory=set)
    url: str = ""  # of the deployment that is being tried

    def run(self) -> Iterator[StageResult]:
        """Every stage, as it ends."""
        yield self._stage("operators", self._check_operators)
        for name, ranks, options in (("one rank", 1, ()), ("two ranks", 2, ("--tp", "2"))):
            if self.devices is not None and self.devices < ranks:
                yield StageResult(stage=name, outcome="skipped", seconds=0.0, found=f"{self.devices} device is here")
                continue
            folder = self.folder / name.replace(" ", "_")
            yield self._stage(f"{name}: export", partial(self._export, folder, *options))
            with contextlib.ExitStack() as running:
                start = partial(self._start, running, folder, ranks)
                yield self._stage(f"{name}: start", start, needs=f"{name}: export")
                yield self._stage(f"{name}: golden text", self._compare, needs=f"{name}: start")
                yield self._stage(f"{name}: benchmark", self._measure, needs=f"{name}: start")

    def _stage(self, name: str, work: Callable[[], Found], needs: str | None = None) -> StageResult:
        if needs is not None and needs not in self.passed:
            return StageResult(stage=name, outcome="skipped", seconds=0.0, found=f"needs {needs}")
        begin = time.monotonic()
        outcome: Outcome = "failed"
        details: Details = {}
        try:
            found, details = work()
            outcome = "passed"
            self.passed.add(name)
        except Failed as error:
            found, details = str(error), error.details
        except (NotServed, OSError, httpx.HTTPError, msgspec.MsgspecError) as error:
            found = str(error) or repr(error)
        seconds = round(time.monotonic() - begin, 1)
        return StageResult(stage=name, outcome=outcome, seconds=seconds, found=found, details=details)

    def _check_operators(self) -> Found:
        """Each operator against the portable one."""
        output = command("-m", OPERATOR_CHECKS[self.target], codes=(0, 1))
        compared: list[Details] = [msgspec.json.decode(line) for line in output.splitlines()]
        wrong = [one["operator"] for one in compared if not one.get("difference", math.inf) <= one["tolerance"]]
        if wrong:
            raise Failed(f"{len(wrong)} of {len(compared)} differ: {', '.join(wrong)}", {"operators": compared})
        return f"{len(compared)} compared", {"operators": compared}

    def _export(self, folder: Path, *options: str) -> Found:
        """Export the default model, for the CPU in the reference format."""
        kind = ("--weights", "float32") if self.target == "cpu" else ("--target", self.target)
        output = command("-m", "models.export", "--output", os.path.relpath(folder / "model", ROOT), *kind, *options)
        return last_line(output), {}

    def _start(self, running: contextlib.ExitStack, folder: Path, ranks: int) -> Found:
        """Start agents and app, and look for the agents' proof that prefill and decode share cache and weights."""
        for old in folder.glob("agent-*.log*"):
            old.unlink()
        dtype = "float32" if self.target == "cpu" else "bfloat16"
        model = {
            "path": str(folder / "model"), "target": self.target, "cache_memory": "256MiB", "cache_dtype": dtype
        }  # fmt: skip
        self.url = running.enter_context(served(folder, model, ranks, COMMAND_SECONDS))
        proved = proofs(folder)
        if len(proved) != ranks:
            raise Failed(f"{len(proved)} of {ranks} agents have proved that they share their cache", {"proofs": proved})
        return "; ".join(proved), {"proofs": proved}

    def _compare(self) -> Found:
        """Ask for every golden text, and count the tokens that are as expected."""
        near_tie = NEAR_TIES[self.target]
        texts: list[Details] = [
            {
                "prompt": golden.prompt,
                "compared": golden_text.decided(golden, near_tie),
                "same": golden_text.same(golden, golden_text.ask(self.url, NAME, golden), near_tie),
            }
            for golden in golden_text.read()
        ]
        same, compared = (sum(text[key] for text in texts) for key in ("same", "compared"))
        words, details = f"{same} of {compared} tokens as expected", {"near_tie": near_tie, "texts": texts}
        if same < compared:
            raise Failed(words, details)
        return words, details

    def _measure(self) -> Found:
        """A short load: not a benchmark to publish, but it shows that several requests run together."""
        output = command("-m", "benchmarks.load", "ours", self.url, "--model", NAME, *LOAD)
        load = msgspec.json.decode(last_line(output))
        return f"{load['tokens_per_second']:.0f} tokens/s, first token after {load['first_p50']:.0f} ms", load


def proofs(folder: Path) -> list[str]:
    """What the agents' logs say of the start-up proof, a line for each agent."""
    lines = [line for log in sorted(folder.glob("agent-*.log")) for line in log.read_text("utf-8").splitlines()]
    return [line.partition(PROOF)[1] + line.partition(PROOF)[2] for line in lines if PROOF in line]


def command(*arguments: str, codes: Sequence[int] = (0,)) -> str:
    """What one of our commands prints, if it ends with one of the ``codes``.

    Raises:
        Failed: it ended with another, or not in time, or without a word.
    """
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
            env={"GLOG_v": "3", **os.environ},
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(arguments)}: not done within {COMMAND_SECONDS:g} s") from None
    if done.returncode not in codes or not done.stdout.strip():
        raise Failed(f"{' '.join(arguments)} ended with {done.returncode}: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
