"""``python -m models.adopt``: paged MindIR files that another exporter wrote become a model folder of ours.

They are a pair, prefill and decode, or one for each rank of a model. The graphs stay as they are, linked into the
folder rather than copied where the file system can. What is added is what a server must know of them: the manifest,
with what such graphs can do, and the text side from a tokenizer's folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from config.manifest import (
    Capabilities,
    GraphTensor,
    Manifest,
    PagedGraph,
    PagedPair,
    TokenizerRules,
    folder_digests,
    rank_folder,
    write_manifest,
)
from models import mindir
from models.checkpoint_error import CheckpointError
from models.config_fields import ConfigFields
from models.contract import Contract, Device, collectives_of, explain, mismatches, obstacles, read_contract
from models.export import check_replaceable, exclusive, rewriting
from models.generations import SERVED, TABLES, TOKENS, Roles
from models.graph_file import GraphFile
from models.huggingface_config import CONFIG_FILE, ConfigFile
from models.huggingface_text import huggingface_text
from models.pair_weights import check_weights
from models.rank_pairs import disagreements

MIN_BLOCKS = 3  # the null block, and two for the proof that prefill and decode share a cache
GRAPH_FILE = "graph.mindir"  # of several ranks, whose files had names of their own: a manifest is for all ranks alike

Pair = tuple[Path, Path]  # prefill, decode


@dataclass(frozen=True, kw_only=True)
class AdoptOptions:
    """What a user may choose."""

    target: Literal["auto", "cpu", "ascend"] = "auto"  # auto: a CPU where the graphs run on one
    context_length: int | None = None  # tokens; None: what tables, cache and config.json allow
    padding_slot: Literal[-1, 0] | None = None  # None: what exporters of the pair's generation wrote


def adopt(pairs: Sequence[Pair], tokenizer: Path, folder: Path, options: AdoptOptions) -> Manifest:
    """Make ``folder`` a model folder of a pair, or of one for each rank in their order, in the place of an earlier one.

    Raises:
        mindir.MindIRError: a file is missing, or no MindIR.
        CheckpointError: the pairs cannot be served, or the tokenizer's folder is of no use; the message says why.
        OSError: the disk is full, or the folder cannot be written.
    """
    ranks = [read_contract(*pair) for pair in pairs]
    target = choose_target(ranks, options.target)
    check_weights(ranks)
    config = config_of(tokenizer)
    assert ranks[0].vocab_size, "a pair that is served has a vocabulary"
    text = huggingface_text(tokenizer, config, ranks[0].vocab_size)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder), rewriting(folder) as fresh:
        for rank, contract in enumerate(ranks):
            for phase, graph, _ in contract.graphs:
                place = fresh / rank_folder(rank, len(ranks)) / phase
                link_graph(graph, place, graph_name(ranks, graph))
        text.write(fresh)
        files = folder_digests(fresh)
        manifest = describe(
            ranks, options, config.fields, name=folder.name, target=target, files=files, rules=text.rules
        )
        write_manifest(fresh, manifest)
    return manifest


def config_of(folder: Path) -> ConfigFields:
    """What the ``config.json`` of a tokenizer's folder says: nothing if there is none."""
    path = folder / CONFIG_FILE
    return ConfigFile(path) if path.is_file() else ConfigFields(path, {})


def choose_target(ranks: Sequence[Contract], wish: Literal["auto", "cpu", "ascend"]) -> Device:
    """The kind of device that the pairs are to run on.

    Raises:
        CheckpointError: they cannot, with the whole explanation.
    """
    for rank, contract in enumerate(ranks):
        sound = contract.generation in SERVED and not any(mismatches(contract))
        if not sound or any(obstacles(contract, "mindspore_lite")):
            raise CheckpointError(f"rank {rank}: {explain(contract)}" if len(ranks) > 1 else explain(contract))
    if len(ranks) > 1:
        for problem in disagreements(ranks):
            raise CheckpointError(problem)
        if wish == "cpu":
            raise CheckpointError("--target cpu: ranks of another exporter run with MindSpore Lite on Ascend only")
        return "ascend"
    [contract] = ranks
    runs_on_cpu = not any(obstacles(contract, "cpu"))
    if collectives_of(contract) or (wish == "cpu" and not runs_on_cpu):
        raise CheckpointError(f"--target cpu: {explain(contract)}" if wish == "cpu" else explain(contract))
    return "cpu" if runs_on_cpu and wish != "ascend" else "ascend"


def link_graph(graph: GraphFile, folder: Path, name: str) -> None:
    """The graph as ``name``, and the files of its weights as it names them, in ``folder``, which is made."""
    for source, target in ((graph.path.name, folder / name), *((file, folder / file) for file in graph.variables)):
        target.parent.mkdir(parents=True, exist_ok=True)
        mindir.link_or_copy((graph.path.parent / source).resolve(), target)


def graph_name(ranks: Sequence[Contract], graph: GraphFile) -> str:
    """What a graph is called in the folder of its rank and phase."""
    return GRAPH_FILE if len(ranks) > 1 else graph.path.name


