"""Every family and format: the weights that are read are transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_checkpoints import (
    BOS,
    CHAT_TEMPLATE,
    END_OF_TURN,
    EOS,
    FAMILIES,
    edit_config,
    tiny_model,
    write_json,
    write_tiny,
    write_tiny_gguf,
)
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from models.checkpoint import Checkpoint, CheckpointError, open_checkpoint, source_digest
from models.huggingface_config import ConfigFile, huggingface_config
from models.network_config import RopeScaling

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def expected_weights(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """transformers' weights under our names."""
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    weights = {"embed_tokens": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        weights["head"] = state["lm_head.weight"]
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        ours = {
            "attention_norm": [layer + "input_layernorm.weight"],
            "qkv": [attention + f"{role}_proj.weight" for role in "qkv"],
            "qkv_bias": [attention + f"{role}_proj.bias" for role in "qkv"],
            "q_norm": [attention + "q_norm.weight"],
            "k_norm": [attention + "k_norm.weight"],
            "output": [attention + "o_proj.weight"],
            "output_bias": [attention + "o_proj.bias"],
            "mlp_norm": [layer + "post_attention_layernorm.weight"],
            "gate_up": [mlp + "gate_proj.weight", mlp + "up_proj.weight"],
            "down": [mlp + "down_proj.weight"],
        }
        for name, theirs in ours.items():
            if theirs[0] in state:
                weights[f"layers.{i}.{name}"] = np.concatenate([state[key] for key in theirs])
    return weights


def assert_same_weights(checkpoint: Checkpoint, model: PreTrainedModel, atol: float = 0.0) -> None:
    expected = expected_weights(model)
    assert set(checkpoint.config.weight_shapes()) == set(expected)
    for name, shape in checkpoint.config.weight_shapes().items():
        weight = checkpoint.read(name)
        assert weight.shape == shape
        assert weight.dtype == np.float32
        assert weight.flags.c_contiguous
        assert weight.flags.writeable
        np.testing.assert_allclose(weight, expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_huggingface_weights_are_transformers_own(family: str, tmp_path: Path) -> None:
    model = write_tiny(family, tmp_path / "tiny")
    checkpoint = open_checkpoint(tmp_path / "tiny")
    assert_same_weights(checkpoint, model)
    assert checkpoint.source == checkpoint.name == "tiny"
    config = checkpoint.config
    assert config.architecture == family.split("-")[0].replace("llama3", "llama")
    assert config.context_length == 256
    assert config.head_dim == (32 if family == "qwen3" else 16)
    assert config.norm_eps == model.config.rms_norm_eps
    assert config.qkv_bias == (family in ("llama-linear", "internlm", "qwen2"))
    assert config.output_bias == (family in ("llama-linear", "internlm"))
    assert config.qk_norm == config.tied_embeddings == (family == "qwen3")


@pytest.mark.parametrize("family", ["llama", "llama3", "llama-linear", "internlm2", "qwen2", "qwen3"])
def test_gguf_weights_are_transformers_own(family: str, tmp_path: Path) -> None:
    model = write_tiny_gguf(family, tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert_same_weights(checkpoint, model)
    write_tiny(family, tmp_path / "folder")
    from_folder = open_checkpoint(tmp_path / "folder").config
    assert checkpoint.config.rope_scaling == from_folder.rope_scaling
    assert checkpoint.config == from_folder


@pytest.mark.parametrize(
    ("quantization", "atol"),
    [(gguf.GGMLQuantizationType.F16, 5e-4), (gguf.GGMLQuantizationType.BF16, 5e-3), (Q8_0, 5e-3)],
)
def test_gguf_quantizations(quantization: gguf.GGMLQuantizationType, atol: float, tmp_path: Path) -> None:
    model = write_tiny_gguf("llama", tmp_path / "tiny.gguf", quantization=quantization)
    assert_same_weights(open_checkpoint(tmp_path / "tiny.gguf"), model, atol)


def test_a_folder_with_one_gguf_file(tmp_path: Path) -> None:
    write_tiny_gguf("llama", tmp_path / "Some-Model.Q8_0.gguf", quantization=Q8_0)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.source, checkpoint.name) == ("Some-Model.Q8_0.gguf", "Some-Model.Q8_0")
    write_tiny_gguf("llama", tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(Some-Model\.Q8_0\.gguf, other\.gguf\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_several_files(dtype: torch.dtype, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    checkpoint = open_checkpoint(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(checkpoint, model)


def test_rope_scaling_in_both_spellings(tmp_path: Path) -> None:
    write_tiny("llama3", tmp_path)
    llama3 = RopeScaling(kind="llama3", factor=8.0, original_context_length=64)
    assert open_checkpoint(tmp_path).config.rope_scaling == llama3
    block = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    del block["rope_theta"]
    edit_config(tmp_path, rope_parameters=None, rope_scaling=block, rope_theta=500000.0)
    old = open_checkpoint(tmp_path).config
    assert (old.rope_scaling, old.rope_theta) == (llama3, 500000.0)
    edit_config(tmp_path, rope_scaling={"type": "linear", "factor": 2})
    assert open_checkpoint(tmp_path).config.rope_scaling == RopeScaling(kind="linear", factor=2.0)


def test_text_files_and_rules(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "tiny")
    write_tiny_gguf("llama", tmp_path / "tiny.gguf")
    for path in (tmp_path / "tiny", tmp_path / "tiny.gguf"):
        text = open_checkpoint(path).text
        assert (text.rules.bos_token_id, text.rules.add_bos) == (BOS, True)
        assert text.rules.eos_token_ids == (EOS, END_OF_TURN)
        target = tmp_path / f"{path.name}-written"
        target.mkdir()
        text.write(target)
        assert (target / "chat_template.jinja").read_text() == CHAT_TEMPLATE
        tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
        ids = tokenizer.encode("the fox<|im_end|>").ids
        assert ids[0] != BOS
        assert ids[-1] == END_OF_TURN
        assert tokenizer.decode(ids) == "the fox"


def test_digest_follows_the_content(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tiny("llama", tmp_path / folder, seed)
    a, b, c = (source_digest(tmp_path / folder) for folder in "abc")
    assert a == b != c
    write_json(tmp_path / "b" / "generation_config.json", {"eos_token_id": 5})
    assert source_digest(tmp_path / "b") != a


# What published config.json files of these families hold beside the network's shape.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "pad_token_id": 2,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Llama 2": {"_name_or_path": "somewhere", "pretraining_tp": 1, "torch_dtype": "float16", "use_cache": True},
    "Qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_bias": None,
        "mlp_bias": None,
        "attention_dropout": 0.0,
        "max_window_layers": 21,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_mrope": None,
    },
    "Qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "layer_types": ["full_attention", "full_attention"],
        "max_window_layers": 36,
        "sliding_window": None,
    },
    "InternLM2": {
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "attention_bias": None,
        "attn_implementation": "eager",
        "bias": False,
        "rope_parameters": None,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_configs_are_accepted(name: str, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    edit_config(tmp_path, **PUBLISHED[name])
    config = huggingface_config(ConfigFile(tmp_path / "config.json"))
    assert config.num_layers == 2
    assert config.rope_scaling is None
