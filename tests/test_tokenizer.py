"""Text to tokens and back: byte-level BPE and SentencePiece-like vocabularies, whole and token by token."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from config.manifest import TokenizerRules
from server.errors import InvalidRequest
from server.token_bytes import TokenizerError
from server.tokenizer import Tokenizer

SAMPLES = [
    "Hello world, the quick brown fox.",
    "你好、世界。",
    "def f(x):\n    return x",
    "héé 🙂🙂 \U0001f468‍\U0001f469‍\U0001f467",
    "  a  b ",
]
RULES = TokenizerRules(bos_token_id=0, add_bos=True, eos_token_ids=(1, 2))
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


def byte_level() -> tokenizers.Tokenizer:
    """Like GPT-2, Llama 3 and Qwen; the last two added tokens are not special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLES * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>"), AddedToken("中é")])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """Like Llama 1 and 2 and InternLM: a space before the text, bytes for what has no piece."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁the", "the", "é", "好", "▁好", "a", "b", "▁a", "<0x4", "<unk>"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "▁"), ("▁", "a"), ("▁", "好")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<0xZZ>"), AddedToken("▁tool")])
    return tokenizer


KINDS = {"byte-level": byte_level(), "sentencepiece": sentencepiece()}


def save(library: tokenizers.Tokenizer, folder: Path, rules: TokenizerRules = RULES) -> Tokenizer:
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder, rules)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Our tokenizer for each kind."""
    return {kind: save(library, tmp_path_factory.mktemp(kind)) for kind, library in KINDS.items()}


@pytest.fixture(scope="module")
def ours(kind: str, exported: dict[str, Tokenizer]) -> Tokenizer:
    return exported[kind]


def streamed(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    decoder = tokenizer.incremental_decoder()
    return [*(decoder.feed([token_id]) for token_id in token_ids), decoder.flush()]


@pytest.mark.parametrize("text", [*SAMPLES, "", " ", "the the", "\x00\n\t", "混合 mixed 🙂é"])
def test_a_text_comes_back(ours: Tokenizer, text: str) -> None:
    assert ours.decode(ours.encode(text)) == text


def test_the_begin_token_comes_first_and_once(ours: Tokenizer) -> None:
    plain = ours.encode("a b", add_special_tokens=False)
    assert plain[0] != 0
    assert ours.encode("a b") == [0, *plain]
    written = ours.encode("<s>a b")
    assert written[0] == 0
    assert written.count(0) == 1
    assert ours.encode("") == [0]


def test_a_model_without_the_rule_gets_no_begin_token(tmp_path: Path) -> None:
    rules = TokenizerRules(bos_token_id=0, add_bos=False, eos_token_ids=(1,))
    tokenizer = save(KINDS["byte-level"], tmp_path, rules)
    assert tokenizer.encode("a")[0] != 0


def test_special_tokens_leave_no_trace_in_a_text(ours: Tokenizer) -> None:
    ids = [0, *ours.encode("the", add_special_tokens=False), 2, 1]
    assert ours.decode(ids) == "the"
    assert [ours.is_special(token_id) for token_id in ids[-2:]] == [True, True]
    assert [ours.token_text(token_id) for token_id in (0, 1, 2)] == SPECIAL


def test_a_tokens_own_text_keeps_its_space(exported: dict[str, Tokenizer]) -> None:
    tokenizer = exported["sentencepiece"]
    the = KINDS["sentencepiece"].token_to_id("▁the")
    assert tokenizer.token_text(the) == " the"
    assert tokenizer.decode([the, the]) == "the the"
    assert tokenizer.token_text(3 + 0xE4) == "\ufffd"


def test_half_a_surrogate_pair_is_refused(ours: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        ours.encode("a\ud83d")
    assert caught.value.field == "prompt"


def test_an_id_beyond_the_vocabulary_has_no_text(ours: Tokenizer) -> None:
    assert ours.token_text(100_000) == ""
    assert ours.decode([100_000]) == ""


@given(st.lists(st.integers(0, 360), max_size=40), st.lists(st.integers(0, 40), max_size=8))
def test_increments_of_any_ids_joined_are_the_whole(ours: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    places = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    decoder = ours.incremental_decoder()
    parts = [decoder.feed(ids[start:end]) for start, end in pairwise(places)]
    assert "".join([*parts, decoder.flush()]) == ours.decode(ids)
    assert "".join(streamed(ours, ids)) == ours.decode(ids)


@given(st.lists(st.integers(0, 360), max_size=40))
def test_a_byte_level_text_is_what_the_library_decodes(exported: dict[str, Tokenizer], ids: list[int]) -> None:
    assert exported["byte-level"].decode(ids) == KINDS["byte-level"].decode(ids)


@given(
    st.lists(
        st.sampled_from(["▁", "▁▁", "▁the", "好", "b", "▁tool", "<0xZZ>", "<s>"]) | st.characters(codec="utf-8"),
        max_size=30,
    )
)
def test_a_sentencepiece_text_is_what_the_library_decodes(exported: dict[str, Tokenizer], parts: list[str]) -> None:
    """Pieces, and characters spelt in bytes: every valid text."""
    library = KINDS["sentencepiece"]
    ids: list[int] = []
    for part in parts:
        piece = library.token_to_id(part)
        ids += [piece] if piece is not None else [3 + byte for byte in part.encode()]
    assert exported["sentencepiece"].decode(ids) == library.decode(ids)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xe4\xb8\xad\xe4\xb8", "中\ufffd\ufffd"),  # cut off inside a character: one for each byte that is left
        (b"\xe4\xb8a", "\ufffd\ufffda"),
        (b"\xff\xe4\xb8\xad", "\ufffd中"),
    ],
)
def test_broken_bytes_of_a_sentencepiece_model_do_not_spoil_their_neighbours(
    exported: dict[str, Tokenizer], data: bytes, text: str
) -> None:
    tokenizer = exported["sentencepiece"]
    ids = [3 + byte for byte in data]
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text


def test_a_character_is_never_split_and_never_late(kind: str, ours: Tokenizer) -> None:
    sizes = {"a": 1, "🙂": 4, "é": 2, "中": 3}
    text = "".join(sizes)
    if kind == "byte-level":
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        ids = [KINDS[kind].token_to_id(character) for character in split[0][0]]
    else:
        ids = [3 + byte for byte in text.encode()]
    expected = [part for character, size in sizes.items() for part in [*[""] * (size - 1), character]]
    assert streamed(ours, ids) == [*expected, ""]


def test_a_chat_prompt_has_the_models_own_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    tokenizer = save(KINDS["byte-level"], tmp_path)
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<s>hi</s>"


def test_a_model_without_chat_template_says_so(ours: Tokenizer) -> None:
    assert not ours.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "hi"}])


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path, RULES)
    library = byte_level()
    library.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        save(library, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja.*line 1"):
        save(byte_level(), tmp_path)
