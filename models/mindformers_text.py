"""The text side of a MindFormers folder: Hugging Face's files, and what its YAML file says of the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.checkpoint_error import CheckpointError
from models.huggingface_text import huggingface_text
from models.mindformers_config import MindFormersFile
from models.text_files import TOKENIZER_FILE, TextFiles

# What these classes add to their vocabularies by themselves: research/internlm2/internlm2_tokenizer.py and
# research/qwen2/qwen2_tokenizer.py, for folders without a tokenizer_config.json that says so.
ADDED_TOKENS = {
    "InternLM2Tokenizer": {
        92538: "<|plugin|>",
        92539: "<|interpreter|>",
        92540: "<|action_end|>",
        92541: "<|action_start|>",
        92542: "<|im_end|>",
        92543: "<|im_start|>",
    },
    "Qwen2Tokenizer": {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"},
}


def mindformers_text(folder: Path, file: MindFormersFile, vocab_size: int) -> TextFiles:
    """The tokenizer, chat template and rules of a folder.

    Raises:
        CheckpointError: it has no tokenizer that can be read, or one whose rules are not implemented.
    """
    kind = file.tokenizer.get("type")
    if kind == "Llama3Tokenizer" and not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"{folder}: {kind} reads tiktoken's format, which is not implemented; "
            f"put the {TOKENIZER_FILE} that Hugging Face has of the same model beside the weights"
        )
    added = {i: {"content": text, "special": True} for i, text in ADDED_TOKENS.get(str(kind), {}).items()}
    assumed: dict[str, Any] = {"tokenizer_class": kind, "added_tokens_decoder": added}
    return huggingface_text(folder, file, vocab_size, assumed=assumed, told=file.tokenizer)
