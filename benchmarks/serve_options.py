"""The command line of ``benchmarks.serve``: each option, and which of them say nothing beside each other."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer

from benchmarks import serve_report
from benchmarks.arrivals import PATTERNS
from benchmarks.exchange import ANSWER_SECONDS
from benchmarks.latency import LIMITS, limits_of
from benchmarks.options import count, option, positive, whole
from benchmarks.target import KINDS
from benchmarks.workload import lengths
from client.command_line import KEY

USUAL = {"model": "llama2", "arrivals": "poisson", "burst": 8}  # where it is not said, and where it matters


def parser(description: str) -> argparse.ArgumentParser:
    """The command line, without what its options mean together."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=description)
    top.add_argument("url", help="such as http://127.0.0.1:9811")
    kinds = "; ".join(f"{kind}: {words}" for kind, words in KINDS.items())
    top.add_argument("--protocol", choices=KINDS, default="ours", help=f"{kinds} (default: %(default)s)")
    top.add_argument("--model", help=f"the name under which it is served (default: {USUAL['model']})")
    top.add_argument(
        "--api-key", default=os.environ.get(KEY) or None, help=f"better in ${KEY}: others see command lines"
    )
    top.add_argument("--ca", metavar="FILE", help="certificates to trust instead of the usual ones, for https")
    top.add_argument("--extra", type=option(fields), default={}, metavar="JSON", help="more fields of each request")
    top.add_argument(
        "--end-tokens", action="store_true", help="let answers end where the model ends them, as those of tgi always do"
    )

    loop = top.add_argument_group("when requests are sent").add_mutually_exclusive_group(required=True)
    loop.add_argument("--rate", type=option(positive), help="open loop: requests a second")
    loop.add_argument("-c", "--concurrent", type=option(count), help="closed loop: requests at a time")
    top.add_argument("--arrivals", choices=PATTERNS, help=f"of an open loop (default: {USUAL['arrivals']})")
    top.add_argument("--burst", type=option(count), help=f"requests of one of the bursts (default: {USUAL['burst']})")
    top.add_argument("-n", "--requests", type=option(count), default=64, help="in all (default: %(default)s)")
    top.add_argument(
        "--warm-up", type=option(whole), default=2, help="requests before, not counted (default: %(default)s)"
    )
    top.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    top.add_argument(
        "--timeout", type=option(positive), default=ANSWER_SECONDS, help="seconds for an answer (%(default)g)"
    )

    asked = top.add_argument_group("what is asked (default: the project's short prompts)")
    asked.add_argument("--file", type=Path, help="JSON or JSON lines: objects with prompt and output_tokens")
    asked.add_argument(
        "--input-tokens", type=option(lengths), help="128, uniform:16:256 or lognormal:128:0.7; needs --tokenizer"
    )
    asked.add_argument("--output-tokens", type=option(lengths), help="the same; replaces the lengths of the prompts")
    asked.add_argument("--tokenizer", type=option(tokenizer_file), metavar="FILE", help="the model's tokenizer.json")

    top.add_argument(
        "--slo",
        type=option(limits_of),
        default={},
        help=f"limits in milliseconds of {', '.join(LIMITS)}: ttft:500,tpot:50",
    )
    top.add_argument(
        "--output", type=Path, default=serve_report.OUTPUT, help="without its ending (default: %(default)s)"
    )
    return top


def options(description: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """What ``words`` say, those of the process unless they are given; ends it where they contradict each other."""
    top = parser(description)
    found = top.parse_args(words)
    for sentence in contradictions(found):
        top.error(sentence)
    if found.protocol == "tgi":
        found.model = "its only model"
    for name, usual in USUAL.items():
        if getattr(found, name) is None:
            setattr(found, name, usual)
    return found


def contradictions(found: argparse.Namespace) -> Iterator[str]:
    """A sentence for each option that would be accepted and change nothing."""
    if found.concurrent is not None:
        if found.arrivals is not None:
            yield f"--arrivals {found.arrivals} is of an open loop, --rate; with --concurrent answers say when to send"
        if found.burst is not None:
            yield f"--burst {found.burst} is of an open loop, --rate with --arrivals bursts, not of --concurrent"
        if found.concurrent > found.requests:
            yield f"--concurrent {found.concurrent} is more than --requests {found.requests}: never so many would run"
    elif found.burst is not None and found.arrivals != "bursts":
        yield f"--burst {found.burst} is of --arrivals bursts, not of --arrivals {found.arrivals or USUAL['arrivals']}"
    if found.ca is not None and not found.url.startswith("https:"):
        yield f"--ca {found.ca} is for https, and the URL is {found.url}"
    if found.model is not None and found.protocol == "tgi":
        yield f"--model {found.model} cannot be said in --protocol tgi, which serves one model"
    if found.input_tokens is not None:
        if found.file is not None:
            yield "--input-tokens draws prompts, and --file has its own"
        if found.tokenizer is None:
            yield "--input-tokens needs --tokenizer, which counts the tokens"


def fields(text: str) -> dict[str, Any]:
    """A JSON object."""
    found = json.loads(text, parse_constant=_no_number)
    if not isinstance(found, dict):
        raise ValueError("this is no JSON object")
    return found


def tokenizer_file(text: str) -> Tokenizer:
    """A tokenizer.json."""
    try:
        content = Path(text).read_bytes()
    except OSError as error:
        raise ValueError(str(error)) from None
    try:
        return Tokenizer.from_str(json.dumps(json.loads(content)))
    except Exception as error:  # the library raises nothing more particular
        raise ValueError(f"{text} is no tokenizer.json: {error}") from None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
