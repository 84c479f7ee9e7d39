"""MindSpore's description of MindIR files, without MindSpore, which takes seconds to import."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def _load() -> Any:
    package = importlib.util.find_spec("mindspore")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "train" / "mind_ir_pb2.py"
    spec = importlib.util.spec_from_file_location("mind_ir_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mind_ir = _load()
