"""MindFormers' checkpoints: the weights that are read are those of the same network in Hugging Face's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import pytest
import torch
from mindspore.train import serialization
from paged_rows import Row, step
from test_checkpoints import assert_same_weights
from test_export import run_export
from test_network import (
    BLOCK_SIZE,
    OPERATORS,
    TOLERANCE,
    export,
    largest_difference,
    open_runner,
    random_tokens,
    reference_logits,
)
from tiny_checkpoints import BOS, CHAT_TEMPLATE, END_OF_TURN, EOS, tiny_model, write_json, write_tiny
from tiny_mindformers import (
    FAMILIES,
    Form,
    Fused,
    edit_yaml,
    edit_yaml_tokenizer,
    mindformers_tensors,
    save,
    write_mindformers,
    write_yaml,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from config.manifest import read_manifest
from models.checkpoint import CheckpointError, open_checkpoint, source_digest
from models.mindformers_config import find_mindformers_file, mindformers_config
from models.network_config import NetworkConfig, RopeScaling


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_shape_are_those_of_a_huggingface_folder(family: str, tmp_path: Path) -> None:
    model = write_mindformers(family, tmp_path / "tiny")
    checkpoint = open_checkpoint(tmp_path / "tiny")
    assert_same_weights(checkpoint, model)
    assert checkpoint.source == checkpoint.name == "tiny"
    write_tiny(family, tmp_path / "huggingface")
    assert checkpoint.config == open_checkpoint(tmp_path / "huggingface").config


def test_as_many_keys_as_queries(tmp_path: Path) -> None:
    model = write_mindformers("llama", tmp_path, num_key_value_heads=4)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.num_kv_heads == 4
    assert_same_weights(checkpoint, model)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, form: Form, tmp_path: Path) -> None:
    kinds = {torch.bfloat16: ms.bfloat16, torch.float16: ms.float16}
    model = write_mindformers("qwen2", tmp_path, form=form, dtype=kinds[dtype])
    assert_same_weights(open_checkpoint(tmp_path), model.to(dtype))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(("fused", "version"), [("stacked", "1.3.2"), ("grouped", "1.9.0")])
def test_weights_that_qkv_concat_has_put_together(fused: Fused, version: str, kv_heads: int, tmp_path: Path) -> None:
    model = write_mindformers("qwen2", tmp_path, fused=fused, num_key_value_heads=kv_heads)
    with pytest.raises(CheckpointError, match="mindformers_version = None does not say in which order"):
        open_checkpoint(tmp_path)
    edit_yaml(tmp_path, mindformers_version="1.5")
    with pytest.raises(CheckpointError, match=r"mindformers_version = 1\.5 does not say"):
        open_checkpoint(tmp_path)
    edit_yaml(tmp_path, mindformers_version=version)
    assert_same_weights(open_checkpoint(tmp_path), model)


def test_what_a_training_saves_beside_the_network_is_left_out(tmp_path: Path) -> None:
    model = write_mindformers("llama", tmp_path)
    tensors = mindformers_tensors(model)
    moments = {f"adam_m.{name}": tensor for name, tensor in tensors.items()}
    cache = "model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache"
    extra = {**tensors, **moments, "scale_sense": torch.ones(()), cache: torch.ones(4, 16, 2, 16)}
    notes = {"epoch_num": 3, "step_num": 120, "loss_scale": 65536.0, "lr": "a text"}
    save(extra, tmp_path / "llama.ckpt", append_dict=notes)
    assert_same_weights(open_checkpoint(tmp_path), model)


@pytest.mark.parametrize("crc_check", [False, True])
def test_tensors_that_are_cut_into_several_values(
    crc_check: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serialization, "SLICE_SIZE", 5)  # kB; a matrix has 24 of them
    model = write_mindformers("llama", tmp_path)
    whole = (tmp_path / "llama.ckpt").read_bytes().count(b"embedding_weight")
    assert whole > 10
    save(mindformers_tensors(model), tmp_path / "llama.ckpt", crc_check=crc_check)
    assert_same_weights(open_checkpoint(tmp_path), model)


def test_a_checkpoint_in_parts_and_in_the_folder_of_its_only_rank(tmp_path: Path) -> None:
    model = write_mindformers("llama", tmp_path)
    (tmp_path / "llama.ckpt").unlink()
    tensors = list(mindformers_tensors(model).items())
    (tmp_path / "rank_0").mkdir()
    parts = [tmp_path / "rank_0" / f"mindspore_model-0000{i}-of-00002.ckpt" for i in (1, 2)]
    save(dict(tensors[:7]), parts[0])
    with pytest.raises(CheckpointError, match="holds 1 of the 2 parts"):
        open_checkpoint(tmp_path)
    save(dict(tensors[7:]), parts[1])
    digest = source_digest(tmp_path)
    assert_same_weights(open_checkpoint(tmp_path), model)
    save(dict(tensors[8:]), parts[1])
    assert source_digest(tmp_path) != digest
    with pytest.raises(CheckpointError, match=rf"lacks {tensors[7][0]}"):
        open_checkpoint(tmp_path)
    (tmp_path / "rank_1").mkdir()
    with pytest.raises(CheckpointError, match=r"slices of 2 ranks.*transform_ckpt\.py"):
        open_checkpoint(tmp_path)


def test_safetensors_in_parts_with_mindspores_own_index(tmp_path: Path) -> None:
    model = write_mindformers("llama", tmp_path, form="safetensors")
    (tmp_path / "llama.safetensors").unlink()
    tensors = list(mindformers_tensors(model).items())
    files = {f"part{i}.safetensors": dict(part) for i, part in enumerate((tensors[:7], tensors[7:]))}
    for name, part in files.items():
        save(part, tmp_path / name)
    index = {"weight_map": {tensor: name for name, part in files.items() for tensor in part}}
    write_json(tmp_path / "param_name_map.json", index)
    assert_same_weights(open_checkpoint(tmp_path), model)


def test_a_tied_head_may_be_stored_once_more(tmp_path: Path) -> None:
    model = write_mindformers("qwen2", tmp_path)
    edit_yaml(tmp_path, tie_word_embeddings=True)
    assert "head" not in open_checkpoint(tmp_path).weights
    tensors = mindformers_tensors(model)
    del tensors["lm_head.weight"]
    save(tensors, tmp_path / "qwen2.ckpt")
    assert "head" not in open_checkpoint(tmp_path).weights
    edit_yaml(tmp_path, tie_word_embeddings=None)
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_files_of_the_huggingface_folder_may_lie_beside(form: Form, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, seed=1)
    (tmp_path / "model.safetensors").unlink()
    model = write_mindformers("llama", tmp_path, form=form)
    assert_same_weights(open_checkpoint(tmp_path), model)


def test_a_yaml_file_changes_nothing_for_a_huggingface_folder(tmp_path: Path) -> None:
    model = write_tiny("llama", tmp_path)
    write_yaml(tmp_path, "llama", model, rms_norm_eps=0.5)
    (tmp_path / "other.yaml").write_text("of: !another program")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.norm_eps == model.config.rms_norm_eps
    assert_same_weights(checkpoint, model)


def test_template_and_end_tokens(tmp_path: Path) -> None:
    write_mindformers("llama", tmp_path)
    text = open_checkpoint(tmp_path).text
    assert (text.rules.bos_token_id, text.rules.add_bos) == (BOS, True)
    assert text.rules.eos_token_ids == (EOS, END_OF_TURN)
    assert text.chat_template == CHAT_TEMPLATE
    edit_yaml_tokenizer(tmp_path, chat_template="mine", add_bos_token=False, eos_token="<|im_start|>")
    text = open_checkpoint(tmp_path).text
    assert (text.chat_template, text.rules.add_bos) == ("mine", False)
    assert text.rules.eos_token_ids == (3, EOS, END_OF_TURN)
    edit_yaml_tokenizer(tmp_path, type="Llama3Tokenizer")
    open_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"Llama3Tokenizer reads tiktoken.*put the tokenizer\.json"):
        open_checkpoint(tmp_path)


# model_config of published files, as far as it is about the network, and what follows from it.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "configs/llama2/predict_llama2_7b.yaml": (
        {"hidden_size": 4096, "num_heads": 32, "num_layers": 32, "vocab_size": 32000, "multiple_of": 256},
        {"intermediate_size": 11008, "num_kv_heads": 32, "head_dim": 128},
    ),
    "configs/llama2/predict_llama2_13b.yaml": (
        {"hidden_size": 5120, "num_heads": 40, "num_layers": 40, "vocab_size": 32000, "multiple_of": 256},
        {"intermediate_size": 13824, "num_kv_heads": 40},
    ),
    "configs/llama2/predict_llama2_70b.yaml": (
        {
            "hidden_size": 8192,
            "num_heads": 64,
            "n_kv_heads": 8,
            "num_layers": 80,
            "vocab_size": 32000,
            "multiple_of": 256,
            "ffn_dim_multiplier": 1.3,
        },
        {"intermediate_size": 28672, "num_kv_heads": 8},
    ),
    "research/llama3_1/llama3_1_8b/predict_llama3_1_8b.yaml": (
        {
            "hidden_size": 4096,
            "num_heads": 32,
            "n_kv_heads": 8,
            "num_layers": 32,
            "vocab_size": 128256,
            "intermediate_size": 14336,
            "theta": 500000,
            "seq_length": 512,
            "max_position_embedding": 131072,
            "extend_method": "LLAMA3",
            "scaling_factor": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {
            "context_length": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context_length=8192),
        },
    ),
    "research/qwen2_5/predict_qwen2_5_7b_instruct.yaml": (
        {
            "hidden_size": 3584,
            "num_heads": 28,
            "n_kv_heads": 4,
            "num_layers": 28,
            "vocab_size": 152064,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "seq_length": 32768,
            "qkv_has_bias": True,
            "theta": 1000000.0,
            "qkv_concat": True,
            "use_past_shard": False,
            "temperature": 0.7,
        },
        {"architecture": "qwen2", "qkv_bias": True, "output_bias": False, "rope_theta": 1000000.0},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_of_published_files(name: str, tmp_path: Path) -> None:
    write_yaml(tmp_path, "llama", tiny_model("llama"), n_kv_heads=None, intermediate_size=None)
    said, follows = PUBLISHED[name]
    edit_yaml(tmp_path, **said)
    config = read_config(tmp_path)
    assert {field: getattr(config, field) for field in follows} == follows


def test_a_longer_context_by_positions_or_by_their_base(tmp_path: Path) -> None:
    write_yaml(tmp_path, "llama", tiny_model("llama"), extend_method="PI", scaling_factor=4.0)
    assert read_config(tmp_path).rope_scaling == RopeScaling(kind="linear", factor=4.0)
    edit_yaml(tmp_path, extend_method="linear", scaling_factor={"factor": 2.0})
    assert read_config(tmp_path).rope_scaling == RopeScaling(kind="linear", factor=2.0)
    edit_yaml(tmp_path, extend_method="NTK", scaling_factor=4.0)
    config = read_config(tmp_path)
    assert (config.rope_scaling, config.rope_theta) == (None, 40000.0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_logits_are_transformers_own(family: str, tmp_path: Path) -> None:
    model = write_mindformers(family, tmp_path / "tiny")
    export(tmp_path / "tiny", tmp_path / "exported", OPERATORS[-1])
    row = Row([1, 2, 3], random_tokens(1, 20))
    expected = reference_logits(model, row.tokens)
    runner = open_runner(tmp_path / "exported")
    assert (
        largest_difference(runner.run(step([row], [19], BLOCK_SIZE, every_position=True)).values, expected[:19])
        < TOLERANCE
    )
    assert largest_difference(runner.run(step([row], [1], BLOCK_SIZE)).values, expected[19:]) < TOLERANCE


@pytest.mark.slow
def test_the_command_exports_such_a_folder(tmp_path: Path) -> None:
    write_mindformers("qwen2", tmp_path / "tiny", dtype=ms.bfloat16)
    done = run_export(tmp_path / "tiny", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    assert (read_manifest(tmp_path / "exported").architecture, "tiny" in done.stdout) == ("qwen2", True)


def read_config(folder: Path) -> NetworkConfig:
    file = find_mindformers_file(folder)
    assert file is not None
    return mindformers_config(file)


def test_a_vocabulary_and_its_merges_are_qwens_tokenizer(tmp_path: Path) -> None:
    write_mindformers("qwen2", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, and the fox's den"] * 4, trainer)
    tokenizer.model.save(str(tmp_path))
    count = tokenizer.get_vocab_size()
    added = {
        count: {"content": "<|endoftext|>", "special": True},
        count + 1: {"content": "<|im_end|>", "special": True},
    }
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": added})
    with pytest.raises(CheckpointError, match=r"vocab\.json: is a vocabulary of None; supported .* Qwen2Tokenizer"):
        open_checkpoint(tmp_path)
    edit_yaml_tokenizer(tmp_path, type="Qwen2Tokenizer", bos_token=None, eos_token="<|im_end|>")
    text = open_checkpoint(tmp_path).text
    assert (text.rules.bos_token_id, text.rules.add_bos, text.rules.eos_token_ids[0]) == (BOS, False, count + 1)
    ours = Tokenizer.from_str(text.tokenizer_json)
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer"})
    theirs = Qwen2Tokenizer.from_pretrained(tmp_path)
    for sample in ("The quick fox's den<|im_end|>", " 12345  the\n\n dog", "e\u0301 and 狐狸"):
        ids = ours.encode(sample).ids
        assert ids == theirs.encode(sample, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
