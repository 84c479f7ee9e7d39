"""Makers of tiny MindFormers folders: a network of ``tiny_checkpoints`` under MindFormers' names, and its YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import mindspore as ms
import torch
import yaml
from mindspore import Tensor
from tiny_checkpoints import BOS, END_OF_TURN, EOS, LLAMA3_ROPE, VOCAB_SIZE, pack_qkv, tiny_model, write_text_files
from transformers import PreTrainedModel

Fused = Literal["stacked", "grouped"]
Form = Literal["ckpt", "safetensors"]
FAMILIES = ("llama", "llama3", "internlm", "internlm2", "qwen2")
NAMES = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "model.norm_out",
}
# What published files of MindFormers say beside the network's shape.
USUAL = {
    "batch_size": 1,
    "seq_length": 256,
    "ignore_token_id": -100,
    "pad_token_id": 0,
    "compute_dtype": "float16",
    "layernorm_compute_type": "float32",
    "softmax_compute_type": "float32",
    "rotary_dtype": "float16",
    "param_init_type": "float16",
    "use_past": True,
    "use_flash_attention": True,
    "block_size": 16,
    "num_blocks": 1024,
    "is_dynamic": True,
    "offset": 0,
    "checkpoint_name_or_path": "",
    "repetition_penalty": 1,
    "max_decode_length": 512,
    "top_k": 3,
    "top_p": 1,
    "do_sample": False,
}
FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "llama": {"type": "LlamaConfig", "scaling_factor": 1.0, "extend_method": "None"},
    "llama3": {
        "type": "LlamaConfig",
        "extend_method": "LLAMA3",
        "scaling_factor": {key: value for key, value in LLAMA3_ROPE.items() if key not in ("rope_type", "rope_theta")},
    },
    "internlm": {"type": "InternLMConfig", "has_bias": True},
    "internlm2": {"type": "InternLM2Config", "theta": 10000.0, "qkv_concat": True},
    "qwen2": {"type": "LlamaConfig", "qkv_has_bias": True, "emb_dropout_prob": 0.0},
}


def write_mindformers(
    family: str,
    folder: Path,
    *,
    fused: Fused | None = None,
    form: Form = "ckpt",
    dtype: Any = ms.float32,
    **shape: int,
) -> PreTrainedModel:
    """Write a folder of ``family`` (one of ``FAMILIES``) and return the model with its weights.

    ``fused``: query, key and value in one tensor, gate and up in another, in one of MindFormers' two orders.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(family, **shape)
    save(mindformers_tensors(model, family, fused), folder / f"{family}.{form}", dtype)
    write_yaml(folder, family, model)
    write_text_files(folder)
    return model


def save(tensors: Mapping[str, torch.Tensor], path: Path, dtype: Any = ms.float32, **options: Any) -> None:
    """Write one file as MindSpore does."""
    entries = [{"name": name, "data": Tensor(tensor.numpy(), dtype)} for name, tensor in tensors.items()]
    ms.save_checkpoint(entries, str(path), format=path.suffix[1:], **options)


def mindformers_tensors(
    model: PreTrainedModel, family: str = "llama", fused: Fused | None = None
) -> dict[str, torch.Tensor]:
    """A network's tensors under MindFormers' names."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor.contiguous()
    for i in range(model.config.num_hidden_layers):
        if family == "internlm2":
            _fuse(tensors, f"model.layers.{i}.attention.", ("wq", "wk", "wv"), "w", pack_qkv(model, i))
        elif fused:
            _fuse_layer(tensors, model, i, fused)
    return tensors


def _fuse_layer(tensors: dict[str, torch.Tensor], model: PreTrainedModel, layer: int, fused: Fused) -> None:
    """What ``qkv_concat`` does to a layer."""
    attention, mlp = f"model.layers.{layer}.attention.", f"model.layers.{layer}.feed_forward."
    gate, up = tensors[f"{mlp}w1.weight"], tensors[f"{mlp}w3.weight"]
    both = torch.cat([gate, up]) if fused == "stacked" else torch.stack([gate, up], dim=1).reshape(-1, gate.shape[1])
    _fuse(tensors, mlp, ("w1", "w3"), "w_gate_hidden", both)
    for part in ("weight", "bias"):
        if f"{attention}wq.{part}" in tensors:
            rows = torch.cat([tensors[f"{attention}{name}.{part}"] for name in ("wq", "wk", "wv")])
            packed = rows if fused == "stacked" else pack_qkv(model, layer, part)
            _fuse(tensors, attention, ("wq", "wk", "wv"), "w_qkv", packed, part)


def _fuse(
    tensors: dict[str, torch.Tensor],
    prefix: str,
    parts: tuple[str, ...],
    name: str,
    value: torch.Tensor,
    part: str = "weight",
) -> None:
    for each in parts:
        del tensors[f"{prefix}{each}.{part}"]
    tensors[f"{prefix}{name}.{part}"] = value


def write_yaml(folder: Path, family: str, model: PreTrainedModel, **changes: Any) -> None:
    """Write ``predict_FAMILY.yaml``; ``changes`` are to its ``model_config``, where None takes a key out."""
    config = model.config
    arch = {"internlm": "InternLMForCausalLM", "internlm2": "InternLM2ForCausalLM"}.get(family, "LlamaForCausalLM")
    keys = {
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": config.rms_norm_eps,
        "bos_token_id": BOS,
        "eos_token_id": [EOS, END_OF_TURN],
    }
    if config.num_key_value_heads != config.num_attention_heads:
        keys["n_kv_heads"] = config.num_key_value_heads
    every = {**USUAL, **keys, **FAMILY_KEYS[family], **changes}
    model_config = {name: value for name, value in every.items() if value is not None}
    content = {
        "seed": 0,
        "run_mode": "predict",
        "moe_config": {"expert_num": 1},
        "model": {"model_config": model_config, "arch": {"type": arch}},
        "processor": {"return_tensors": "ms", "tokenizer": {"bos_token": "<s>", "eos_token": "</s>"}},
    }
    (folder / f"predict_{family}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def edit_yaml(folder: Path, **changes: Any) -> None:
    """Set keys of ``model_config`` in the folder's YAML file; None takes one out."""
    _edit(folder, ("model", "model_config"), changes)


def edit_yaml_tokenizer(folder: Path, **changes: Any) -> None:
    """Set keys of ``processor.tokenizer`` there."""
    _edit(folder, ("processor", "tokenizer"), changes)


def _edit(folder: Path, place: tuple[str, str], changes: dict[str, Any]) -> None:
    (path,) = folder.glob("*.yaml")
    content = yaml.safe_load(path.read_text())
    section = content[place[0]]
    section[place[1]] = {key: value for key, value in (section[place[1]] | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
