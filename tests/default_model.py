"""The default model in any format of its weights, and the prompts that it is tried with."""

from __future__ import annotations

from pathlib import Path

from config.serving_config import WeightFormat
from models import export

NEW_TOKENS = 48
PROMPTS = [
    line.replace("\\n", "\n").replace("\\t", "\t")
    for line in (Path(__file__).parent / "golden_prompts.txt").read_text(encoding="utf-8").splitlines()
]


def default_model(weights: WeightFormat, ranks: int = 1) -> Path:
    """The folder of its export, made unless it is there; C++ operators if they can be built."""
    folder = export.MODELS_FOLDER / f"{export.DEFAULT_FOLDER.name}-{weights}{f'-tp{ranks}' if ranks > 1 else ''}"
    options = export.ExportOptions(operators=export.choose_operators("auto"), weights=weights, ranks=ranks)
    export.export(export.default_checkpoint(), folder, options)
    return folder
