"""The numbers in the graphs of a pair: the same in both graphs of a rank, others in each rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from models.checkpoint_error import CheckpointError
from models.contract import Contract


def check_weights(ranks: Sequence[Contract]) -> None:
    """See that both graphs of a rank hold the same numbers, of which one set will be in memory, and no two ranks do.

    Raises:
        CheckpointError: a weight differs between the graphs, is not where its graph says, or a rank is there twice.
    """
    ranks_by_digest: dict[str, int] = {}
    for rank, contract in enumerate(ranks):
        check_places(contract)
        earlier = ranks_by_digest.setdefault(weights_digest(contract), rank)
        if earlier != rank:
            raise CheckpointError(
                f"rank {rank}: {contract.prefill.path} has the numbers of rank {earlier} in every weight: it is a copy"
            )


def check_places(contract: Contract) -> None:
    """See that all weights of a pair are in its graphs or in files beside them.

    Raises:
        CheckpointError: one is not.
    """
    for graph in (contract.prefill, contract.decode):
        for name in graph.variables:
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            if not inside or not (graph.path.parent / name).is_file():
                raise CheckpointError(f"{graph.path}: its weights are in {name}, which is not a file beside it")


def weights_digest(contract: Contract) -> str:
    """SHA-256 of all weights of a pair, caches left out, which its graphs must have alike.

    Raises:
        CheckpointError: they have not.
    """
    digest = hashlib.sha256()
    for name in sorted(contract.prefill.parameters.keys() - contract.prefill.caches.keys()):
        numbers = contract.prefill.numbers(name)
        if numbers != contract.decode.numbers(name):
            raise CheckpointError(
                f"{contract.prefill.path} and {contract.decode.path} have different numbers in {name}: "
                "they are not of one checkpoint"
            )
        digest.update(numbers)
    return digest.hexdigest()
