"""``python -m client``: ask, chat, and look at a server, by hand or in a pipe.

Answers go to standard output, everything else to standard error. Exit codes: 0; 1 if the server does not answer as
asked, or is not ready; 2 for a command that cannot be carried out; 130 after Ctrl-C; 141 if nobody reads the output.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence

import msgspec

from client.client_errors import ClientError, NoConnection, NotAuthorized, TimedOut
from client.conversation import Conversation
from client.http_session import Session
from client.inference_client import MindsporeInferenceClient, Parameters
from client.patience import MAX_SECONDS, TIMEOUTS, Retries, Timeouts
from client.remote_server import Server
from client.server_status import read_status, served_names
from client.terminal import lines_of_input, nobody_reads, prepare, say, write_json, write_line, write_text

DEFAULT_URL = "http://127.0.0.1:9811"
URL, KEY = "MINDSPORE_LLM_URL", "MINDSPORE_LLM_API_KEY"  # environment variables
FAILED, CANNOT, INTERRUPTED, NOBODY_READS = 1, 2, 130, 141

ADVICE = {  # beside what the error itself says
    NoConnection: f"; --url or ${URL} says where the server is",
    NotAuthorized: f"; --api-key or ${KEY} says the key",
    TimedOut: "; --timeout sets all of them",
}

Run = Callable[[Server, argparse.Namespace], int]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m client", description="Ask a server of language models.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Run, words: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        added.set_defaults(run=run)
        added.add_argument(
            "--url", default=os.environ.get(URL) or DEFAULT_URL, help=f"the server (default: ${URL}, or {DEFAULT_URL})"
        )
        added.add_argument(
            "--api-key", default=os.environ.get(KEY) or None, help=f"better in ${KEY}: others see command lines"
        )
        added.add_argument("--ca", metavar="FILE", help="certificates to trust instead of the usual ones")
        added.add_argument("--timeout", type=timeouts, default=TIMEOUTS, metavar="SECONDS", help="for every wait")
        added.add_argument("--json", action="store_true", help="for programs: one JSON object a line")
        return added

    asking = command("ask", ask, "answer one prompt")
    asking.add_argument("prompt", nargs="?", help="the prompt; left out, or -: standard input")
    chatting = command("chat", chat, "talk, a line and an answer at a time; Ctrl-C ends an answer, Ctrl-D the talk")
    chatting.add_argument("--system", metavar="TEXT", help="what the model is told before")
    for added in (asking, chatting):
        added.add_argument("--model", help="a served name (default: the server's first)")
        added.add_argument("--max-tokens", type=int, metavar="N", help="the longest answer")
        added.add_argument("--temperature", type=float, help="0: always the likeliest token")
        added.add_argument("--top-p", type=float, help="draw from the likeliest tokens with this much probability")
        added.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
        added.add_argument("--seed", type=int, help="draw the same again")
        added.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    command("models", models, "list the served names")
    command("status", status, "is the server ready, and how busy is it")
    return top


def main(words: Sequence[str] | None = None) -> int:
    """Run one command, that of the process unless ``words`` are given; its exit code."""
    prepare()
    try:
        # UTF-8 whatever the locale says, like all that comes from a pipe
        arguments = parser().parse_args(
            [os.fsencode(word).decode() for word in sys.argv[1:]] if words is None else words
        )
        run: Run = arguments.run
        url = arguments.url.rstrip("/").removesuffix("/v1")  # as OpenAI's clients have it
        return run(Server(url, arguments.api_key, arguments.ca, arguments.timeout), arguments)
    except ClientError as error:
        say(words_of(error))
        return FAILED
    except BrokenPipeError:
        nobody_reads()
        return NOBODY_READS
    except KeyboardInterrupt:
        return INTERRUPTED
    except UnicodeDecodeError:
        say("this is not UTF-8, on the command line or at standard input")
        return CANNOT
    except (ValueError, OSError) as error:
        say(str(error))
        return CANNOT


def timeouts(text: str) -> Timeouts:
    """Seconds for every wait.

    Raises:
        ArgumentTypeError: nobody can wait so long.
    """
    try:
        return Timeouts.all(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no time above 0 and up to {MAX_SECONDS} seconds") from None


def ask(server: Server, arguments: argparse.Namespace) -> int:
    """One prompt, one answer."""
    # A pipe ends in a newline that nobody means
    prompt = sys.stdin.read().removesuffix("\n") if arguments.prompt in (None, "-") else arguments.prompt
    if not prompt:
        raise ValueError("there is no prompt: give one as an argument or at standard input")
    drawn = any(value is not None for value in (arguments.top_p, arguments.top_k)) or bool(arguments.temperature)
    parameters = Parameters(
        do_sample=drawn and arguments.temperature != 0,
        max_new_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        stop=arguments.stop,
    )
    model = first_model(server) if arguments.model is None else arguments.model
    with MindsporeInferenceClient(model, server.url, server.token, server.timeouts, ca=server.ca) as client:
        if arguments.json:
            parameters["details"] = True
            found = client.generate(prompt, **parameters)
            details = msgspec.to_builtins(found.details)
            told = {name: details[name] for name in ("finish_reason", "generated_tokens", "seed")}
            write_json({"generated_text": found.generated_text, **told})
        else:
            with contextlib.closing(client.generate_stream(prompt, return_full_text=False, **parameters)) as steps:
                write_text(step.token.text for step in steps if step.token)
    return 0


def chat(server: Server, arguments: argparse.Namespace) -> int:
    """Lines from standard input, an answer to each."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    settings = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    model = first_model(server) if arguments.model is None else arguments.model
    with contextlib.closing(Session(server)) as session:
        talk = Conversation(session, model, arguments.system, settings)
        for line in lines_of_input():
            try:
                answer(talk, line, arguments.json)
            except ClientError as error:
                if not sys.stdin.isatty():
                    raise
                say(words_of(error))
    return 0


