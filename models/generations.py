"""The kinds of prefill and decode pairs that there have been, told apart by what their graphs take.

MindFormers' exporters wrote five kinds over the years. What counts is the position, type and rank of each input:
MindSpore names an input after the last variable that held it, so names only decide where that leaves a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from config.manifest import GraphTensor

Generation = Literal["static", "early dynamic", "continuous", "paged", "paged alike", "own"]

INTEGERS, FLOATS = ("int32", "int64"), ("float32", "float16", "bfloat16")
SERVED: tuple[Generation, ...] = ("paged", "paged alike")
WHAT_IT_IS: dict[Generation, str] = {
    "static": "generation A: fixed shapes, one cache row for each sequence",
    "early dynamic": "generation A': mask and rotary tables as inputs, one cache row for each sequence",
    "continuous": "generation B: continuous batching on one cache row for each sequence",
    "paged": "generation C: paged, with block tables in decode only",
    "paged alike": "generation D: paged, the same four inputs in both graphs",
    "own": "this project's own export",
}


@dataclass(frozen=True)
class Role:
    """What an input is for."""

    name: str
    aliases: tuple[str, ...]
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]

    def fits(self, tensor: GraphTensor) -> bool:
        """Whether an input can have this role, by its type and rank."""
        return tensor.dtype in self.dtypes and len(tensor.shape) in self.ranks


TOKENS = Role("token_ids", ("tokens", "input_ids"), INTEGERS, (2,))
LENGTHS = Role("valid_lengths", ("batch_valid_length", "valid_length"), INTEGERS, (1, 2))
TABLES = Role("block_tables", ("block_tables",), INTEGERS, (2,))
SLOTS = Role("slot_mapping", ("slot_mapping",), INTEGERS, (1,))
POSITION = Role("position", ("input_position", "current_index"), INTEGERS, (1, 2))
RESET = Role("reset", ("init_reset",), ("bool",), (1,))
MASK = Role("mask", ("mask",), FLOATS, (3,))
ROTARY = (Role("cos", ("freqs_cos",), FLOATS, (2,)), Role("sin", ("freqs_sin",), FLOATS, (2,)))
CACHE_ROWS = Role("cache_rows", ("batch_index", "decode_index"), INTEGERS, (1,))
CACHE_LENGTH = Role("cache_length", ("zactivate_len",), INTEGERS, (1,))
_OWN_RANKS = {"positions": 1, "slot_mapping": 1, "block_tables": 2, "query_lens": 1, "context_lens": 1}
_OWN_STEP = (
    Role("token_ids", ("token_ids",), INTEGERS, (1,)),
    *(Role(name, (name,), INTEGERS, (rank,)) for name, rank in _OWN_RANKS.items()),
    Role("logits_indices", ("logits_indices",), INTEGERS, (1,)),
)
OWN = (*_OWN_STEP, *(Role(name, (name,), FLOATS, (4,)) for name in ("key_cache", "value_cache")))
_CACHE = Role("cache", (), FLOATS, (4,))

Roles = tuple[Role, ...]
_A = (TOKENS, POSITION, RESET, LENGTHS)
_PAGED = (TOKENS, LENGTHS, TABLES, SLOTS)
_B = ((TOKENS, LENGTHS, CACHE_ROWS, CACHE_LENGTH), (TOKENS, POSITION, LENGTHS, CACHE_ROWS))
# The roles of prefill's inputs in feed order, and the choices that there are for decode's.
CONTRACTS: tuple[tuple[Generation, Roles, tuple[Roles, ...]], ...] = (
    ("paged alike", _PAGED, (_PAGED,)),
    ("paged", (TOKENS, LENGTHS, SLOTS), (_PAGED,)),
    *(("continuous", roles, (roles,)) for roles in _B),
    ("static", _A, (_A,)),
    (
        "early dynamic",
        (*_A, MASK, *ROTARY),
        tuple(
            (TOKENS, POSITION, *reset, LENGTHS, *more)
            for reset in ((RESET,), ())
            for more in ((), (CACHE_ROWS,), (CACHE_ROWS, CACHE_LENGTH))
        ),
    ),
    ("own", OWN, (OWN,)),
)


def classify(prefill: Sequence[GraphTensor], decode: Sequence[GraphTensor]) -> tuple[Generation | None, Roles, Roles]:
    """The generation of two graphs with these inputs, and the role of each input."""
    found: list[tuple[int, Generation, Roles, Roles]] = []
    own = own_for_ascend(len(prefill))
    for generation, ours, choices in (*CONTRACTS, ("own", own, (own,))):
        for theirs in choices:
            if fits(prefill, ours) and fits(decode, theirs):
                found.append((named(prefill, ours) + named(decode, theirs), generation, ours, theirs))
    if not found:
        return None, (), ()
    _, generation, ours, theirs = max(found, key=lambda entry: entry[0])
    return generation, ours, theirs


def own_for_ascend(inputs: int) -> Roles:
    """What our graphs for Ascend take: a step, and the caches of each layer. One layer at least."""
    return (*_OWN_STEP, *[_CACHE] * max(2, inputs - len(_OWN_STEP)))


def fits(inputs: Sequence[GraphTensor], roles: Roles) -> bool:
    """Whether inputs can have these roles, one by one."""
    return len(inputs) == len(roles) and all(map(Role.fits, roles, inputs))


def named(inputs: Sequence[GraphTensor], roles: Roles) -> int:
    """How many inputs have a name that their role is known by."""
    return sum(tensor.name in role.aliases for tensor, role in zip(inputs, roles, strict=True))
