"""All models of one deployment as the routes see them: by served name, ready or not, until the drain."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from config.serving_config import ANSWER_ENDS, CHAT_TEMPLATE, ModelConfig, ServingConfig
from server.chat_template import CHAT_TEMPLATES
from server.errors import InvalidRequest, NotServing, ShuttingDown, UnknownModel
from server.llm_server import LLMServer
from server.metrics import Metrics
from server.request import GenerationParams
from server.request_stream import RequestStream

WARM_UP_PROMPT = "test"
WARM_UP_TOKENS = 3

_log = logging.getLogger(__name__)


class ServedModel:
    """One model's LLMServer, and the prompts of its served names."""

    def __init__(self, model: ModelConfig, config: ServingConfig, metrics: Metrics) -> None:
        self.config = model
        self.server = LLMServer(model, config, metrics)
        self.warm = False
        self._chat_templates = {
            name: self.server.tokenizer.chat_template(CHAT_TEMPLATES[chosen])
            for name, chosen in model.chat_templates.items()
        }

    @property
    def agents(self) -> str:
        """Where its agents are, for messages: ``127.0.0.1:9821, 9822``."""
        return "; ".join(replica.agents.place for replica in self.server.replicas)

    @property
    def agents_now(self) -> str:
        """Where they are and how: ``agents at 127.0.0.1:9821 (restart 2 of 5)``."""
        return f"agents at {'; '.join(replica.agents_now for replica in self.server.replicas)}"

    @property
    def ready(self) -> bool:
        """It has answered its first prompt, and its agents answer still, those of one group at least."""
        return self.warm and self.server.ready

    async def start(self) -> None:
        """Connect to the agents, however long they take, and let them generate a first time."""
        await self.server.start()
        params = GenerationParams(max_new_tokens=WARM_UP_TOKENS)
        stream = await self._submit(self.config.names[0], WARM_UP_PROMPT, params, "warm-up")
        await stream.collect()
        self.warm = True

    async def submit(self, name: str, text: str, params: GenerationParams, request_id: str) -> RequestStream:
        """Queue ``text``, in the prompt template of ``name`` if it has one.

        Raises:
            ServingError: the request is refused, before anything is queued.
        """
        self._check_warm()
        return await self._submit(name, text, params, request_id)

    async def submit_all(
        self, prompt: str | Sequence[int], params: GenerationParams, n: int, request_id: str
    ) -> list[RequestStream]:
        """Queue ``n`` answers to a prompt as it is: text or token ids, no template.

        Raises:
            ServingError: the request is refused, before anything is queued.
        """
        self._check_warm()
        return await self.server.submit_all(prompt, params, n, request_id)

    def with_chat_end(self, name: str, params: GenerationParams) -> GenerationParams:
        """``params`` of an answer to a ``chat_prompt`` of ``name``, which ends where the template ends answers."""
        return self._with_end(self.config.chat_templates.get(name), params)

    def chat_prompt(
        self, name: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The prompt of a conversation in the chat template of ``name``, special tokens written out.

        Raises:
            InvalidRequest: there is no template, it refuses the messages, or it takes no tools.
        """
        if (chosen := self._chat_templates.get(name)) is None:
            return self.server.tokenizer.apply_chat_template(messages, tools=tools)
        if tools:
            raise InvalidRequest("this model's chat template shows it no tools; leave them out", "tools")
        return chosen.render(messages)

    def token(self, token_id: int) -> tuple[str, bool]:
        """A token's own text, and whether it is special: leaves no trace in an answer."""
        tokenizer = self.server.tokenizer
        return tokenizer.token_text(token_id), tokenizer.is_special(token_id)

    def _check_warm(self) -> None:
        if not self.warm:
            name = self.config.names[0]
            raise NotServing(f"{name} is not ready yet: it waits for its {self.agents_now}")

    async def _submit(self, name: str, text: str, params: GenerationParams, request_id: str) -> RequestStream:
        template = self.config.prompt_template(name)
        if template == CHAT_TEMPLATE:
            text = self.chat_prompt(name, [{"role": "user", "content": text}])
            params = dataclasses.replace(params, add_special_tokens=False)  # the template writes them out
        elif template is not None:
            text = template.replace("{prompt}", text)
            params = self._with_end(self.config.prompt_templates[name], params)
        return await self.server.submit(text, params, request_id)

    def _with_end(self, template: str | None, params: GenerationParams) -> GenerationParams:
        """End an answer at what models write there in this template: one of their tokens, or else a text."""
        end = ANSWER_ENDS.get(template or "")
        if end is None or params.ignore_eos:
            return params
        token_id = self.server.tokenizer.token_id(end)
        if token_id is None:
            return dataclasses.replace(params, stop=(*params.stop, end))
        return dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, token_id))


class Deployment:
    """The models of one configuration.

    Raises:
        ManifestError, TokenizerError: a model's folder cannot be used.
    """

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self.metrics = Metrics(config.metrics)
        self.models = tuple(ServedModel(model, config, self.metrics) for model in config.models)
        self._by_name = {name: model for model in self.models for name in model.config.names}
        self.created = int(time.time())  # seconds since 1970
        self.draining = False
        self._created = time.monotonic()
        self._starting: asyncio.Future[list[None]] | None = None

    @property
    def names(self) -> Collection[str]:
        """All served names."""
        return self._by_name.keys()

    @property
    def first_name(self) -> str:
        """The served name that is meant where a request gives none."""
        return self.models[0].config.names[0]

    @property
    def uptime_seconds(self) -> float:
        """Since the app was started."""
        return time.monotonic() - self._created

    def model(self, name: str) -> ServedModel:
        """The model that answers to ``name``.

        Raises:
            UnknownModel: none does.
        """
        if name not in self._by_name:
            raise UnknownModel(f"this model is not served; served are: {', '.join(self._by_name)}")
        return self._by_name[name]

    def log_prompt(self, request_id: str, name: str, text: str) -> None:
        """Note what a request asks of ``name``, if the operator wants prompts in the log."""
        if self.config.logging.prompts:
            _log.info("%s asks %s: %s", request_id, name, text)

    def check_ready(self) -> None:
        """Whether of every model all agents, or those of one group, have answered a step lately.

        Raises:
            NotServing: those of some model have not, or the deployment is stopping; the message says which.
        """
        if self.draining:
            raise ShuttingDown("the server is shutting down")
        waiting = [model for model in self.models if not model.ready]
        if waiting:
            where = "; ".join(f"{', '.join(model.config.names)}: {model.agents_now}" for model in waiting)
            raise NotServing(f"waiting for {where}")

    async def start(self) -> None:
        """Start all models, side by side; returns when each has answered its first prompt.

        Raises:
            AgentsRefused: a model's agents are there and cannot serve it.
            GenerationFailed: they cannot answer a first prompt.
        """
        self._starting = asyncio.gather(*(model.start() for model in self.models))
        await self._starting

    async def stop(self, drain_seconds: float) -> None:
        """Take no new requests, let the running ones finish within ``drain_seconds``, then end them."""
        self.draining = True
        if self._starting:
            self._starting.cancel()
        await asyncio.gather(*(model.server.stop(drain_seconds) for model in self.models))
