"""The network that a GGUF file's metadata describes."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from models.checkpoint_error import CheckpointError
from models.gguf_file import GGUFFile
from models.network_config import NetworkConfig, RopeScaling
from models.weight_map import Floats

Architecture = Literal["llama", "internlm2", "qwen2", "qwen3"]

# The keys under the architecture's name that are read here, or that say nothing about the result.
READ_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
}
# These change the result; only this value is implemented.
FIXED_KEYS = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.sliding_window": 0}
HARMLESS_KEYS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.layer_norm_epsilon"}
ROPE_FREQS = "rope_freqs.weight"


def gguf_config(file: GGUFFile) -> NetworkConfig:
    """Translate a GGUF file's metadata.

    Raises:
        CheckpointError: another architecture, a key that is missing, or one whose effect is not implemented.
    """
    architecture = file.value("general.architecture")
    if architecture not in get_args(Architecture):
        supported = ", ".join(get_args(Architecture))
        raise CheckpointError(f"{file.path}: has architecture {architecture!r}; supported in GGUF: {supported}")
    _refuse_unknown_keys(file, architecture)
    hidden = _integer(file, f"{architecture}.embedding_length")
    heads = _integer(file, f"{architecture}.attention.head_count")
    head_dim = _head_dim(file, architecture, hidden, heads)
    shapes = file.shapes
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{file.path}: lacks token_embd.weight")
    return NetworkConfig(
        architecture=architecture,
        num_layers=_integer(file, f"{architecture}.block_count"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_integer(file, f"{architecture}.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=_integer(file, f"{architecture}.feed_forward_length"),
        vocab_size=shapes["token_embd.weight"][0],
        context_length=_integer(file, f"{architecture}.context_length"),
        norm_eps=_short_float(_required(file, f"{architecture}.attention.layer_norm_rms_epsilon")),
        rope_theta=file.value(f"{architecture}.rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, architecture, head_dim),
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        qk_norm=architecture == "qwen3",
        tied_embeddings="output.weight" not in shapes,
    )


def _refuse_unknown_keys(file: GGUFFile, architecture: str) -> None:
    prefix = architecture + "."
    for key in file.keys:
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in READ_KEYS or name in HARMLESS_KEYS:
            continue
        value = file.value(key)
        if name not in FIXED_KEYS or value != FIXED_KEYS[name]:
            raise CheckpointError(f"{file.path}: {key} = {value!r} may change the result and is not implemented")


def _required(file: GGUFFile, key: str) -> Any:
    value = file.value(key)
    if value is None:
        raise CheckpointError(f"{file.path}: lacks the metadata key {key}")
    return value


def _integer(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.value(key, default)
    if value is None:
        raise CheckpointError(f"{file.path}: lacks the metadata key {key}")
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{file.path}: {key} = {value!r}; only one positive number for all layers is supported")
    return value


def _short_float(value: float) -> float:
    """1e-05 where the file holds the float32 next to it, 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _head_dim(file: GGUFFile, architecture: str, hidden: int, heads: int) -> int:
    head_dim = _integer(file, f"{architecture}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = _integer(file, f"{architecture}.{key}", head_dim)
        if other != head_dim:
            raise CheckpointError(
                f"{file.path}: {architecture}.{key} = {other} and heads of {head_dim}; they must be the same"
            )
    return head_dim


def _rope_scaling(file: GGUFFile, architecture: str, head_dim: int) -> RopeScaling | None:
    prefix = f"{architecture}.rope."
    kind = file.value(prefix + "scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{file.path}: {prefix}scaling.type is {kind!r}; supported: none, linear, and Llama 3's")
    factor = file.value(prefix + "scaling.factor", file.value(prefix + "scale_linear", 1.0))
    stretched = kind == "linear" and factor not in (0.0, 1.0)
    if ROPE_FREQS not in file.shapes:
        return RopeScaling(kind="linear", factor=factor) if stretched else None
    if stretched:
        raise CheckpointError(f"{file.path}: has both {ROPE_FREQS} and linear rope scaling, which is not implemented")
    original = file.value(prefix + "scaling.original_context_length", RopeScaling.original_context_length)
    return _llama3_scaling(file, file.value(prefix + "freq_base", 10000.0), head_dim, original)


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int, original: int) -> RopeScaling | None:
    """The parameters of Llama 3's rule, of which a GGUF file holds only the result: a divisor for each frequency."""
    divisors = file.read(ROPE_FREQS)
    if np.all(divisors == 1.0):
        return None
    scaling = RopeScaling(kind="llama3", factor=float(divisors.max()), original_context_length=original)
    expected = _llama3_divisors(scaling, theta, head_dim)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{file.path}: {ROPE_FREQS} does not follow Llama 3's rule (low factor {scaling.low_freq_factor}, "
            f"high factor {scaling.high_freq_factor}, original context {original}); other rules are not implemented"
        )
    return scaling


def _llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> Floats:
    """Llama 3's divisor of each frequency: 1 for short waves, the factor for long ones, in between a blend."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_context_length * frequencies / (2 * np.pi)  # over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - share) / scaling.factor + share)).astype(np.float32)
