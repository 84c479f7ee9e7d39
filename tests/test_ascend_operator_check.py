"""The comparison of Ascend's operators with their mirrors: operators take its cases, and it sees a wrong one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from mindspore import Tensor

from agent.acceptance import OPERATOR_CHECKS
from benchmarks import ascend_operator_check
from benchmarks.ascend_operator_check import TOLERANCES, Case, cases, difference
from models import ascend_mirror

CASES = [pytest.param(dtype, case, id=f"{case.name}-{dtype}") for dtype in TOLERANCES for case in cases(dtype)]


def altered(name: str) -> ModuleType:
    """The mirrors, of which one gives a tenth too much."""
    module = ModuleType("altered")
    vars(module).update(vars(ascend_mirror))

    class Wrong(vars(ascend_mirror)[name]):  # type: ignore[misc]
        def __call__(self, *inputs: Any, **more: Any) -> Any:
            out = super().__call__(*inputs, **more)
            if name == "ReshapeAndCache":
                keys = inputs[2].asnumpy()  # the cache's own memory
                keys[1] = keys[1] * 1.1
            return tuple(more_of(one) for one in out) if isinstance(out, tuple) else more_of(out)

    vars(module)[name] = Wrong
    return module


def more_of(x: Any) -> Any:
    return x if x is None else Tensor((x.asnumpy() * 1.1).astype(x.asnumpy().dtype))


@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_a_wrong_operator_is_seen(dtype: str, case: Case) -> None:
    assert difference(case, ascend_mirror) == 0
    assert difference(case, altered(case.name.split(",")[0])) > TOLERANCES[dtype]


def test_it_is_what_an_acceptance_runs_on_a_device() -> None:
    assert OPERATOR_CHECKS["ascend"] == ascend_operator_check.__name__
