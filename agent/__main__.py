"""One agent process, started by ``agent.launcher``: load the model, warm up, listen, say so, serve until stopped."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys

from agent.agent import Agent
from agent.heartbeat import TimedRunner, start_heartbeat
from agent.lifeline import AgentSettings, Ready, Report, exit_with_launcher, read_settings
from agent.listener import Listener
from agent.placement import host_device, place
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
    runner, agent = _load(settings)
    secret = read_secret(settings.config.secret_path(settings.model))
    listener = Listener(settings.model.agent_host, settings.port, secret)
    signal.signal(signal.SIGTERM, lambda *_: listener.close())
    hello = agent.hello
    logger.info("listening on %s:%d with %d blocks", settings.model.agent_host, settings.port, hello.num_blocks)
    report.ready(Ready(os.getpid(), hello.model, hello.num_blocks, hello.block_size))
    start_heartbeat(runner, [report.beat, listener.beat])
    try:
        agent.serve(listener)
    except RunnerBroken as error:
        logger.error("%s: this process ends, so that the launcher starts another", error)
        sys.exit(1)
    logger.info("stopped")


def _load(settings: AgentSettings) -> tuple[TimedRunner, Agent]:
    """The model of these settings and its agent, warmed up."""
    model = settings.model
    logger.info("loading rank %d of %s", settings.rank, model.path)
    limits = settings.config.limits
    where = place(settings)
    if model.target == "ascend":
        logger.info("device %d, which the host numbers %d", where.device, host_device(where.device))
    os.sched_setaffinity(0, where.cpus)  # before the runtime starts its threads, which keep to the same
    runner = TimedRunner(open_runner(model, where, limits), limits)
    agent = Agent(runner, limits, rank=where.rank, world_size=where.world_size)
    agent.warm_up()
    return runner, agent


if __name__ == "__main__":
    main()
