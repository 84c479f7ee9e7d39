"""What an agent needs of a model, and which of the runners a model gets."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from agent.logits import Logits
from agent.placement import Place
from agent.protocol import Ints
from agent.step_batch import StepBatch
from config.manifest import Manifest, read_manifest
from config.serving_config import LimitsConfig, ModelConfig


class RunnerBroken(RuntimeError):
    """A step failed in a way that no later step of this runner survives: the process has to start anew."""


def first_line(error: Exception) -> str:
    """What MindSpore says is wrong, without the pages that follow; its type where it says nothing."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


class Runner(Protocol):
    """One rank of a model with its key/value cache."""

    folder: Path  # of the exported model
    manifest: Manifest
    num_blocks: int  # of the cache, with the null block
    cache_dtype: str

    def copy_blocks(self, copies: Ints) -> None:
        """Copy the keys and values of blocks in all layers, from and to ``[C, 2]``; no block is copied from and to.

        Raises:
            RunnerBroken: the copy failed, and so will all steps.
        """
        ...

    def agree(self, digest: bytes) -> None:
        """See that all ranks are about to run the same step, which ``digest`` (at least 8 bytes) stands for.

        It waits for the others, and does nothing where no rank computes with another.

        Raises:
            RunnerBroken: they are not.
        """
        ...

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        """Run the model on new tokens and write their keys and values: the logits of the L wanted positions.

        ``best_only``: of each position nothing but the best token is asked for, so ``Candidates`` will do.

        Raises:
            RunnerBroken: the step failed, and so will all others.
        """
        ...


def open_runner(config: ModelConfig, place: Place, limits: LimitsConfig) -> Runner:
    """The runner of one rank of a model, ready to run steps within ``limits``.

    Raises:
        ManifestError: the folder holds no model that can be run.
    """
    folder = Path(config.path)
    if config.target == "standin":
        from agent.arithmetic_model import ArithmeticModel

        assert config.cache_bytes is not None, "the configuration was checked"
        return ArithmeticModel(
            folder,
            cache_bytes=config.cache_bytes,
            step_seconds=config.step_seconds,
            faults=config.standin_faults,
            rank=place.rank,
        )
    if config.runtime == "mindspore_lite":
        from agent.lite_runner import LiteRunner

        return LiteRunner(config, limits, rank=place.rank, device=place.device)
    # Imported here, because a stand-in runs where MindSpore is not installed
    memory, dtype, threads = config.cache_bytes, config.cache_dtype, place.threads
    pair = read_manifest(folder).pair
    if config.target == "ascend" and not pair:
        from agent.ascend_runner import open_ascend_runner

        return open_ascend_runner(folder, place, cache_bytes=memory, cache_dtype=dtype, limits=limits)
    assert memory is not None, "only an NPU's memory is left to its agent, and preflight has seen to pairs"
    if pair:
        from agent.paged_pair_runner import PagedPairRunner

        return PagedPairRunner(folder, device=place.device, cache_bytes=memory, cache_dtype=dtype, threads=threads)
    from agent.model_runner import ModelRunner

    return ModelRunner(folder, place.rank, cache_bytes=memory, cache_dtype=dtype, threads=threads)
