"""SentencePiece vocabularies as tokenizers of the ``tokenizers`` library, with the same ids."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from models.checkpoint_error import CheckpointError

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # SentencePiece's model types


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


class AddedPiece(NamedTuple):
    """An entry that Hugging Face's files put into a vocabulary, or in the place of another one."""

    id: int
    text: str
    special: bool


def sentencepiece_tokenizer(
    path: Path, added: list[AddedPiece], *, prefix_space: bool | None, legacy: bool
) -> Tokenizer:
    """The tokenizer of a ``tokenizer.model``.

    ``prefix_space`` and ``legacy`` are as in ``bpe_tokenizer``; None: as the file says.

    Raises:
        CheckpointError: it is no such file, or uses a rule that is not implemented.
    """
    proto = _read(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        raise CheckpointError(f"{path}: has SentencePiece model type {trainer.model_type}; supported: unigram and BPE")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise CheckpointError(f"{path}: does not put spaces in front of words as {SPACE}, which is not implemented")
    pieces = [VocabularyPiece(piece.piece, piece.score, PieceType(piece.type)) for piece in proto.pieces]
    own_symbols = [piece.text for piece in pieces if piece.type == PieceType.USER_DEFINED]
    pieces = _with_added(path, pieces, added)
    prefix = normalizer.add_dummy_prefix if prefix_space is None else prefix_space
    if trainer.model_type == BPE:
        tokenizer = bpe_tokenizer(path, pieces, prefix_space=prefix, legacy=legacy, whole_words=bool(own_symbols))
    else:
        tokenizer = _unigram_tokenizer(path, pieces, prefix_space=prefix)
    _normalize_first(tokenizer, normalizer)
    if own_symbols:
        _split_symbols(tokenizer, own_symbols)
    special = [i for i, piece in enumerate(pieces) if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)]
    plain = [piece.id for piece in added if not piece.special]
    add_tokens(tokenizer, pieces, special, plain)
    return tokenizer


def begin_and_end(path: Path) -> dict[str, str]:
    """What a ``tokenizer.model`` itself says of ``bos_token`` and ``eos_token``, by the names of Hugging Face's files.

    Raises:
        CheckpointError: it is no such file.
    """
    proto = _read(path)
    ids = {"bos_token": proto.trainer_spec.bos_id, "eos_token": proto.trainer_spec.eos_id}  # -1: it has none
    pieces = {name: proto.pieces[i] for name, i in ids.items() if 0 <= i < len(proto.pieces)}
    return {name: piece.piece for name, piece in pieces.items() if piece.type == PieceType.CONTROL}


def _read(path: Path) -> Any:
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{path}: is no SentencePiece model: {error}") from None
    return proto


def bpe_tokenizer(
    source: Path, pieces: list[VocabularyPiece], *, prefix_space: bool, legacy: bool = True, whole_words: bool = False
) -> Tokenizer:
    """A BPE vocabulary, where the pair is merged first whose whole has the best score.

    ``prefix_space``: a text gets a space in front; ``legacy``: so does what follows a special token. ``whole_words``: a
    word that is a piece is taken as it is.
    """
    unknown = next((piece.text for piece in pieces if piece.type == PieceType.UNKNOWN), None)
    model = models.BPE(
        vocab=vocabulary(source, pieces),
        merges=_merges(pieces),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_has_bytes(pieces),
        ignore_merges=whole_words,
    )
    tokenizer = Tokenizer(model)
    if legacy:
        _escape_spaces(tokenizer, prefix_space)
    else:
        scheme = "first" if prefix_space else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = _decoder(prefix_space)
    return tokenizer


def vocabulary(source: Path, pieces: list[VocabularyPiece]) -> dict[str, int]:
    """Every piece's id.

    Raises:
        CheckpointError: a piece is there twice, so that one of its ids could never be told from the other.
    """
    ids: dict[str, int] = {}
    for i, piece in enumerate(pieces):
        if ids.setdefault(piece.text, i) != i:
            raise CheckpointError(f"{source}: has the token {piece.text!r} twice, as {ids[piece.text]} and {i}")
    return ids


def add_tokens(tokenizer: Tokenizer, pieces: list[VocabularyPiece], special: list[int], plain: list[int]) -> None:
    """Have these pieces found whole in a text, before anything else; special ones are left out of decoded text."""
    tokenizer.add_tokens([AddedToken(pieces[i].text, normalized=False, special=True) for i in special])
    tokenizer.add_tokens([AddedToken(pieces[i].text, normalized=False, special=False) for i in plain])


def _unigram_tokenizer(source: Path, pieces: list[VocabularyPiece], *, prefix_space: bool) -> Tokenizer:
    vocabulary(source, pieces)
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == PieceType.UNKNOWN), None)
    scores = [(piece.text, piece.score) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=unknown, byte_fallback=_has_bytes(pieces)))
    _escape_spaces(tokenizer, prefix_space)
    tokenizer.decoder = _decoder(prefix_space)
    return tokenizer


def _has_bytes(pieces: list[VocabularyPiece]) -> bool:
    return any(piece.type == PieceType.BYTE for piece in pieces)


def _escape_spaces(tokenizer: Tokenizer, prefix_space: bool) -> None:
    prefix = [normalizers.Prepend(SPACE)] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])


def _decoder(prefix_space: bool) -> decoders.Sequence:
    strip = [decoders.Strip(content=" ", left=1)] if prefix_space else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _with_added(path: Path, pieces: list[VocabularyPiece], added: list[AddedPiece]) -> list[VocabularyPiece]:
    result = list(pieces)
    for piece in sorted(added):
        kind = PieceType.CONTROL if piece.special else PieceType.USER_DEFINED
        if piece.id > len(result):
            raise CheckpointError(f"{path}: has {len(result)} pieces; the added token {piece.text!r} has id {piece.id}")
        score = result[piece.id].score if piece.id < len(result) else 0.0
        result[piece.id : piece.id + 1] = [VocabularyPiece(piece.text, score, kind)]
    return result


def _normalize_first(tokenizer: Tokenizer, spec: Any) -> None:
    """SentencePiece's own normalisation, in front of the escaped spaces."""
    first: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        first.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        first += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if first:
        rest = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([*first, *rest])


def _split_symbols(tokenizer: Tokenizer, symbols: list[str]) -> None:
    """Keep a vocabulary's own user-defined pieces whole.

    Added tokens would do that too, but a space would be put in front of what follows one, which SentencePiece does not.
    """
    pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    before = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, split])


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
