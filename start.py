"""Agents and app of one deployment together: ``python start.py [--config config/smollm2_cpu.yaml]``.

The app runs in this process, ``start_agent.py`` in a child. On SIGTERM or Ctrl-C the app drains first, then the agents
stop; a second signal ends at once. However this process dies, the agents end too. Exit codes: 0 after a signal, 1 when
the models cannot be served, 2 when the configuration cannot work (nothing has been started then).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import shlex
import signal
import socket
import sys
from pathlib import Path

# Until the app takes it, Ctrl-C just ends this process: an interrupted import would print a traceback
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from client.server_app_post import (
    CANNOT_START,
    DEFAULT_CONFIG,
    FAILED,
    STARTED,
    AppServer,
    listen,
    load_config,
    open_app,
)
from config.serving_config import ConfigError, ServingConfig
from config.version import __version__

AGENTS = Path(__file__).resolve().parent / "start_agent.py"
AGENTS_STOP_SECONDS = 30.0
PR_SET_PDEATHSIG = 1  # prctl(2): send me a signal when my parent dies

_libc = ctypes.CDLL(None)


async def run(app: AppServer, listener: socket.socket, config_path: str) -> int:
    """Start the agents, serve until a signal or until the agents are gone, and stop them: the exit code."""
    agents = await _start_agents(config_path)
    ended = asyncio.create_task(agents.wait())
    serving = asyncio.create_task(app.serve(sockets=[listener]))
    try:
        await asyncio.wait((serving, ended), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            print(f"the agents have ended with exit code {ended.result()}", file=sys.stderr)  # noqa: T201
            app.drain(0)  # what is running cannot go on: its clients are told so
            await serving
            return max(ended.result(), FAILED)
        return FAILED if app.failure else 0
    finally:
        await _stop_agents(agents, ended)


async def _start_agents(config_path: str) -> asyncio.subprocess.Process:
    parent = os.getpid()

    def end_with_parent() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os._exit(FAILED)

    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(AGENTS),
        "--config",
        config_path,
        start_new_session=True,  # Ctrl-C is for this process, which tells the agents when the app has drained
        preexec_fn=end_with_parent,
    )


async def _stop_agents(agents: asyncio.subprocess.Process, ended: asyncio.Task[int]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        agents.terminate()
    await asyncio.wait((ended,), timeout=AGENTS_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        agents.kill()
    await ended


def _announce(line: str, config: ServingConfig) -> None:
    print(line, flush=True)  # noqa: T201
    if line == STARTED:
        server = config.server
        words = [f"curl -N {server.url}/models/{config.models[0].names[0]}/generate_stream"]
        if server.tls_certificate:
            words.append(f"--cacert {shlex.quote(server.tls_certificate)}")
        if server.api_key_file:
            key = f"$(grep -m 1 '^[^#]' {shlex.quote(server.api_key_file)})"
            words.append(f'-H "Authorization: Bearer {key}"')
        words.append("-H 'Content-Type: application/json'")
        words.append("""-d '{"inputs": "The capital of France is", "parameters": {"max_new_tokens": 40}}'""")
        print("try:", *words, flush=True)  # noqa: T201


def main() -> int:
    """Run the command: its exit code."""
    parser = argparse.ArgumentParser(description="Serve the models of one deployment: its agents and its HTTP app.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the deployment's YAML file (default: %(default)s)")
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args()
    try:
        config = load_config(options.config)
        listener = listen(config.server)
        app = open_app(config, announce=lambda line: _announce(line, config))
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return CANNOT_START
    return asyncio.run(run(app, listener, options.config))


if __name__ == "__main__":
    sys.exit(main())
