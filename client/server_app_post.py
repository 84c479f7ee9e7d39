"""The FastAPI app and its entry point: ``python client/server_app_post.py --config config/smollm2_cpu.yaml``.

The port is open before the agents are there, so that ``/health/live`` answers; requests get a 503 until every model has
answered its first prompt. The first SIGTERM or SIGINT drains: not ready, no new requests, running ones finish within
``drain_seconds``. A second one ends at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import FrameType

if __package__ in (None, ""):  # run as a script: its folder is on the path, the checkout is meant
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import msgspec
import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from client.api_keys import ApiKeys, KeyGuard, is_open
from client.deployment import Deployment
from client.http_connection import MAX_HEADER_BYTES, allow_files, connections_of
from client.http_edge import HttpEdge
from client.openapi import describe
from client.routes import (
    errors,
    models,
    openai_chat,
    openai_completions,
    openai_models,
    openai_tokens,
    operations,
    page,
    tgi,
)
from client.tls import server_tls
from config import serving_config
from config.log_file import log_to_console, log_to_file
from config.manifest import ManifestError, read_manifest
from config.server_config import ServerConfig
from config.serving_config import ConfigError, ServingConfig
from config.version import __version__
from server.agent_group import AgentsRefused
from server.errors import ServingError
from server.token_bytes import TokenizerError
from server.tracing import start_tracing

DEFAULT_CONFIG = "config/smollm2_cpu.yaml"
LOG_NAME = "server_app"
STARTED = "mindspore serving is started."
CANNOT_START = 2  # exit code: nothing was started
FAILED = 1  # exit code: the models could not be started
FLUSH_SECONDS = 5  # after the drain, for the last bytes to reach the clients
BACKLOG = 2048  # connections that wait to be accepted

logger = logging.getLogger(__name__)


def create_app(config: ServingConfig, announce: Callable[[str], None] = logger.info) -> FastAPI:
    """The app of one deployment; ``announce`` gets its start-up lines, ``STARTED`` last.

    Raises:
        ConfigError: the file of API keys cannot be used.
        ManifestError, TokenizerError: a model's folder cannot be used.
        OSError: the page's files cannot be read.
    """
    deployment = Deployment(config)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.state.starting = asyncio.create_task(_start(deployment, announce))
        yield
        await deployment.stop(drain_seconds=0)

    # No documentation pages: FastAPI's load their scripts from another host
    app = FastAPI(
        title="MindSpore LLM serving",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the redirect would go wherever the request's Host header says
        telemetry={"metrics": False, "logs": False, "operation_spans": False, "exclude": _leaves_no_span},
    )
    app.state.deployment = deployment
    _surround(app, deployment)
    errors.install(app)
    for part in (models, operations, tgi, openai_chat, openai_completions, openai_models, openai_tokens):
        app.include_router(part.router)
    app.include_router(page.page_router(page.read_files()))
    describe(app, deployment)
    return app


def _leaves_no_span(scope: Scope) -> bool:
    """Whether a request is one of those that come every few seconds and tell nothing."""
    path: str = scope.get("path", "")
    return is_open(path) or path == "/metrics"


def _surround(app: FastAPI, deployment: Deployment) -> None:
    """What a request passes before a route sees it, from the inside out."""
    config = deployment.config
    if config.server.api_key_file:
        app.add_middleware(KeyGuard, keys=ApiKeys(config.server.api_key_file))
    if config.server.cors_origins:  # a browser asks without a key whether it may call
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.server.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_middleware(
        HttpEdge, max_body_bytes=config.limits.max_body_bytes, on_answer=deployment.metrics.count_response
    )


async def _start(deployment: Deployment, announce: Callable[[str], None]) -> None:
    for model in deployment.models:
        announce(f"waiting for the agents of {', '.join(model.config.names)} at {model.agents}")
    await deployment.start()
    announce(STARTED)


class AppServer(uvicorn.Server):
    """uvicorn with this app's way to stop.

    Attributes:
        failure: why the models could not be started; the server ends then.

    Raises:
        ConfigError: the files for TLS cannot be used.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._deployment: Deployment = app.state.deployment
        config = self._deployment.config
        tls = server_tls(config.server)
        super().__init__(
            uvicorn.Config(
                app,
                http=connections_of(config),
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=config.server.keep_alive_seconds,
                ssl_context_factory=None if tls is None else lambda *_: tls,
                timeout_graceful_shutdown=FLUSH_SECONDS,
                backlog=BACKLOG,
            )
        )
        AppStatus.enable_automatic_graceful_drain = False  # streams end with the drain, not with the signal
        self.failure: str | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        starting: asyncio.Task[None] = self._app.state.starting
        starting.add_done_callback(self._check_start)

    def _check_start(self, starting: asyncio.Task[None]) -> None:
        if not starting.cancelled() and (error := starting.exception()):
            expected = isinstance(error, AgentsRefused | ServingError)
            logger.error("the models cannot be started: %s", error, exc_info=None if expected else error)
            self.failure = str(error)
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM and SIGINT. Called between two bytecodes of whatever runs, so the loop does the work."""
        asyncio.get_running_loop().call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        """Whoever asks a second time does not want to wait."""
        if self._drain:
            self.end()
        else:
            self.drain()

    def drain(self, seconds: float | None = None) -> None:
        """Take no new requests, let the running ones finish within ``seconds`` (None: as configured), then end."""
        configured = self._deployment.config.server.drain_seconds
        self._drain = asyncio.create_task(self._drain_and_end(configured if seconds is None else seconds))

    def end(self) -> None:
        """End at once."""
        if self._drain:
            self._drain.cancel()
        self.should_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _drain_and_end(self, seconds: float) -> None:
        try:
            await self._deployment.stop(seconds)
        finally:
            self.should_exit = True


def load_config(path: str, port: int | None = None) -> ServingConfig:
    """The deployment's configuration, on another port if one is given.

    Raises:
        ConfigError: it cannot be used, or a model's export is not there.
    """
    config = serving_config.load(path)
    if port is not None:
        config = msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, port=port))
    for i, model in enumerate(config.models):
        try:
            read_manifest(model.path)
        except ManifestError as error:
            raise ConfigError(f"{path}: models[{i}].path: {error}") from None
    return config


def listen(server: ServerConfig) -> socket.socket:
    """The open port of the app.

    Raises:
        ConfigError: it is taken, or the host is none of this machine.
    """
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    # asyncio turns Nagle's algorithm off (40 ms a request) only where the protocol is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"server: cannot listen on {server.host}:{server.port}: {error.strerror}") from None
    return listener


def open_app(config: ServingConfig, announce: Callable[[str], None]) -> AppServer:
    """The app with its log, not yet serving.

    Raises:
        ConfigError: the log cannot be written, a model's folder cannot be used, or files of keys cannot.
    """
    try:
        log_to_file(config.logging, LOG_NAME)
        log_to_console(config.logging)
    except OSError as error:
        raise ConfigError(f"logging.folder: {error}") from None
    logging.getLogger("sse_starlette").setLevel(logging.WARNING)  # at debug level it logs every answer
    start_tracing()
    allow_files(config.limits.max_connections)
    try:
        return AppServer(create_app(config, announce))
    except (ManifestError, TokenizerError) as error:
        raise ConfigError(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one deployment until a signal; the exit code."""
    parser = argparse.ArgumentParser(description="Serve the models of one deployment over HTTP.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the deployment's YAML file (default: %(default)s)")
    parser.add_argument("--port", type=int, choices=range(1, 65536), metavar="PORT", help="instead of server.port")
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.port)
        listener = listen(config.server)
        app = open_app(config, announce=lambda line: print(line, flush=True))  # noqa: T201
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return CANNOT_START
    app.run(sockets=[listener])
    return FAILED if app.failure else 0


if __name__ == "__main__":
    sys.exit(main())
