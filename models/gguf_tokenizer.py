"""The tokenizer that a GGUF file's metadata describes.

``tokenizer.ggml.model`` is ``gpt2`` (BPE over bytes; ``tokenizer.ggml.pre`` names how text is split before) or
``llama`` (SentencePiece's BPE, with scores instead of merges). Token types are SentencePiece's.
"""

from __future__ import annotations

from tokenizers import Tokenizer

from config.manifest import TokenizerRules
from models.byte_level_tokenizer import LLAMA3, SPLITS, byte_level_tokenizer
from models.checkpoint_error import CheckpointError
from models.gguf_file import GGUFFile
from models.sentencepiece_tokenizer import PieceType, VocabularyPiece, add_tokens, bpe_tokenizer, vocabulary
from models.text_files import TextFiles, text_files, unique_ids

# Control tokens that end an answer beside tokenizer.ggml.eos_token_id: a file names one, chat models have several.
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")


def gguf_text(file: GGUFFile, vocab_size: int) -> TextFiles:
    """The tokenizer, chat template and rules of a GGUF file.

    Raises:
        CheckpointError: its tokenizer is of another kind, is incomplete, or does something that is not implemented.
    """
    model = file.value("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise CheckpointError(f"{file.path}: has a tokenizer of kind {model!r}; supported: {', '.join(builders)}")
    for key in ("tokenizer.ggml.add_eos_token", "tokenizer.ggml.precompiled_charsmap"):
        if file.value(key):
            raise CheckpointError(f"{file.path}: {key} is set, which is not implemented")
    pieces = _pieces(file)
    tokenizer = builders[model](file, pieces)
    special = [i for i, piece in enumerate(pieces) if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)]
    plain = [i for i, piece in enumerate(pieces) if piece.type == PieceType.USER_DEFINED]
    add_tokens(tokenizer, pieces, special, plain)
    template = file.value("tokenizer.chat_template")
    return text_files(file.path, tokenizer, template, _rules(file, model, pieces), vocab_size)


def _pieces(file: GGUFFile) -> list[VocabularyPiece]:
    tokens = file.value("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{file.path}: has no tokenizer.ggml.tokens")
    scores = file.value("tokenizer.ggml.scores") or [0.0] * len(tokens)
    types = file.value("tokenizer.ggml.token_type") or [PieceType.NORMAL] * len(tokens)
    if not len(tokens) == len(scores) == len(types):
        raise CheckpointError(
            f"{file.path}: has {len(tokens)} tokens, {len(scores)} scores and {len(types)} token types"
        )
    return [VocabularyPiece(*piece) for piece in zip(tokens, scores, map(PieceType, types), strict=True)]


def _byte_level(file: GGUFFile, pieces: list[VocabularyPiece]) -> Tokenizer:
    pre = file.value("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre is {pre!r}, an unknown way to split text; known: {', '.join(SPLITS)}"
        )
    merges = file.value("tokenizer.ggml.merges", ())
    return byte_level_tokenizer(file.path, vocabulary(file.path, pieces), merges, pre)


def _sentencepiece(file: GGUFFile, pieces: list[VocabularyPiece]) -> Tokenizer:
    if file.value("tokenizer.ggml.scores") is None:
        raise CheckpointError(
            f"{file.path}: has no tokenizer.ggml.scores, without which its tokens cannot be put together"
        )
    if file.value("tokenizer.ggml.remove_extra_whitespaces"):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.remove_extra_whitespaces is set, which is not implemented")
    return bpe_tokenizer(file.path, pieces, prefix_space=file.value("tokenizer.ggml.add_space_prefix", True))


def _rules(file: GGUFFile, model: str, pieces: list[VocabularyPiece]) -> TokenizerRules:
    bos = file.value("tokenizer.ggml.bos_token_id")
    by_default = model == "llama" or file.value("tokenizer.ggml.pre") in LLAMA3
    add_bos = file.value("tokenizer.ggml.add_bos_token", by_default)
    if add_bos and bos is None:
        raise CheckpointError(f"{file.path}: prompts begin with a token, but tokenizer.ggml.bos_token_id is missing")
    named = [file.value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    control = {piece.text: i for i, piece in enumerate(pieces) if piece.type == PieceType.CONTROL}
    ends = unique_ids(*named, *(control.get(token) for token in END_TOKENS))
    if not ends:
        raise CheckpointError(f"{file.path}: names no end token (tokenizer.ggml.eos_token_id)")
    return TokenizerRules(bos_token_id=bos, add_bos=bool(add_bos), eos_token_ids=ends)
