"""The doctor's look at the host: memory, open files, compiler; and at what a deployment asks of it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from agent.finding import Finding, error, ok, warning
from agent.listener import bind
from agent.model_size import gib, needs
from agent.preflight import problems
from config.serving_config import ServingConfig
from kernels.library import compiler

OTHER_FILES = 192  # of the app, beside its connections
MIB = 1 << 20


def host() -> Iterator[Finding]:
    """What every deployment needs."""
    path = compiler()
    if path is None:
        advice = "install g++ or clang++, or name one in CXX, and export models again"
        yield warning(
            "compiler", "none: models run on MindSpore's standard operators, ten to twenty times slower", advice
        )
    else:
        yield ok("compiler", path)
    yield ok("memory", f"{gib(free_memory())} free")


def deployment(config: ServingConfig) -> Iterator[Finding]:
    """What one deployment needs: its exports, ports and secrets, memory, and files."""
    wrong = list(problems(config))
    yield from (error("deployment", problem, "correct it, or what it names") for problem in wrong)
    if not wrong:
        ports = [port for model in config.models for port in model.agent_ports]
        yield ok("deployment", f"{len(config.models)} model(s) ready to start, agents on {', '.join(map(str, ports))}")
    yield app_port(config)
    yield open_files(config.limits.max_connections)
    yield memory(config)


def app_port(config: ServingConfig) -> Finding:
    """The port of the app."""
    address = f"{config.server.host}:{config.server.port}"
    try:
        bind(config.server.host, config.server.port).close()
    except OSError as problem:
        return error("server.port", f"cannot listen on {address}: {problem.strerror}", "stop what listens there")
    return ok("server.port", f"{address} is free")


def open_files(max_connections: int) -> Finding:
    """Files that a process may open: the app raises its own limit as far as the hard limit goes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + OTHER_FILES
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return ok("open files", "no limit" if hard == resource.RLIM_INFINITY else f"{hard} allowed")
    advice = f"raise it (ulimit -Hn {wanted}, LimitNOFILE= in systemd), or lower limits.max_connections"
    return warning("open files", f"{hard} allowed; {max_connections} connections need {wanted}", advice)


def memory(config: ServingConfig) -> Finding:
    """The host's memory against what runs in it, and what passes through it on the way to a device."""
    found = list(needs(config))
    needed = sum(len(need.devices) * need.host_bytes for need in found)
    loading = sum(len(need.devices) * need.loading_bytes for need in found)
    free = free_memory()
    if free is not None and free < needed:
        advice = "lower cache_memory, or choose a smaller format of weights"
        return error("memory for the models", f"{gib(needed)} needed, {gib(free)} free", advice)
    if free is not None and free < needed + loading:
        words = f"about {gib(needed + loading)} needed while all agents load at once, {gib(free)} free"
        return warning("memory for the models", words, "stop what else runs here, or serve fewer ranks on this host")
    more = f", and {gib(loading)} more while agents load" if loading else ""
    return ok("memory for the models", f"about {gib(needed)} of this host's{more}")


def free_memory() -> int | None:
    """Bytes that programs can still take: what the system has, or what this container may."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        values = dict(line.split(":", 1) for line in lines)
        free = int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        return min(free, max(0, limit - used))
    except (OSError, ValueError):  # no control group of version 2, or "max"
        return free
