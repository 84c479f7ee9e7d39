"""LLMServer: one model behind its agents. Accepts requests, streams their answers; speaks no HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec

from config.grammar_engine import GrammarEngine
from config.manifest import read_manifest, verify_files
from config.serving_config import ModelConfig, ServingConfig
from server.answer import Answer
from server.errors import ContextExceeded, InvalidRequest, NotServing, Overloaded, ShuttingDown
from server.grammar import GrammarCompiler
from server.metrics import Metrics, ModelMetrics
from server.replicas import Replicas
from server.request import GenerationParams, Request
from server.request_stream import RequestStream
from server.step import MAX_PROMPT_LOGITS
from server.tokenizer import CHAT_TEMPLATE_FILE, TOKENIZER_FILE, Tokenizer

ENCODE_IN_THREAD = 4096  # characters of a prompt that take long enough (about 4 ms) to be worth a thread

_log = logging.getLogger(__name__)


class LLMServer:
    """One model of a deployment, from text or token ids to streamed answers.

    Attributes:
        model: its configuration.
        manifest: what its export says of it.
        tokenizer: its text side, for prompts, chat messages and the texts of single tokens.
        replicas: the groups of its agents, to look at.

    Raises:
        ManifestError: the model's folder holds no exported model.
        TokenizerError: its tokenizer or chat template is not supported.
    """

    def __init__(self, model: ModelConfig, config: ServingConfig, metrics: Metrics | None = None) -> None:
        """``metrics`` is shared by the models of one app; without it they are counted and not shown."""
        self.model = model
        self.manifest = read_manifest(model.path)
        texts = {name: digest for name, digest in self.manifest.files.items() if name in _TEXT_FILES}
        verify_files(model.path, msgspec.structs.replace(self.manifest, files=texts))
        self.tokenizer = Tokenizer(model.path, self.manifest.tokenizer)
        self._limits = config.limits
        self._grammars = GrammarCompiler(GrammarEngine(model.path, self.manifest), config.limits)
        self._metrics = ModelMetrics(metrics or Metrics(), model.names[0])
        self.replicas = Replicas(model, config, self.manifest, self._metrics)
        self._accepting = False
        self._preparing = 0  # requests whose prompt or grammar is being prepared; they count as waiting
        # One long prompt at a time: each takes memory many times its size, and they would hold up each other.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")

    @property
    def name(self) -> str:
        """The first of the served names."""
        return self.model.names[0]

    @property
    def ready(self) -> bool:
        """Whether requests are accepted and every agent of a group, be it one of several, has answered lately."""
        return self._accepting and self.replicas.ready

    @property
    def batch_size(self) -> int:
        """Rows of the steps that are running."""
        return sum(replica.batch_size for replica in self.replicas)

    @property
    def num_waiting(self) -> int:
        """Requests in the queues."""
        return self.replicas.num_waiting

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its answer together: what the model was made for, or what its caches hold."""
        most = self.replicas.max_model_len
        return self.manifest.context_length if most is None else most

    async def start(self) -> None:
        """Wait for the agents, for those of one group if there are several, and begin to serve.

        Raises:
            AgentsRefused: the agents that are there cannot serve this model.
        """
        await self.replicas.start()
        self._accepting = True

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Accept nothing more, let what runs finish within ``drain_seconds``, abort the rest and leave the agents.

        Called again meanwhile, with less time, the shorter time holds.
        """
        self._accepting = False
        if not await self.replicas.drained(drain_seconds):
            _log.warning("%s: not all requests finished within %g s; they are aborted", self.name, drain_seconds)
        await self.replicas.stop()
        self._encoder.shutdown(wait=False)
        self._grammars.close()

    async def submit(
        self, prompt: str | Sequence[int], params: GenerationParams, request_id: str | None = None
    ) -> RequestStream:
        """Queue a request. ``prompt`` is text or token ids, ``request_id`` stands in the logs.

        Raises:
            InvalidRequest: a field cannot be used; nothing was queued.
            Overloaded: the queue is full.
            NotServing: the server is not started, or stopping, or its agents are away for longer than a restart takes.
        """
        return (await self.submit_all(prompt, params, 1, request_id))[0]

    async def submit_all(
        self, prompt: str | Sequence[int], params: GenerationParams, n: int, request_id: str | None = None
    ) -> list[RequestStream]:
        """Queue ``n`` answers to one prompt, all or none. Answer i draws with the seed plus i.

        Raises:
            InvalidRequest, Overloaded, NotServing: as of ``submit``.
        """
        self._check_open()
        self._check_room(n)
        self._preparing += n
        try:
            prompt_ids = await self._prompt_ids(prompt, params)
            params = await self._with_grammar(params)
        finally:
            self._preparing -= n
        self._check_open()
        self._check_scores(params, len(prompt_ids))
        params = self._with_end_tokens(params)
        max_new_tokens = self._max_new_tokens(params, len(prompt_ids))
        request_id = request_id or uuid.uuid4().hex
        answers = [
            Answer(
                Request(
                    request_id=request_id if n == 1 else f"{request_id}-{index}",
                    prompt_ids=prompt_ids,
                    params=_with_seed(params, params.sampling.seed + index),
                    arrival=time.monotonic(),
                    max_new_tokens=max_new_tokens,
                ),
                self.tokenizer,
            )
            for index in range(n)
        ]
        for answer in answers[1:]:
            answer.request.leader = answers[0].request
        self._metrics.n.observe(n)
        self.replicas.add(answers)
        return [
            RequestStream(answer.request, answer.mailbox, partial(self.replicas.abort, answer.request))
            for answer in answers
        ]

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, as ``submit`` makes them; nothing is queued.

        Raises:
            InvalidRequest: it is no valid Unicode text.
            Overloaded, NotServing: as of ``submit``.
        """
        self._check_open()
        self._check_room(1)
        self._preparing += 1
        try:
            return await self._text_ids(text, GenerationParams(add_special_tokens=add_special_tokens))
        finally:
            self._preparing -= 1

    def check_token_ids(self, ids: Sequence[int], field: str) -> None:
        """Whether the model has these tokens.

        Raises:
            InvalidRequest: it has not; ``field`` is to blame.
        """
        vocab_size = self.manifest.vocab_size
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(f"token id {token_id} is outside 0 … {vocab_size - 1}", field)

    def _check_open(self) -> None:
        if not self._accepting:
            if self.replicas.met:
                raise ShuttingDown("the server is stopping")
            raise NotServing("the server waits for its agents")
        if self.replicas.given_up:
            raise NotServing("the agents do not answer")

    def _check_room(self, n: int) -> None:
        waiting = self.num_waiting + self._preparing
        if waiting + n > self._limits.max_waiting:
            raise Overloaded(f"{waiting} requests are waiting already; try again later")

    async def _prompt_ids(self, prompt: str | Sequence[int], params: GenerationParams) -> list[int]:
        """The prompt's tokens, cut as asked and checked."""
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequest("is empty", "prompt")
            ids = await self._text_ids(prompt, params)
        else:
            ids = list(prompt)
            self.check_token_ids(ids, "prompt")
            if params.truncate is not None:
                ids = ids[-params.truncate :]
        if not ids:
            raise InvalidRequest("is empty", "prompt")
        if len(ids) >= self.max_model_len:
            room = f"the context of {self.max_model_len} leaves no room for an answer"
            raise ContextExceeded(f"has {len(ids)} tokens; {room}", "prompt")
        if len(ids) > (most := self._limits.max_prompt_tokens or len(ids)):
            raise InvalidRequest(f"has {len(ids)} tokens; this server takes {most}", "prompt")
        return ids

    async def _text_ids(self, text: str, params: GenerationParams) -> list[int]:
        encode = partial(self._encode, text, params)
        in_thread = asyncio.get_running_loop().run_in_executor
        return await in_thread(self._encoder, encode) if len(text) > ENCODE_IN_THREAD else encode()

    def _encode(self, text: str, params: GenerationParams) -> list[int]:
        """The tokens of ``text``, cut as asked. Long texts come here in a thread, one after another."""
        self._check_open()  # who waited for the thread while the server stopped is not tokenized any more
        ids = self.tokenizer.encode(text, params.add_special_tokens)
        if params.truncate is None:
            return ids
        rules = self.manifest.tokenizer
        begins = params.add_special_tokens and rules.add_bos and ids[:1] == [rules.bos_token_id]
        kept = ids[:1] if begins else []  # a prompt without its begin token is not what the model was trained on
        return kept + ids[max(len(kept), len(ids) + len(kept) - params.truncate) :]

    def _max_new_tokens(self, params: GenerationParams, prompt_tokens: int) -> int:
        """The most tokens that the answer may have."""
        left = self.max_model_len - prompt_tokens
        most = self._limits.max_new_tokens or left
        wanted = params.max_new_tokens
        if wanted is None:
            wanted = min(left, most, params.default_max_new_tokens or left)
        if wanted < 1:
            raise InvalidRequest("must be at least 1", "max_new_tokens")
        if wanted > left:
            context = f"the context of {self.max_model_len} tokens leaves after the prompt's {prompt_tokens}"
            raise ContextExceeded(f"{wanted} is more than the {left} that {context}", "max_new_tokens")
        if wanted > most:
            raise InvalidRequest(f"{wanted} is more than the {most} that this server gives", "max_new_tokens")
        if params.sampling.min_new_tokens > wanted:
            raise InvalidRequest(f"is more than the {wanted} tokens that the answer may have", "min_new_tokens")
        return wanted

    def _check_scores(self, params: GenerationParams, prompt_tokens: int) -> None:
        """Whether the graphs can tell what they make of the prompt, if that is asked for."""
        if not params.prompt_logprobs:
            return
        can, most = self.manifest.capabilities, MAX_PROMPT_LOGITS + 1  # the first token has no log-probability
        if not can.prompt_logits:
            raise InvalidRequest("this model's graphs say nothing of a prompt's own tokens", "prompt_logprobs")
        if not can.cached_context and prompt_tokens > most:
            taken = f"this model's graphs take a prompt whole, and score one of {most} at most"
            raise InvalidRequest(f"the prompt has {prompt_tokens} tokens; {taken}", "prompt_logprobs")

    def _with_end_tokens(self, params: GenerationParams) -> GenerationParams:
        """Fill in which tokens end the answer, and check what else the scheduler relies on."""
        self.check_token_ids(params.stop_token_ids, "stop_token_ids")
        self.check_token_ids([token_id for token_id, _ in params.sampling.logit_bias], "logit_bias")
        if not all(params.stop):
            raise InvalidRequest("holds an empty string", "stop")
        eos = () if params.ignore_eos else self.tokenizer.eos_token_ids
        ends = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
        return dataclasses.replace(params, sampling=msgspec.structs.replace(params.sampling, end_token_ids=ends))

    async def _with_grammar(self, params: GenerationParams) -> GenerationParams:
        """Fill in what the agents need to keep to the request's constraint."""
        if params.constraint is None:
            return params
        if params.ignore_eos:
            raise InvalidRequest("cannot go with a constrained answer: only the end token can end one", "ignore_eos")
        grammar = await self._grammars.compile(params.constraint)
        return dataclasses.replace(params, sampling=msgspec.structs.replace(params.sampling, grammar=grammar))


def _with_seed(params: GenerationParams, seed: int) -> GenerationParams:
    sampling = msgspec.structs.replace(params.sampling, seed=seed & (1 << 64) - 1)
    return dataclasses.replace(params, sampling=sampling)


_TEXT_FILES = (TOKENIZER_FILE, CHAT_TEMPLATE_FILE)
