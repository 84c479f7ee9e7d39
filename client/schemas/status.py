"""The body of ``GET /serving/status``: what a deployment does at this moment."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

Count = Annotated[int, Field(ge=0)]


class AgentStatus(BaseModel):
    """One agent of a model."""

    address: str = Field(examples=["127.0.0.1:9820"])
    connected: bool = Field(
        description="there is a connection to it; whether it answers lately, the group's `ready` says"
    )
    group: Count = Field(description="the place of its group among the model's `groups`")


class GroupStatus(BaseModel):
    """The agents of one replica of a model, each of which computes a part of every step."""

    ready: bool = Field(description="every agent of the group has answered lately")
    running: Count = Field(description="requests with a seat")
    waiting: Count = Field(description="requests in the group's queue")
    cache_usage: float = Field(ge=0, le=1, description="share of its KV cache's blocks in use")


class ModelStatus(BaseModel):
    """One model, with all its served names."""

    names: list[str] = Field(description="the names that it answers to; the first is its label in /metrics")
    ready: bool = Field(
        description="it has answered its first prompt, and every agent of at least one group has answered lately"
    )
    context_length: Count = Field(description="tokens of a prompt and its answer together")
    max_running: Count = Field(description="seats, of all groups: the most requests that run at a time")
    running: Count = Field(description="requests with a seat")
    waiting: Count = Field(description="requests in the queue")
    cache_usage: float = Field(ge=0, le=1, description="share of the KV cache's blocks in use, the mean of all groups")
    prompt_tokens: Count = Field(description="of accepted requests, since the start")
    generation_tokens: Count = Field(description="of answers, since the start")
    preemptions: Count = Field(description="requests sent back to the queue for want of cache, since the start")
    agents: list[AgentStatus]
    groups: list[GroupStatus] = Field(description="one for each replica of the model")


class ServingStatus(BaseModel):
    """A deployment. Two answers give rates: the difference of a count over that of `uptime_seconds`."""

    version: str
    uptime_seconds: float = Field(ge=0, description="since the app was started")
    draining: bool = Field(description="the server is shutting down and takes no new requests")
    models: list[ModelStatus]
