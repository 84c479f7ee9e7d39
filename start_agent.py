"""Start the agents of one deployment, say when they are ready, keep them running, and stop them cleanly.

Usage: ``python start_agent.py [--config config/smollm2_cpu.yaml]``. Exit codes: 0 after SIGTERM or SIGINT, 1 when an
agent cannot be started or kept running, 2 when the configuration cannot work (nothing has been started then).
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from agent.launcher import Launcher
from agent.preflight import LaunchError, check
from config.log_file import log_to_console, log_to_file
from config.serving_config import ConfigError, load
from config.version import __version__

DEFAULT_CONFIG = "config/smollm2_cpu.yaml"


def main() -> int:
    """Run the command: its exit code."""
    parser = argparse.ArgumentParser(description="Start the agents of one deployment and keep them running.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the deployment's file (default: %(default)s)")
    parser.add_argument("--version", action="version", version=__version__)
    arguments = parser.parse_args()
    try:
        config = load(arguments.config)
        check(config)
    except (ConfigError, LaunchError) as error:
        sys.stderr.write(f"start_agent.py: {error}\n")
        return 2
    log_to_file(config.logging, "start_agent")
    log_to_console(config.logging)

    async def run() -> int:
        return await Launcher(config).run()

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
