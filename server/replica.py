"""One group of agents, and the loop that keeps it busy once the agents have greeted."""

from __future__ import annotations

from config.manifest import Manifest
from config.serving_config import ModelConfig, ServingConfig
from server.agent_group import AgentGroup
from server.metrics import GroupMetrics
from server.step_loop import StepLoop


class Replica:
    """A whole model, on one group of agents.

    Attributes:
        agents: the connections to them.
        metrics: the series of the group.
        loop: None as long as the agents have not greeted for the first time.
    """

    def __init__(
        self, model: ModelConfig, group: int, config: ServingConfig, manifest: Manifest, metrics: GroupMetrics
    ) -> None:
        """``group`` is its number among the model's."""
        self.agents = AgentGroup(
            model.agent_host,
            model.groups[group],
            manifest,
            config.limits,
            secret_path=config.secret_path(model),
            state_path=config.state_path(model, group),
        )
        self.metrics = metrics
        self.loop: StepLoop | None = None
        metrics.running.set_function(lambda: self.num_running)
        metrics.waiting.set_function(lambda: self.num_waiting)
        metrics.cache_usage.set_function(lambda: self.cache_usage)
        metrics.ready.set_function(lambda: self.ready)
        metrics.show_restarts(lambda: state.restarts if (state := self.agents.state) else 0)

    @property
    def ready(self) -> bool:
        """Whether every agent of the group is connected and has answered lately."""
        return self.loop is not None and self.loop.ready

    @property
    def agents_now(self) -> str:
        """Where the agents are and how: ``127.0.0.1:9821 (restart 2 of 5)``."""
        state = self.agents.state
        return self.agents.place + (f" ({state.summary})" if state else "")

    @property
    def batch_size(self) -> int:
        """Rows of the step that is running."""
        return self.loop.batch_size if self.loop else 0

    @property
    def num_running(self) -> int:
        """Requests with a seat."""
        return self.loop.num_running if self.loop else 0

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self.loop.num_waiting if self.loop else 0

    @property
    def cache_usage(self) -> float:
        """Share of the blocks that requests own, 0 to 1."""
        return self.loop.cache_usage if self.loop else 0.0