def describe(
    ranks: Sequence[Contract],
    options: AdoptOptions,
    config: Mapping[str, Any],
    *,
    name: str,
    target: Device,
    files: dict[str, str],
    rules: TokenizerRules,
) -> Manifest:
    """The manifest of all ranks, which are alike but for their weights.

    Raises:
        CheckpointError: their cache is too small, for any use or for the context that was asked for.
    """
    contract = ranks[0]
    cache = contract.cache
    assert cache, "a pair that is served has caches"
    assert contract.vocab_size, "and a vocabulary"
    num_blocks, block_size, cache_heads, head_dim = cache.shape
    num_kv_heads = cache_heads * len(ranks)
    if num_blocks < MIN_BLOCKS:
        raise CheckpointError(f"its cache has {num_blocks} blocks; at least {MIN_BLOCKS} are needed")
    width = contract.sizes("prefill", TOKENS)[1]
    digest = hashlib.sha256("".join(f"{file} {files[file]}\n" for file in sorted(files)).encode())
    padding_slot = options.padding_slot
    if padding_slot is None:
        padding_slot = 0 if contract.generation == "paged" else -1
    return Manifest(
        name=name,
        architecture=f"mindir, {contract.generation}",
        target=target,
        source=contract.prefill.path.name,
        source_digest=digest.hexdigest(),
        world_size=len(ranks),
        weights="none",
        num_layers=len(contract.prefill.caches) // 2,
        num_heads=config.get("num_attention_heads") or num_kv_heads,  # graphs do not say it, and nothing here needs it
        num_kv_heads=num_kv_heads,
        cache_heads=cache_heads,
        head_dim=head_dim,
        vocab_size=contract.vocab_size,
        context_length=context_length(contract, config, options.context_length),
        block_size=block_size,
        cache_write="graph",
        capabilities=Capabilities(
            cached_context=False,
            mixed_steps=False,
            prompt_logits=False,
            max_num_batched_tokens=width if width > 0 else None,
        ),
        tokenizer=rules,
        pair=PagedPair(
            prefill=paged_graph(
                "prefill", graph_name(ranks, contract.prefill), contract.prefill, contract.prefill_roles
            ),
            decode=paged_graph("decode", graph_name(ranks, contract.decode), contract.decode, contract.decode_roles),
            num_blocks=num_blocks,
            cache_dtype=cache.dtype,
            padding_slot=padding_slot,
        ),
        files=files,
    )


def context_length(contract: Contract, config: Mapping[str, Any], wish: int | None) -> int:
    """Tokens of a prompt and its answer: what was asked for, or else all that tables, cache and network allow.

    Raises:
        CheckpointError: more is asked for than the graphs can hold.
    """
    assert contract.cache, "a pair that is served has caches"
    num_blocks, block_size, *_ = contract.cache.shape
    width = contract.sizes("decode", TABLES)[1]
    held = block_size * min(num_blocks - 1, width if width > 0 else num_blocks)
    if wish is not None and wish > held:
        raise CheckpointError(f"--context-length: {wish} is more than the {held} tokens that the graphs can hold")
    trained = config.get("max_position_embeddings")
    return wish or (min(held, trained) if isinstance(trained, int) else held)


def paged_graph(phase: str, name: str, graph: GraphFile, roles: Roles) -> PagedGraph:
    """Where a graph is in its rank's folder, and how it is fed."""
    named = zip(graph.inputs, roles, strict=True)
    inputs = tuple(GraphTensor(name=role.name, dtype=tensor.dtype, shape=tensor.shape) for tensor, role in named)
    return PagedGraph(file=f"{phase}/{name}", inputs=inputs, names=tuple(tensor.name for tensor in graph.inputs))


def settings(manifest: Manifest) -> str:
    """The keys of the deployment file that an adopted model needs."""
    pair = manifest.pair
    assert pair, "an adopted model has one"
    size = pair.num_blocks * manifest.cache_block_bytes(pair.cache_dtype)
    keys = f"target: {manifest.target}, cache_dtype: {pair.cache_dtype}, cache_memory: {size}B or more"
    if manifest.world_size == 1:
        return keys
    return f"{keys}, runtime: mindspore_lite, {manifest.world_size} agent_ports, rank_table: the file of HCCL's ranks"


def parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, list[Pair]]:
    """The options, and the pairs in the order of their ranks."""
    parser = argparse.ArgumentParser(prog="python -m models.adopt", description=__doc__.splitlines()[0])
    parser.add_argument("prefill", type=Path, nargs="?", help="the MindIR of the prompt (older name: full model)")
    parser.add_argument(
        "decode", type=Path, nargs="?", help="the MindIR of the next token (older name: incremental model)"
    )
    parser.add_argument(
        "--rank",
        type=Path,
        nargs=2,
        action="append",
        default=[],
        metavar=("PREFILL", "DECODE"),
        help="in the place of prefill and decode, once for each rank of a model of several, in their order",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json or tokenizer.model")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--target", choices=("auto", "cpu", "ascend"), default="auto")
    parser.add_argument(
        "--context-length", type=int, help="serve at most this many tokens; default: what the pair holds"
    )
    parser.add_argument(
        "--padding-slot", type=int, choices=(-1, 0), help="slot of padded tokens; default: 0 for generation C, -1 for D"
    )
    args = parser.parse_args(arguments)
    if args.context_length is not None and args.context_length < 1:
        parser.error("--context-length: must be at least 1")
    pairs = [(prefill, decode) for prefill, decode in args.rank]
    if args.prefill and args.decode:
        pairs.append((args.prefill, args.decode))
    if not pairs or (args.rank and args.prefill):
        parser.error("give prefill and decode, or --rank PREFILL DECODE for each rank")
    return args, pairs


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 1 with a reason on stderr."""
    args, pairs = parsed(arguments)
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's errors, not its warnings
    options = AdoptOptions(target=args.target, context_length=args.context_length, padding_slot=args.padding_slot)
    try:
        manifest = adopt(pairs, args.tokenizer, args.output, options)
    except (CheckpointError, mindir.MindIRError) as error:
        print(f"adopt: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:
        print(f"adopt: {error.filename or args.output}: {error.strerror}; nothing was changed", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("adopt: interrupted; nothing was changed", file=sys.stderr)  # noqa: T201
        return 130
    context = manifest.context_length
    print(f"{args.output}: context {context}; in the deployment file: {settings(manifest)}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
