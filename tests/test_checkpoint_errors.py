"""What cannot be served is refused, with the name of what was found."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_config, write_json, write_tiny, write_tiny_gguf
from tokenizers import Tokenizer

from models.checkpoint import CheckpointError, open_checkpoint


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


def break_tokenizer(folder: Path) -> None:
    write_json(folder / "tokenizer.json", {"model": {"type": "BPE"}})


def name_a_number(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"eos_token": 5})


def mistype_scaling(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": ["linear"], "rope_theta": 10000.0})


def encode_template_otherwise(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes("é".encode("latin-1"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_tokenizer, r"tokenizer\.json: is not a tokenizer"),
        (name_a_number, "tokenizer file in it is damaged: TypeError"),
        (mistype_scaling, "tokenizer file in it is damaged: TypeError"),
        (encode_template_otherwise, "tokenizer file in it is damaged: UnicodeDecodeError"),
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
