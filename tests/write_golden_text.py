"""Writes ``agent/golden_text.json`` with transformers: ``python tests/write_golden_text.py``, from the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, by its path

import msgspec  # noqa: E402
import torch  # noqa: E402
from default_model import PROMPTS  # noqa: E402
from golden_text import reference  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from agent.golden_text import FILE, GoldenText  # noqa: E402
from models import export  # noqa: E402
from models.checkpoint import open_checkpoint  # noqa: E402

CHOSEN = PROMPTS[::4]
NEW_TOKENS = 32


def golden(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str) -> GoldenText:
    """The greedy answer to one prompt, whatever its tokens are."""
    prompt_ids = torch.tensor([tokenizer.encode(prompt).ids])
    made = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(made.logits).topk(2)
    token_ids: list[int] = best.indices[:, 0].tolist()
    leads: list[float] = [round(lead, 3) for lead in (best.values[:, 0] - best.values[:, 1]).tolist()]
    return GoldenText(prompt, tuple(token_ids), tuple(leads))


def main() -> None:
    """Compute and write."""
    torch.set_num_threads(1)  # two that wait for each other on a busy machine take ten times as long
    model = reference()
    model.generation_config.eos_token_id = None  # an answer goes on, as with ignore_eos
    tokenizer = Tokenizer.from_str(open_checkpoint(export.default_checkpoint()).text.tokenizer_json)
    lines = b",\n".join(msgspec.json.encode(golden(model, tokenizer, prompt)) for prompt in CHOSEN)
    FILE.write_bytes(b"[\n" + lines + b"\n]\n")


if __name__ == "__main__":
    main()
