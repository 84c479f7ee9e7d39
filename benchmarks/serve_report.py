"""What ``benchmarks.serve`` found: as data, as a table and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from benchmarks import picture, result_files
from benchmarks.latency import Answer, Spread, spread
from benchmarks.target import Target
from benchmarks.traffic import Outcome

OUTPUT = Path(__file__).resolve().parent.parent / "output" / "bench" / "serve"
ENDINGS = (".json", ".svg")
MAX_ERRORS = 10  # different ones that are reported

SAID = "as each answer says"
CONFIRMED = "as asked, which the server's counter confirms"
COUNTED = "texts counted with the tokenizer; tokens without text are not among them"
EVENTS = "text events: where a server puts several tokens into one, there are more"


@dataclass(frozen=True)
class Run:
    """One load as it was measured, in full or until it was stopped."""

    outcomes: Sequence[Outcome]
    begin: float  # of time.perf_counter
    seconds: float
    client_cpu: float  # share of one core
    most: int  # requests at a time
    made: int | None  # tokens, as the server's counter says
    planned: int  # requests
    cut_off: int = 0  # requests that were under way when it was stopped; they are no outcomes


class One(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request; times in milliseconds, ``due`` in seconds from the start of the load."""

    due: float
    late: float
    asked: int
    tokens: int = 0
    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    error: str | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that is reported; times in milliseconds unless they are named seconds."""

    url: str
    protocol: str
    model: str
    load: str
    seed: int
    stopped: bool  # by Ctrl-C: all that follows is of the part that had ended by then
    planned: int  # requests
    cut_off: int  # requests under way when it was stopped
    requests: int  # that have ended
    failed: int
    errors: dict[str, int]
    seconds: float
    tokens: int
    tokens_are: str
    tokens_per_second: float
    requests_per_second: float  # answered
    most_at_a_time: int
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    late: Spread | None  # the client itself, from when a request was due until it was sent
    limits: dict[str, float]
    within_limits: int  # requests
    goodput: float  # such requests a second
    client_cpu: float
    answers: list[One]


def counted(run: Run, target: Target, tokenizer: Tokenizer | None) -> tuple[list[Answer | None], str]:
    """The answers, None for those that failed, and how their tokens were counted.

    Latencies begin when a request was due.
    """
    readings = [outcome.reading for outcome in run.outcomes]
    asked = sum(outcome.prompt.new_tokens for outcome in run.outcomes if outcome.reading is not None)
    confirmed = target.ignore_eos and run.made == asked

    answers: list[Answer | None] = []
    for outcome, reading in zip(run.outcomes, readings, strict=True):
        if reading is None:
            answers.append(None)
            continue
        if reading.tokens is not None:
            tokens = reading.tokens
        elif confirmed:
            tokens = outcome.prompt.new_tokens
        elif tokenizer is not None:
            tokens = len(tokenizer.encode(reading.text, add_special_tokens=False).ids)
        else:
            tokens = len(reading.arrivals)
        answers.append(Answer(tokens, outcome.due, reading.arrivals))
    if all(reading.tokens is not None for reading in readings if reading is not None):
        return answers, SAID
    return answers, CONFIRMED if confirmed else EVENTS if tokenizer is None else COUNTED


def report_of(
    run: Run, target: Target, tokenizer: Tokenizer | None, *, load: str, seed: int, limits: Mapping[str, float]
) -> tuple[Report, dict[str, list[float]]]:
    """The report, and all values of each latency in milliseconds, for the picture."""
    every, tokens_are = counted(run, target, tokenizer)
    answers = [answer for answer in every if answer is not None]
    values = {
        "TTFT": [1e3 * answer.first for answer in answers],
        "TPOT": [1e3 * answer.per_token for answer in answers if answer.tokens > 1],
        "ITL": [1e3 * gap for answer in answers for gap in answer.gaps],
        "E2E": [1e3 * answer.whole for answer in answers],
    }
    tokens, within = sum(answer.tokens for answer in answers), sum(answer.meets(limits) for answer in answers)
    errors = Counter(outcome.error for outcome in run.outcomes if outcome.error is not None)
    report = Report(
        url=target.url,
        protocol=target.kind,
        model=target.model,
        load=load,
        seed=seed,
        stopped=len(every) < run.planned,
        planned=run.planned,
        cut_off=run.cut_off,
        requests=len(every),
        failed=len(every) - len(answers),
        errors=dict(errors.most_common(MAX_ERRORS)),
        seconds=run.seconds,
        tokens=tokens,
        tokens_are=tokens_are,
        tokens_per_second=tokens / run.seconds,
        requests_per_second=len(answers) / run.seconds,
        most_at_a_time=run.most,
        ttft=spread(values["TTFT"]),
        tpot=spread(values["TPOT"]),
        itl=spread(values["ITL"]),
        e2e=spread(values["E2E"]),
        late=spread([1e3 * (outcome.sent - outcome.due) for outcome in run.outcomes]),
        limits=dict(limits),
        within_limits=within,
        goodput=within / run.seconds,
        client_cpu=run.client_cpu,
        answers=[_one(run, outcome, answer) for outcome, answer in zip(run.outcomes, every, strict=True)],
    )
    return report, values


def table(report: Report) -> str:
    """The report for a person."""
    stopped = (
        f"STOPPED by Ctrl-C: {report.requests} of {report.planned} requests had ended, {report.cut_off} were cut off"
    )
    lines = [
        *([stopped] if report.stopped else []),
        f"{report.requests} requests, {report.failed} failed, in {report.seconds:.1f} s; {report.load}, "
        f"at most {report.most_at_a_time} at a time",
        *(f"    {times} x {error}" for error, times in report.errors.items()),
        f"{report.tokens} tokens ({report.tokens_are}): {report.tokens_per_second:.1f} tokens/s, "
        f"{report.requests_per_second:.2f} requests/s",
    ]
    if report.limits:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in report.limits.items())
        lines.append(f"{report.within_limits} within {limits}: goodput {report.goodput:.2f} requests/s")
    lines += ["", f"{'ms':24}{'mean':>10}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'max':>10}"]
    rows = {
        "first token (TTFT)": report.ttft,
        "a token after it (TPOT)": report.tpot,
        "between events (ITL)": report.itl,
        "whole answer (E2E)": report.e2e,
        "the client was late by": report.late,
    }
    for name, found in rows.items():
        if found is not None:
            lines.append(f"{name:24}" + "".join(f"{value:10.1f}" for value in msgspec.structs.astuple(found)))
    lines += ["", f"this client took {100 * report.client_cpu:.0f} % of a core"]
    return "\n".join(lines)


def write(report: Report, values: Mapping[str, Sequence[float]], output: Path) -> list[Path]:
    """Write ``output`` with the endings .json and .svg; their paths.

    Raises:
        OSError: they cannot be written.
    """
    contents = msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n", drawing(report, values)
    return result_files.write(output, dict(zip(ENDINGS, contents, strict=True)))


def drawing(report: Report, values: Mapping[str, Sequence[float]]) -> str:
    """The latencies as curves in SVG, with the limits, and what was asked of whom."""
    ended = f"{report.requests} requests" if not report.stopped else f"{report.requests} of {report.planned} requests"
    words = [
        f"protocol {report.protocol}",
        ended,
        f"{report.failed} failed",
        f"{report.tokens_per_second:.0f} tokens/s",
    ]
    if report.stopped:
        words.append("stopped by Ctrl-C")
    if report.limits:
        words.append(f"{report.within_limits} within the limits (dashed)")
    limits = {name.upper(): limit for name, limit in report.limits.items()}
    return picture.curves(f"{report.model}: {report.load}", "ms", values, about=", ".join(words), limits=limits)


def _one(run: Run, outcome: Outcome, answer: Answer | None) -> One:
    due, late, asked = outcome.due - run.begin, 1e3 * (outcome.sent - outcome.due), outcome.prompt.new_tokens
    if answer is None:
        return One(due, late, asked, error=outcome.error)
    return One(due, late, asked, answer.tokens, 1e3 * answer.first, 1e3 * answer.per_token, 1e3 * answer.whole)
