"""``python -m models.adopt``: a paged pair of MindIR files that another exporter wrote becomes a model folder of ours.

The graphs stay as they are, linked into the folder rather than copied where the file system can. What is added is what
a server must know of them: the manifest, with what such graphs can do, and the text side from a tokenizer's folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping
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
    write_manifest,
)
from models import mindir
from models.checkpoint_error import CheckpointError
from models.config_fields import ConfigFields
from models.contract import Contract, Device, explain, mismatches, obstacles, read_contract
from models.export import check_replaceable, exclusive, rewriting
from models.generations import SERVED, TABLES, TOKENS, Roles
from models.graph_file import GraphFile
from models.huggingface_config import CONFIG_FILE, ConfigFile
from models.huggingface_text import huggingface_text

MIN_BLOCKS = 3  # the null block, and two for the proof that prefill and decode share a cache


@dataclass(frozen=True, kw_only=True)
class AdoptOptions:
    """What a user may choose."""

    target: Literal["auto", "cpu", "ascend"] = "auto"  # auto: a CPU where the graphs run on one
    context_length: int | None = None  # tokens; None: what tables, cache and config.json allow
    padding_slot: Literal[-1, 0] | None = None  # None: what exporters of the pair's generation wrote


def adopt(prefill: Path, decode: Path, tokenizer: Path, folder: Path, options: AdoptOptions) -> Manifest:
    """Make ``folder`` a model folder of a pair, in the place of an earlier one.

    Raises:
        mindir.MindIRError: a file is missing, or no MindIR.
        CheckpointError: the pair cannot be served, or the tokenizer's folder is of no use; the message says why.
        OSError: the disk is full, or the folder cannot be written.
    """
    contract = read_contract(prefill, decode)
    target = choose_target(contract, options.target)
    check_same_weights(contract)
    config = config_of(tokenizer)
    assert contract.vocab_size, "a pair that is served has a vocabulary"
    text = huggingface_text(tokenizer, config, contract.vocab_size)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder), rewriting(folder) as fresh:
        for phase, graph, _ in contract.graphs:
            link_graph(graph, fresh / phase)
        text.write(fresh)
        files = folder_digests(fresh)
        manifest = describe(
            contract, options, config.fields, name=folder.name, target=target, files=files, rules=text.rules
        )
        write_manifest(fresh, manifest)
    return manifest


def config_of(folder: Path) -> ConfigFields:
    """What the ``config.json`` of a tokenizer's folder says: nothing if there is none."""
    path = folder / CONFIG_FILE
    return ConfigFile(path) if path.is_file() else ConfigFields(path, {})


def choose_target(contract: Contract, wish: Literal["auto", "cpu", "ascend"]) -> Device:
    """The kind of device that the pair is to run on.

    Raises:
        CheckpointError: it cannot, with the whole explanation.
    """
    if contract.generation not in SERVED or any(mismatches(contract)) or any(obstacles(contract, "ascend")):
        raise CheckpointError(explain(contract))
    runs_on_cpu = not any(obstacles(contract, "cpu"))
    if wish == "cpu" and not runs_on_cpu:
        raise CheckpointError(f"--target cpu: {explain(contract)}")
    return "cpu" if runs_on_cpu and wish != "ascend" else "ascend"


def check_same_weights(contract: Contract) -> None:
    """See that both graphs hold the same numbers: one set of them will be in memory.

    Raises:
        CheckpointError: a weight differs, or is not where its graph says.
    """
    for graph in (contract.prefill, contract.decode):
        for name in graph.variables:
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            if not inside or not (graph.path.parent / name).is_file():
                raise CheckpointError(f"{graph.path}: its weights are in {name}, which is not a file beside it")
    for name in contract.prefill.parameters.keys() - contract.prefill.caches.keys():
        if contract.prefill.numbers(name) != contract.decode.numbers(name):
            raise CheckpointError(
                f"{contract.prefill.path} and {contract.decode.path} have different numbers in {name}: "
                "they are not of one checkpoint"
            )


def link_graph(graph: GraphFile, folder: Path) -> None:
    """The graph and the files of its weights under the same names in ``folder``, which is made."""
    for name in (graph.path.name, *graph.variables):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        mindir.link_or_copy((graph.path.parent / name).resolve(), target)


def describe(
    contract: Contract,
    options: AdoptOptions,
    config: Mapping[str, Any],
    *,
    name: str,
    target: Device,
    files: dict[str, str],
    rules: TokenizerRules,
) -> Manifest:
    """The manifest of a pair.

    Raises:
        CheckpointError: its cache is too small, for any use or for the context that was asked for.
    """
    cache = contract.cache
    assert cache, "a pair that is served has caches"
    assert contract.vocab_size, "and a vocabulary"
    num_blocks, block_size, num_kv_heads, head_dim = cache.shape
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
        weights="none",
        num_layers=len(contract.prefill.caches) // 2,
        num_heads=config.get("num_attention_heads") or num_kv_heads,  # graphs do not say it, and nothing here needs it
        num_kv_heads=num_kv_heads,
        cache_heads=num_kv_heads,
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
            prefill=paged_graph("prefill", contract.prefill, contract.prefill_roles),
            decode=paged_graph("decode", contract.decode, contract.decode_roles),
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


def paged_graph(phase: str, graph: GraphFile, roles: Roles) -> PagedGraph:
    """Where a graph is in the model folder, and how it is fed."""
    named = zip(graph.inputs, roles, strict=True)
    inputs = tuple(GraphTensor(name=role.name, dtype=tensor.dtype, shape=tensor.shape) for tensor, role in named)
    names = tuple(tensor.name for tensor in graph.inputs)
    return PagedGraph(file=f"{phase}/{graph.path.name}", inputs=inputs, names=names)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 1 with a reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m models.adopt", description=__doc__.splitlines()[0])
    parser.add_argument("prefill", type=Path, help="the MindIR of the prompt (older name: full model)")
    parser.add_argument("decode", type=Path, help="the MindIR of the next token (older name: incremental model)")
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
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's errors, not its warnings
    options = AdoptOptions(target=args.target, context_length=args.context_length, padding_slot=args.padding_slot)
    try:
        manifest = adopt(args.prefill, args.decode, args.tokenizer, args.output, options)
    except (CheckpointError, mindir.MindIRError) as error:
        print(f"adopt: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:
        print(f"adopt: {error.filename or args.output}: {error.strerror}; nothing was changed", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("adopt: interrupted; nothing was changed", file=sys.stderr)  # noqa: T201
        return 130
    pair = manifest.pair
    assert pair, "it was written with one"
    block_bytes = manifest.cache_block_bytes(pair.cache_dtype)
    print(  # noqa: T201
        f"{args.output}: for {manifest.target}, context {manifest.context_length}; in the deployment file: "
        f"target: {manifest.target}, cache_dtype: {pair.cache_dtype}, "
        f"cache_memory: {pair.num_blocks * block_bytes}B or more"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
