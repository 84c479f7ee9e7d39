"""Every family and format: the weights read are transformers' own; what cannot be served is refused by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
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

from models.checkpoint import Checkpoint, CheckpointError, open_checkpoint
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
    assert len([path for path in checkpoint.files if path.suffix == ".safetensors"]) > 2
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
    a, b, c = (open_checkpoint(tmp_path / folder).digest() for folder in "abc")
    assert a == b != c
    write_json(tmp_path / "b" / "generation_config.json", {"eos_token_id": 5})
    assert open_checkpoint(tmp_path / "b").digest() != a


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, r"MistralForCausalLM.*supported: LlamaForCausalLM, InternLM"),
        ({"architectures": None}, "architectures None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"num_key_value_heads": 3}, "4 heads of 16 for 3 keys and values"),
        ({"layer_types": "full_attention"}, "layer_types = 'full_attention'"),
        ({"rope_parameters": 4.0}, r"rope_parameters = 4\.0"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"something_new": False}, "something_new = False"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, r"rope_parameters.*types default, linear"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "mscale": 2.0}}, r"rope_parameters\.mscale = 2\.0"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters\.factor = None"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "is not a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters and rope_scaling"),
        ({"rms_norm_eps": None}, "lacks rms_norm_eps"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_hidden_layers": 3}, r"lacks model\.layers\.2\.input_layernorm\.weight.* and 5 more"),
        ({"num_hidden_layers": 1}, r"holds model\.layers\.1\.\S+, .*does not use"),
        ({"intermediate_size": 128}, r"mlp\.gate_proj\.weight has shape \[96, 64\].*\[128, 64\]"),
        ({"attention_bias": True}, r"lacks model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
)
def test_a_config_that_cannot_be_served(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


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


def replace_by_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def damage_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope" + bytes(100))


def store_as_integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, folder / "model.safetensors")


def index_outside(folder: Path) -> None:
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../model.safetensors"}})


def index_missing_file(folder: Path) -> None:
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-2.safetensors"}})


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def too_many_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(100)])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_by_pickle, r"pytorch_model\.bin; PyTorch's pickle files can run any code"),
        (cut_short, r"model\.safetensors: is cut short: \S+ ends beyond"),
        (cut_header, r"model\.safetensors: is no safetensors file, or is cut short"),
        (damage_header, r"model\.safetensors: has a damaged header"),
        (store_as_integers, r"model\.norm\.weight is stored as I8; supported: F64, F32, F16, BF16"),
        (index_outside, r"names '\.\./model\.safetensors'"),
        (index_missing_file, r"model-2\.safetensors: is missing"),
        (remove_tokenizer, r"neither tokenizer\.json nor tokenizer\.model"),
        (remove_config, r"no config\.json and no GGUF file"),
        (too_many_tokens, r"'<extra 99>' has id \d+, the network only knows 320"),
    ],
)
def test_a_damaged_folder(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: does not exist; expected a \.gguf file"):
        open_checkpoint(tmp_path / "nowhere")
    for name, message in (("model.pt", "run any code"), ("model.txt", "no GGUF file")):
        (tmp_path / name).write_bytes(b"\x80\x04some bytes")
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("size", [8, 300, 20000, -100])
def test_a_truncated_gguf_file(size: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf("llama", path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: is no GGUF file, or is cut short or damaged"):
        open_checkpoint(path)


def write_gguf(path: Path, architecture: str, **metadata: Any) -> None:
    """A GGUF file of a few keys and no tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("gemma3", {}, "architecture 'gemma3'; supported in GGUF: llama, internlm2, qwen2, qwen3"),
        ("llama", {"llama__expert_count": 8}, r"llama\.expert_count = 8 may change the result"),
        ("llama", {"llama__attention__sliding_window": 4096}, r"llama\.attention\.sliding_window = 4096"),
        ("llama", {"llama__attention__causal": False}, r"llama\.attention\.causal = False"),
        ("llama", {"llama__expert_count": 0}, r"lacks the metadata key llama\.embedding_length"),
        ("llama", {}, r"lacks the metadata key llama\.embedding_length"),
        ("llama", {"split__count": 3}, "is one of 3 parts"),
        (
            "llama",
            {"llama__embedding_length": 4, "llama__attention__head_count": 1, "llama__rope__dimension_count": 2},
            r"rope\.dimension_count = 2 and heads of 4",
        ),
    ],
)
def test_a_gguf_file_that_cannot_be_served(
    architecture: str, metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", architecture, **metadata)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "tiny.gguf")
