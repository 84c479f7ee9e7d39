"""BPE over bytes (GPT-2's and its followers') as tokenizers of the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from models.checkpoint_error import CheckpointError

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# The expressions that split a text, one after another, by the names that llama.cpp has for them.
SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2_SPLIT,),
    "smollm": (r"\p{N}", GPT2_SPLIT),
    "llama3": (LLAMA3_SPLIT,),
    "llama-v3": (LLAMA3_SPLIT,),
    "llama-bpe": (LLAMA3_SPLIT,),
    "qwen2": (QWEN2_SPLIT,),
}
LLAMA3 = ("llama3", "llama-v3", "llama-bpe")


def byte_level_tokenizer(source: Path, ids: dict[str, int], merges: Sequence[str], pre: str) -> Tokenizer:
    """The tokenizer of a vocabulary, whose ``merges`` are two pieces with a space between; ``pre`` is a key of SPLITS.

    Raises:
        CheckpointError: there are no merges, or they do not fit the vocabulary.
    """
    pairs = [merge.partition(" ")[::2] for merge in merges]
    lost = [pair for pair in pairs if not {*pair, "".join(pair)} <= ids.keys()]
    if lost or not pairs:
        raise CheckpointError(f"{source}: its merges are missing or do not fit its tokens: {lost[:3]}")
    # Llama 3 takes a word that is a token as it is, even where no merges lead to it.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs, ignore_merges=pre in LLAMA3))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # so do Qwen's own
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
