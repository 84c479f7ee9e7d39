"""Writes ``agent/golden_text.json`` with transformers: ``python tests/write_golden_text.py``, from the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, by its path

import msgspec  # noqa: E402
import torch  # noqa: E402
from default_model import PROMPTS  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: E402

from agent.golden_text import FILE, GoldenText  # noqa: E402
from models import export  # noqa: E402

CHOSEN = PROMPTS[::4]
NEW_TOKENS = 32


def reference() -> tuple[PreTrainedModel, AutoTokenizer]:
    """transformers' own reading of the default model's file."""
    path = export.default_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def golden(model: PreTrainedModel, tokenizer: AutoTokenizer, prompt: str) -> GoldenText:
    """The greedy answer to one prompt, whatever its tokens are."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    token_ids: list[int] = []
    leads: list[float] = []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            best = model(torch.tensor([prompt_ids + token_ids])).logits[0, -1].topk(2)
        token_ids.append(int(best.indices[0]))
        leads.append(round(float(best.values[0] - best.values[1]), 3))
    return GoldenText(prompt, tuple(token_ids), tuple(leads))


def main() -> None:
    """Compute and write."""
    model, tokenizer = reference()
    lines = b",\n".join(msgspec.json.encode(golden(model, tokenizer, prompt)) for prompt in CHOSEN)
    FILE.write_bytes(b"[\n" + lines + b"\n]\n")


if __name__ == "__main__":
    main()
