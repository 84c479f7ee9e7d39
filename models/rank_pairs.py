"""The pairs of a model's ranks that another exporter wrote: whether they are of one model, and in their order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from models.contract import Contract, collectives_of, shown
from models.generations import WHAT_IT_IS


def disagreements(ranks: Sequence[Contract]) -> Iterator[str]:
    """Why several pairs that are sound each are not the ranks of one model, in the order of the ranks."""
    for rank, contract in enumerate(ranks):
        problems = (*misplaced(ranks, rank), *alone(contract), *differences(ranks[0], contract))
        yield from (f"rank {rank}: {problem}" for problem in problems)


def misplaced(ranks: Sequence[Contract], rank: int) -> Iterator[str]:
    """Files of this rank that are another's."""
    for phase, paths in (
        ("prefill", [contract.prefill.path for contract in ranks]),
        ("decode", [contract.decode.path for contract in ranks]),
    ):
        for earlier in range(rank):
            if paths[earlier].samefile(paths[rank]):
                yield f"its {phase} file is that of rank {earlier}"
        named = list(map(named_rank, paths))
        # Files that were renamed can be called anything; only names that are in another order say something.
        if named[rank] != rank and sorted(named) == list(range(len(ranks))):
            yield f"{paths[rank]} is called that of rank {named[rank]}: give the ranks in their order"


def named_rank(path: Path) -> int:
    """The rank that MindFormers names a file after, as in ``rank_1_graph.mindir``; -1 if it does not."""
    match = re.match(r"rank_(\d+)", path.name)
    return int(match[1]) if match else -1


def alone(contract: Contract) -> Iterator[str]:
    """Why a pair is no part of a model."""
    if not collectives_of(contract):
        yield f"{contract.prefill.path} computes with no other rank: it is no part of a model but a whole one"
    if not any(graph.logits and graph.logits[-1] > 0 for _, graph, _ in contract.graphs):
        yield "its outputs do not say how large the vocabulary is, and its weights may be a part of it"


def differences(first: Contract, other: Contract) -> Iterator[str]:
    """What should be alike in all ranks and is not."""
    for (name, ours), (_, theirs) in zip(traits(first), traits(other), strict=True):
        if ours != theirs:
            yield f"{name}: {theirs}, and in rank 0 {ours}"


def traits(contract: Contract) -> tuple[tuple[str, str], ...]:
    """What is alike in all ranks of a model, with its name, for people."""
    assert contract.generation, "ranks are compared when each is known to be served"
    caches = contract.prefill.caches.values()
    return (
        ("kind", WHAT_IT_IS[contract.generation]),
        *((f"inputs of {phase}", ", ".join(map(shown, graph.inputs))) for phase, graph, _ in contract.graphs),
        ("vocabulary", f"{contract.vocab_size} tokens"),
        *((f"logits of {phase}", f"{list(graph.logits)}") for phase, graph, _ in contract.graphs),
        ("caches", f"{len(caches)} like {' or '.join(sorted({f'{one.dtype} {list(one.shape)}' for one in caches}))}"),
        ("mind_ir_version", " and ".join(str(graph.version) for _, graph, _ in contract.graphs)),
    )
