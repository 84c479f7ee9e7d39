"""Run one rank of a paged pair with MindSpore Lite: both graphs compiled by GE, on one set of weights and one cache.

It is for Ascend hosts. No device has run it yet: it is tested against a stand-in for Lite's Python interface only.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from agent.cache_probe import one_row, prove_sharing
from agent.lite_gears import Gear, GearError, Gears, GraphInput, needed_gears
from agent.lite_ini import own_ini, pair_gears, write_ini
from agent.logits import Logits
from agent.paged_inputs import CallLimits, PagedCall, Phase, paged_calls
from agent.protocol import Floats, Ints
from agent.runner import RunnerBroken, first_line
from agent.step_batch import StepBatch
from config.manifest import ManifestError, PagedPair, read_manifest, verify_rank
from config.serving_config import LimitsConfig, ModelConfig

SHARING_TOLERANCE = 5e-2  # of the start-up proof, relative to the largest logit: caches and sums of 16 bits
WHERE_FROM = (
    "the wheel of MindSpore Lite is in its package for Ascend hosts, which mindspore.cn offers for download "
    "(what PyPI has of that name is an old release without Ascend)"
)

logger = logging.getLogger(__name__)


class LiteRunner:
    """One rank of a pair on an Ascend device, ready to run when constructed."""

    def __init__(self, config: ModelConfig, limits: LimitsConfig, *, rank: int, device: int) -> None:
        """Load, share, prove.

        Args:
            config: of the model, with runtime mindspore_lite.
            limits: the steps that there can be.
            rank: of this process in its group.
            device: among those that this process sees.

        Raises:
            ManifestError: the folder holds no pair that this machine can run, or its gears do not cover the limits.
            RunnerBroken: a first call of one of its graphs failed.
        """
        self.folder = Path(config.path)
        self.manifest = read_manifest(self.folder)
        if self.manifest.pair is None:
            raise ManifestError(f"{self.folder}: holds no adopted pair; runtime mindspore runs it")
        pair = self.manifest.pair
        own = verify_rank(self.folder, self.manifest, rank)
        self.num_blocks = pair.num_blocks
        self.cache_dtype = pair.cache_dtype
        try:
            self._gears = pair_gears(config, limits, self.manifest)
        except GearError as error:
            raise ManifestError(str(error)) from None
        needed = needed_gears(self.manifest, limits)
        self._limits = CallLimits(
            prompts=self._gears["prefill"].most_rows(needed["prefill"]),
            prompt_tokens=needed["prefill"].length,
            tokens=self._gears["decode"].most_rows(needed["decode"]),
            padding_slot=pair.padding_slot,
        )
        self._lite = import_lite()
        self._graphs: dict[Phase, LiteGraph] = {}
        self._build(own, pair, config, rank, device)
        prove_sharing(
            self,
            SHARING_TOLERANCE,
            otherwise="prefill and decode do not share their cache and weights",
            advice="this version of MindSpore Lite cannot serve the pair",
        )

    def agree(self, digest: bytes) -> None:
        """Nothing: Lite has no collective to ask the other ranks with. That all are sent the same is for the server."""

    def copy_blocks(self, copies: Ints) -> None:
        """Not with a pair: its cache is inside Lite. Its capabilities say so, and no scheduler asks for it."""
        raise RuntimeError(f"copy of {len(copies)} blocks: the cache of a pair cannot be copied")

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        """Run the model on new tokens and write their keys and values: the logits of the L wanted positions.

        They are whole even where ``best_only`` asks for less: each rank has them all.

        Raises:
            RunnerBroken: a call failed; whether the device does another after that is not known.
        """
        logits = np.empty((batch.logits_indices.size, self.manifest.vocab_size), dtype=np.float32)
        for call in paged_calls(batch, self._limits):
            logits[call.places] = self._call(call)[call.rows]
        return Logits.of(logits)

    def _call(self, call: PagedCall) -> Floats:
        """The logits of the last token of every row of a gear, ``[B, vocab]``."""
        return self._predict(call, self._gears[call.phase].gear_of(call, self.manifest.block_size))

    def _predict(self, call: PagedCall, gear: Gear) -> Floats:
        padded = call.padded(rows=gear.rows, length=gear.length, width=gear.width)
        try:
            answer = self._graphs[call.phase].predict(padded, gear)
        except RuntimeError as error:
            raise RunnerBroken(f"{call.phase} of {gear}: {first_line(error)}") from error
        return padded.last_logits(answer, self.manifest.vocab_size)

    def _build(self, folder: Path, pair: PagedPair, config: ModelConfig, rank: int, device: int) -> None:
        """Both graphs of a folder, which share weights and cache: Lite has to know that before it builds the first.

        One is built and called before the other is, as the system did that such pairs were made for.
        """
        context = ascend_context(self._lite, rank, device)
        models = {phase: self._lite.Model() for phase in self._gears}
        group = self._lite.ModelGroup(self._lite.ModelGroupFlag.SHARE_WEIGHT)
        group.add_model(list(models.values()))
        files = {"prefill": folder / pair.prefill.file, "decode": folder / pair.decode.file}
        for phase, gears in self._gears.items():
            logger.info("building %s for %d gears", files[phase], len(gears.gears))
            with tempfile.TemporaryDirectory(prefix="lite-") as scratch:
                ini = own_ini(config, phase)
                if ini is None:
                    ini = Path(scratch) / f"{phase}.ini"
                    write_ini(ini, gears)
                build(self._lite, models[phase], files[phase], context, ini, config.rank_table)
            self._graphs[phase] = LiteGraph(self._lite, models[phase], gears)
            self._warm_up(gears)

    def _warm_up(self, gears: Gears) -> None:
        """Call a graph once in every gear, in the null block: GE may put off the work for a shape until then."""
        num_tokens = 2 if gears.phase == "prefill" else 1
        batch = one_row([0] * num_tokens, first=0, block=0, block_size=self.manifest.block_size)
        [call] = paged_calls(batch, self._limits)
        for gear in gears.gears:
            if gear.length >= num_tokens:
                self._predict(call, gear)


class LiteGraph:
    """One built graph, which is given its inputs in its own order."""

    def __init__(self, lite: Any, model: Any, gears: Gears) -> None:
        """Look at what the graph takes.

        Raises:
            ManifestError: that is not what the manifest says.
        """
        self._tensor = lite.Tensor
        self._model = model
        known = {graph_input.name: graph_input for graph_input in gears.inputs}
        names = [str(tensor.name) for tensor in model.get_inputs()]
        if sorted(names) != sorted(known):
            raise ManifestError(
                f"the {gears.phase} graph takes {', '.join(names)}, and the manifest says {', '.join(known)}; "
                "make the folder again"
            )
        self._inputs: list[GraphInput] = [known[name] for name in names]

    def predict(self, call: PagedCall, gear: Gear) -> Floats:
        """The logits of a call that was padded to a gear, in the graph's shape: ``[B, vocab]`` or ``[B, S, vocab]``.

        Raises:
            RuntimeError: the call failed.
        """
        arrays = [call.input(each.role).reshape(gear.shape(each)).astype(each.dtype) for each in self._inputs]
        inputs = [self._tensor(np.ascontiguousarray(array)) for array in arrays]
        logits: Floats = self._model.predict(inputs)[0].get_data_to_numpy().astype(np.float32)
        return logits


def ascend_context(lite: Any, rank: int, device: int) -> Any:
    """Where both graphs run."""
    context = lite.Context()
    context.ascend.device_id = device
    context.ascend.rank_id = rank
    context.ascend.provider = "ge"
    context.target = ["Ascend"]
    return context


def build(lite: Any, model: Any, path: Path, context: Any, ini: Path, rank_table: str | None) -> None:
    """Let Lite compile one graph.

    Raises:
        ManifestError: it does not.
    """
    overrides = {"ascend_context": {"rank_table_file": rank_table}} if rank_table else None
    try:
        model.build_from_file(str(path), lite.ModelType.MINDIR, context, str(ini), overrides)
    except RuntimeError as error:
        raise ManifestError(
            f"{path}: MindSpore Lite {lite.__version__} does not build it: {str(error).strip()}. A MindIR needs a Lite "
            "of the MindSpore that wrote it, or of a later one"
        ) from None


def import_lite() -> Any:
    """The package, which has no types.

    Raises:
        ManifestError: it is not installed, or not whole.
    """
    try:
        return importlib.import_module("mindspore_lite")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "mindspore_lite"
        advice = WHERE_FROM if missing else "run the set_env.sh of CANN before the agents start"
        raise ManifestError(f"mindspore_lite cannot be imported: {error}; {advice}") from None
