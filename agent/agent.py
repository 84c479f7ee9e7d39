"""The agent: it owns one device, receives plans, runs the model, samples, and replies."""

from __future__ import annotations

import logging
import os
import time

import numpy as np
from msgspec import structs

from agent.connection import Connection
from agent.intake import Checked, Intake, check
from agent.listener import Listener
from agent.logits import Logits
from agent.logprobs import token_logprobs
from agent.outbox import Outbox
from agent.protocol import Hello, StepError, StepOutput, StepPlan, pack_floats, pack_ints
from agent.runner import Runner, RunnerBroken
from agent.sampler import Sampler
from agent.step_batch import PlanError, StepBatch, StepSampling, StepShapes
from agent.step_digest import Digest
from config.grammar_engine import GrammarEngine
from config.serving_config import LimitsConfig

logger = logging.getLogger(__name__)


class Agent:
    """One rank of a model, with what its rows need for sampling. It knows seats, not requests."""

    def __init__(self, runner: Runner, limits: LimitsConfig, *, rank: int, world_size: int) -> None:
        manifest = runner.manifest
        most_tokens = min(
            limits.max_num_batched_tokens,
            manifest.capabilities.max_num_batched_tokens or limits.max_num_batched_tokens,
        )
        self._runner = runner
        self._broken: RunnerBroken | None = None
        engine = GrammarEngine(runner.folder, manifest)
        self._sampler = Sampler(limits.max_num_seqs, manifest.vocab_size, engine)
        self._shapes = StepShapes(
            vocab_size=manifest.vocab_size,
            context_length=manifest.context_length,
            block_size=manifest.block_size,
            num_blocks=runner.num_blocks,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=most_tokens,
        )
        self.hello = Hello(
            model=manifest.name,
            target=manifest.target,
            rank=rank,
            world_size=world_size,
            manifest_digest=manifest.digest(),
            num_blocks=runner.num_blocks,
            block_size=manifest.block_size,
            vocab_size=manifest.vocab_size,
            context_length=manifest.context_length,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=most_tokens,
            capabilities=manifest.capabilities,
            cache_dtype=runner.cache_dtype,
            pid=os.getpid(),
        )

    def warm_up(self) -> None:
        """Run a prefill and a decode step in the null block, so that the first request finds everything compiled."""
        self._runner.run(_probe(start=0, tokens=2))
        self._runner.run(_probe(start=2, tokens=1))

    def serve(self, listener: Listener) -> None:
        """Serve one server after the other until the listener is closed.

        Raises:
            RunnerBroken: the model cannot run any more; the server has been told of the step that failed.
        """
        while server := listener.next_server():
            try:
                self._serve(server, listener)
            except OSError as error:
                logger.warning("lost the server: %s", error)
            finally:
                server.close()

    def _serve(self, server: Connection, listener: Listener) -> None:
        self._sampler.clear()
        server.send(self.hello)
        with Intake(server, self._shapes) as intake, Outbox(server) as outbox:
            while (taken := intake.next()) and not listener.closed and server.replaced_by is None:
                outbox.put(self.run(*taken))
                if self._broken:
                    raise self._broken
        logger.info("the server has detached")

    def answer(self, plan: StepPlan) -> StepOutput | StepError:
        """Check and run one plan."""
        return self.run(plan, check(plan, self._shapes))

    def run(self, plan: StepPlan, checked: Checked) -> StepOutput | StepError:
        """Run a plan that was checked. An error is an answer too, and the agent serves on."""
        taken_up = time.perf_counter()
        try:
            if isinstance(checked, PlanError):
                raise checked
            return self._step(plan, *checked, taken_up)
        except PlanError as error:
            logger.error("step %d: refused: %s", plan.step_id, error, extra={"step_id": plan.step_id})
            return StepError(step_id=plan.step_id, message=f"refused: {error}")
        except Exception as error:
            logger.exception("step %d: failed", plan.step_id, extra={"step_id": plan.step_id})
            self._broken = error if isinstance(error, RunnerBroken) else None
            return StepError(step_id=plan.step_id, message=f"{type(error).__name__}: {error}")

    def _step(
        self, plan: StepPlan, batch: StepBatch, sampling: StepSampling, digest: Digest, taken_up: float
    ) -> StepOutput:
        for reset in plan.resets:
            self._sampler.reset(reset)
        if not self._sampler.holds(sampling.seats):
            raise PlanError("seats: one of a sampled row holds no request")
        if sampling.latest_places.size:
            latest = self._sampler.latest(sampling.latest_seats)
            if latest.min() < 0:
                raise PlanError("token_ids: a row's latest token is asked for, and its seat has got none")
            batch.token_ids[sampling.latest_places] = latest
            digest.update(pack_ints(latest))
        self._runner.agree(digest.digest())
        if sampling.block_copies.size:
            self._runner.copy_blocks(sampling.block_copies)
        started = time.perf_counter()
        best_only = not sampling.prompt_targets.size and self._sampler.takes_best(sampling.seats)
        logits = self._runner.run(batch, best_only=best_only)
        device_seconds = time.perf_counter() - started
        if best_only:
            output = StepOutput(
                step_id=plan.step_id, token_ids=pack_ints(self._sampler.take_best(logits, sampling.seats))
            )
        else:
            output = self._sampled(plan.step_id, logits, sampling)
        digest.update(output.token_ids)
        return structs.replace(
            output,
            digest=digest.digest(),
            device_seconds=device_seconds,
            step_seconds=time.perf_counter() - taken_up,
        )

    def _sampled(self, step_id: int, logits: Logits, sampling: StepSampling) -> StepOutput:
        """The next tokens of rows that want any of what sampling can do, and the log-probabilities of known ones."""
        sampled, known = logits[: sampling.seats.size], logits[sampling.seats.size :]
        token_ids = self._sampler.sample(sampled, sampling.seats)
        logprobs, top_ids, top_values = self._sampler.logprobs(sampled, sampling.seats, token_ids)
        places = np.arange(len(known))
        prompt_logprobs, prompt_top_ids, prompt_top_values = token_logprobs(
            known, places, sampling.prompt_targets, np.full_like(places, sampling.prompt_top_logprobs)
        )
        return StepOutput(
            step_id=step_id,
            token_ids=pack_ints(token_ids),
            failed_rows=pack_ints(self._sampler.failed(sampling.seats)),
            logprobs=pack_floats(logprobs),
            top_ids=pack_ints(top_ids),
            top_logprobs=pack_floats(top_values),
            prompt_logprobs=pack_floats(prompt_logprobs),
            prompt_top_ids=pack_ints(prompt_top_ids),
            prompt_top_logprobs=pack_floats(prompt_top_values),
        )


def _probe(start: int, tokens: int) -> StepBatch:
    """A row in the null block with ``tokens`` new tokens after ``start`` cached ones."""
    places = np.arange(start, start + tokens, dtype=np.int32)
    return StepBatch(
        token_ids=np.zeros(tokens, np.int32),
        positions=places,
        slot_mapping=places,
        block_tables=np.zeros((1, 1), np.int32),
        query_lens=np.array([tokens], np.int32),
        context_lens=np.array([start + tokens], np.int32),
        logits_indices=np.array([tokens - 1], np.int32),
    )
