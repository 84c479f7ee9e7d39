"""Makers of tiny random checkpoints, a few hundred kilobytes each, of every family and format that is supported.

The weights are transformers' own (or a rearrangement of them where it has no class for a family), large enough that a
mistake in any of them shows in the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("llama", "llama3", "llama-linear", "internlm", "internlm2", "qwen2", "qwen3")
VOCAB_SIZE = 320  # of the network; the tokenizer has fewer, as is usual
BOS, EOS, END_OF_TURN = 0, 1, 2
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_end|>", "<|im_start|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def write_tiny(family: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Write a Hugging Face folder of ``family`` (one of ``FAMILIES``) and return the model with its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(family, seed)
    model.save_pretrained(folder)
    if family == "internlm":
        _rewrite_as_internlm(folder)
    if family == "internlm2":
        _rewrite_as_internlm2(folder, model)
    write_text_files(folder)
    return model


def tiny_model(family: str, seed: int = 0, **changes: int) -> PreTrainedModel:
    """A random network of ``family``, in evaluation mode; ``changes`` are to its ``SHAPE``."""
    shape = SHAPE | changes
    model: PreTrainedModel
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, rms_norm_eps=1e-6))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=32, tie_word_embeddings=True))
    else:
        ropes: dict[str, Any] = {"llama3": LLAMA3_ROPE, "llama-linear": LINEAR_ROPE}
        biases = family in ("internlm", "llama-linear")
        config = LlamaConfig(**shape, rms_norm_eps=1e-5, attention_bias=biases, rope_parameters=ropes.get(family))
        model = LlamaForCausalLM(config)
    _randomize(model, seed)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=[EOS, END_OF_TURN])
    return model.eval()


def _randomize(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)


def byte_level_tokenizer() -> Tokenizer:
    """A small BPE over bytes, whose template puts ``<s>`` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and then the fox sleeps"] * 4, trainer)
    return tokenizer


def write_text_files(folder: Path) -> None:
    """Write the tokenizer and its settings beside a ``config.json``."""
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": CHAT_TEMPLATE}
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_config(folder: Path, **changes: Any) -> None:
    """Set fields of a ``config.json``; None takes one out."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    write_json(path, {name: value for name, value in content.items() if value is not None})


def _rewrite_as_internlm(folder: Path) -> None:
    """Llama with attention biases, told as InternLM v1 tells it. The code that ``auto_map`` names does not exist."""
    edit_config(
        folder,
        architectures=["InternLMForCausalLM"],
        model_type="internlm",
        auto_map={"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
        bias=True,
        rotary={"base": 10000, "type": "dynamic"},
        attention_bias=None,
        rope_parameters=None,
        mlp_bias=None,
        head_dim=None,
    )


def _rewrite_as_internlm2(folder: Path, model: PreTrainedModel) -> None:
    """Llama in InternLM2's names, with query, key and value packed by key/value head."""
    edit_config(
        folder,
        architectures=["InternLM2ForCausalLM"],
        model_type="internlm2",
        bias=False,
        rope_theta=10000.0,
        rope_scaling={"type": "dynamic", "factor": 2.0},
        attention_bias=None,
        rope_parameters=None,
        mlp_bias=None,
        head_dim=None,
    )
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "self_attn" not in name:
            tensors[name] = tensor.contiguous()
    for i in range(SHAPE["num_hidden_layers"]):
        tensors[f"model.layers.{i}.attention.wqkv.weight"] = pack_qkv(model, i)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pack_qkv(model: PreTrainedModel, layer: int, part: str = "weight") -> torch.Tensor:
    """Query, key and value (their weights or biases) in one: for each key/value head, its query heads first."""
    attention = model.get_submodule(f"model.layers.{layer}.self_attn")
    kv_heads = model.config.num_key_value_heads
    parts = [attention.get_parameter(f"{role}_proj.{part}").detach() for role in "qkv"]
    grouped = [rows.reshape(kv_heads, -1, *rows.shape[1:]) for rows in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:]).contiguous()


def write_tiny_gguf(
    family: str,
    path: Path,
    seed: int = 0,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> PreTrainedModel:
    """Write a GGUF file as llama.cpp's converter would, its matrices in ``quantization``, and return the model."""
    model = tiny_model(family, seed)
    architecture = family.split("-")[0].removesuffix("3") if family.startswith("llama") else family
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, model.config, family)
    write_gguf_vocabulary(writer)
    paired = architecture in ("llama", "internlm2")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        for role, heads in (("q_proj", 4), ("k_proj", 2)):
            if role in name and paired:
                values = _pairs_from_halves(values, heads)
        kind = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    if family == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(model))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_metadata(writer: gguf.GGUFWriter, config: Any, family: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family == "llama-linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if family == "llama3":
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])


def write_gguf_vocabulary(writer: gguf.GGUFWriter, pre: str = "gpt-2") -> None:
    """The tiny tokenizer as GGUF metadata, padded to the network's vocabulary."""
    content = json.loads(byte_level_tokenizer().to_str())
    ids = content["model"]["vocab"]
    tokens = sorted(ids, key=lambda token: ids[token]) + [f"[PAD{i}]" for i in range(len(ids), VOCAB_SIZE)]
    kinds = [gguf.TokenType.NORMAL] * len(ids) + [gguf.TokenType.UNUSED] * (VOCAB_SIZE - len(ids))
    kinds[: len(SPECIAL_TOKENS)] = [gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def _pairs_from_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """The converter's ``permute``: rotary partners side by side."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def llama3_divisors(model: PreTrainedModel) -> np.ndarray:
    """How much slower each frequency of ``model`` turns than it would without scaling."""
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    return (plain / model.model.rotary_emb.inv_freq).numpy()


def _gguf_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
        "model.norm": "output_norm",
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name