def answer(talk: Conversation, line: str, as_json: bool) -> None:
    """Answer one line. Ctrl-C ends the answer, and what there is of it counts."""
    begin = time.monotonic()
    with contextlib.closing(talk.say(line)) as pieces:
        if as_json:
            text = ""
            with contextlib.suppress(KeyboardInterrupt):
                for piece in pieces:
                    text += piece
            usage = msgspec.to_builtins(talk.usage)
            write_json({"role": "assistant", "content": text, "finish_reason": talk.finish_reason, "usage": usage})
        else:
            with contextlib.suppress(KeyboardInterrupt):
                write_text(pieces)
    if talk.usage and sys.stdout.isatty() and not as_json:
        say(f"({talk.usage.completion_tokens} tokens in {time.monotonic() - begin:.1f} s)")


def models(server: Server, arguments: argparse.Namespace) -> int:
    """The served names, one a line."""
    with contextlib.closing(Session(server)) as session:
        for name in served_names(session):
            if arguments.json:
                write_json({"id": name})
            else:
                write_line(name)
    return 0


def status(server: Server, arguments: argparse.Namespace) -> int:
    """Ready or not, batch size, queue, and the gauges of each model."""
    now = dataclasses.replace(server, retries=Retries(times=0))
    with contextlib.closing(Session(now)) as session:
        found = read_status(session)
    if arguments.json:
        write_json(msgspec.to_builtins(found))
    else:
        write_line("ready" if found.ready else f"not ready: {found.reason}")
        write_line(f"batch size {found.batch_size}, waiting {found.waiting}")
        for name, values in found.models.items():
            write_line(f"{name}: {', '.join(f'{gauge} {value:g}' for gauge, value in values.items())}")
    return 0 if found.ready else FAILED


def first_model(server: Server) -> str:
    """The name that a command means which names none."""
    with contextlib.closing(Session(server)) as session:
        names = served_names(session)
    if not names:
        raise ValueError(f"{server.url} serves no model")
    return names[0]


def words_of(error: ClientError) -> str:
    """An error as a person reads it."""
    found = f" (request id {error.request_id})" if error.request_id else ""
    advice = next((words for kind, words in ADVICE.items() if isinstance(error, kind)), "")
    return f"error: {error.message}{found}{advice}"
