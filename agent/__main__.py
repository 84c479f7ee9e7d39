"""One agent process, started by ``agent.launcher``: load the model, warm up, listen, say so, serve until stopped."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys

from agent.agent import Agent
from agent.lifeline import AgentSettings, Ready, Report, exit_with_launcher, read_settings
from agent.listener import Listener
from agent.runner import RunnerBroken, open_runner
from config.log_file import log_to_file
from config.secret_file import read_secret

logger = logging.getLogger("agent")


def main() -> None:
    """Run the process. An error before it listens ends it, and the launcher is told the reason."""
    report = Report()
    faulthandler.enable()
    settings = read_settings()
    exit_with_launcher()
    log_to_file(settings.config.logging, f"agent-{settings.port}")
    agent = _load(settings)
    secret = read_secret(settings.config.secret_path(settings.model))
    listener = Listener(settings.model.agent_host, settings.port, secret)
    signal.signal(signal.SIGTERM, lambda *_: listener.close())
    hello = agent.hello
    logger.info("listening on %s:%d with %d blocks", settings.model.agent_host, settings.port, hello.num_blocks)
    report.ready(Ready(os.getpid(), hello.model, hello.num_blocks, hello.block_size))
    try:
        agent.serve(listener)
    except RunnerBroken as error:
        logger.error("%s: this process ends, so that the launcher starts another", error)
        sys.exit(1)
    logger.info("stopped")


def _load(settings: AgentSettings) -> Agent:
    """The agent of these settings, warmed up."""
    model = settings.model
    logger.info("loading rank %d of %s", settings.rank, model.path)
    agent = Agent(open_runner(model), settings.config.limits, rank=settings.rank, world_size=len(model.agent_ports))
    agent.warm_up()
    return agent


if __name__ == "__main__":
    main()
