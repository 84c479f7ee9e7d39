"""A deployment that things can be done to while it serves: a proxy between app and agent, and ways to hurt either."""

from __future__ import annotations

import contextlib
import re
import select
import signal
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from legacy_client import event_text, events
from serving_processes import Process, Serving, standin_deployment

TOKENS = 100  # of each answer: two seconds, so that all are under way when something happens
SLOW = {"step_seconds": 0.02}


class Proxy:
    """Stands between app and agent, and passes bytes on until it is told otherwise."""

    def __init__(self, target: int) -> None:
        self.stalled = threading.Event()
        self.corrupt = threading.Event()
        self._target = target
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break what is connected now."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                app, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(app,), daemon=True).start()

    def _pass_on(self, app: socket.socket) -> None:
        with contextlib.suppress(OSError), app, socket.create_connection(("127.0.0.1", self._target)) as agent:
            self._ends += [app, agent]
            while True:
                for end in select.select([app, agent], [], [])[0]:
                    data = end.recv(1 << 16)
                    if not data:
                        return
                    if self.stalled.is_set():
                        continue  # lost on the way
                    if self.corrupt.is_set():
                        self.corrupt.clear()
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    (agent if end is app else app).sendall(data)


class Faulty:
    """A deployment whose app reaches its agent through a proxy."""

    def __init__(
        self, folder: Path, *, model: Mapping[str, Any] = SLOW, limits: Mapping[str, Any] | None = None
    ) -> None:
        self.serving: Serving = standin_deployment(folder, [model], limits=limits or {})
        content = yaml.safe_load(self.serving.config_path.read_text())
        [self.agent_port] = content["models"][0]["agent_ports"]
        self.agents: Process = self.serving.start_agents()
        self.proxy = Proxy(self.agent_port)
        content["models"][0]["agent_ports"] = [self.proxy.port]
        content["models"][0]["secret_file"] = str(folder / "logs" / f"agents-{self.agent_port}.secret")
        state = folder / "logs" / f"agents-{self.agent_port}.state"
        state.with_name(f"agents-{self.proxy.port}.state").symlink_to(state)  # where the app looks, by the port
        self._agents_config = self.serving.config_path
        self.serving.config_path = folder / "app.yaml"
        self.serving.config_path.write_text(yaml.safe_dump(content))
        self.serving.start_app()
        self.client = self.serving.client()

    def agent(self) -> psutil.Process:
        """The agent of now."""
        [agent] = self.agents.children()
        return agent

    def restart_launcher(self) -> None:
        """Kill the launcher, see its agent go, start another."""
        agent = self.agent()
        self.agents.send(signal.SIGKILL)
        self.agents.wait()
        assert psutil.wait_procs([agent], timeout=20)[1] == []
        self.agents = self.serving.agents = Process("start_agent.py", "--config", self._agents_config)
        self.agents.wait_for("all agents started")

    def ask(self, number: int) -> str:
        """One request's text; every other one is streamed."""
        return self.ask_for(f"prompt {number}", TOKENS + number, streamed=number % 2 == 1)

    def ask_for(self, prompt: str, tokens: int, *, streamed: bool) -> str:
        """The text of an answer of so many tokens; an AssertionError holds what came instead."""
        parameters = {"ignore_eos": True, "max_new_tokens": tokens, "return_full_text": False}
        body = {"inputs": prompt, "parameters": {**parameters, "return_protocol": "sse"}}
        if streamed:
            response = self.client.post("/models/llama2/generate_stream", json=body)
            assert response.status_code == 200, response.text
            assert events(response.content)[-1]["event"] != "error", response.text
            return event_text(response.content)
        response = self.client.post("/models/llama2", json=body)
        assert response.status_code == 200, response.text
        text: str = response.json()["generated_text"]
        return text

    def ask_and_leave(self, number: int, after: int) -> None:
        """Close the stream of a request after so many of its parts."""
        body = {"inputs": f"prompt {number}", "parameters": {"ignore_eos": True, "max_new_tokens": TOKENS + number}}
        with self.client.stream("POST", "/models/llama2/generate_stream", json=body) as response:
            for _, _ in zip(range(after), response.iter_raw(), strict=False):
                pass

    def gauge(self, name: str) -> float:
        [value] = re.findall(rf"^\w*{name}(?:{{.*}})? (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(value)

    def stop(self) -> None:
        self.serving.stop()
        self.proxy.close()
