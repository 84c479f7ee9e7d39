"""SentencePiece vocabularies as tokenizers of the ``tokenizers`` library, with the same ids."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "▁"


class PieceType(IntEnum):
    """SentencePiece's types of vocabulary pieces; GGUF uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class VocabularyPiece(NamedTuple):
    """One entry of a vocabulary; its id is its place."""

    text: str
    score: float
    type: PieceType


def bpe_tokenizer(pieces: list[VocabularyPiece], *, prefix_space: bool, legacy: bool = True) -> Tokenizer:
    """A BPE vocabulary, where the pair is merged first whose whole has the best score.

    ``prefix_space``: a text gets a space in front; ``legacy``: so does what follows a special token.
    """
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.type == PieceType.UNKNOWN), None)
    has_bytes = any(piece.type == PieceType.BYTE for piece in pieces)
    model = models.BPE(
        vocab=vocabulary, merges=_merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes
    )
    tokenizer = Tokenizer(model)
    spaces = [normalizers.Replace(" ", SPACE)]
    if legacy:
        prefix = [normalizers.Prepend(SPACE)] if prefix_space else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, *spaces])
    else:
        scheme = "first" if prefix_space else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    add_special_pieces(tokenizer, pieces)
    return tokenizer


def add_special_pieces(tokenizer: Tokenizer, pieces: list[VocabularyPiece]) -> None:
    """Make control pieces special tokens and user-defined ones plain added tokens: both are found whole in a text."""
    for piece in pieces:
        if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED):
            special = piece.type != PieceType.USER_DEFINED
            tokenizer.add_tokens([AddedToken(piece.text, normalized=False, special=special)])


def _merges(pieces: list[VocabularyPiece]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third one, best score first; among equals, earlier pieces first."""
    mergeable = {
        piece.text: (i, piece.score)
        for i, piece in enumerate(pieces)
        if piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)
    }
    ranked = []
    for text, (_, score) in mergeable.items():
        for cut in range(1, len(text)):
            left, right = mergeable.get(text[:cut]), mergeable.get(text[cut:])
            if left and right:
                ranked.append((-score, left[0], right[0], text[:cut], text[cut:]))
    return [(left, right) for _, _, _, left, right in sorted(ranked)]
