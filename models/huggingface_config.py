"""The network that a Hugging Face ``config.json`` describes.

Every field of the file falls under one rule, so that none is ignored by oversight: it is read here; or it is known to
say nothing about the result (``HARMLESS_FIELDS``, and names with a leading underscore, which transformers keeps for
itself); or it changes the result and may only have the one value that is implemented (``FIXED_FIELDS``); or it is
unknown and must then be null or empty. ``auto_map`` names code that is never run: the architectures are ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from models.checkpoint_error import CheckpointError
from models.config_fields import ConfigFields
from models.network_config import NetworkConfig, RopeScaling

CONFIG_FILE = "config.json"
Architecture = Literal["llama", "internlm", "internlm2", "qwen2", "qwen3"]
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "InternLMForCausalLM": "internlm",
    "InternLM2ForCausalLM": "internlm2",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
READ_FIELDS = {
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
}
# Read for some architectures only; for the others such a field is unknown.
FAMILY_FIELDS = {
    "llama": {"attention_bias"},
    "internlm": {"bias", "rotary"},
    "internlm2": {"bias"},
    "qwen2": {"sliding_window", "max_window_layers"},  # both without effect while use_sliding_window is off
    "qwen3": {"attention_bias", "sliding_window", "max_window_layers"},
}
FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "is_decoder": (False, True),  # all of these are
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
}
HARMLESS_FIELDS = {
    # how it was made and how it is kept
    *("model_type", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_bfloat16", "torchscript"),
    *("initializer_range", "attention_dropout", "hidden_dropout", "pretraining_tp", "attn_implementation"),
    *("tokenizer_class", "task_specific_params", "finetuning_task", "problem_type", "unsloth_version", "unsloth_fixed"),
    *("is_llama_config", "transformers.js_config"),
    # what transformers returns and how it computes
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
    *("id2label", "label2id", "num_labels", "pad_token_id", "unk_token_id", "sep_token_id", "max_sequence_length"),
    # defaults for generation, which a request sets here
    *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    *("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "no_repeat_ngram_size"),
    *("early_stopping", "diversity_penalty", "encoder_no_repeat_ngram_size", "output_scores"),
    *("return_dict_in_generate", "remove_invalid_values", "tf_legacy_loss", "max_new_tokens"),
}
# Keys of rope_scaling (or rope_parameters) by its type, beside the type and rope_theta.
ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


class ConfigFile(ConfigFields):
    """A ``config.json``."""

    def __init__(self, path: Path) -> None:
        try:
            fields = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if not isinstance(fields, dict):
            raise CheckpointError(f"{path}: is not a JSON object")
        super().__init__(path, fields)


def huggingface_config(file: ConfigFile) -> NetworkConfig:
    """Translate a ``config.json``.

    Raises:
        CheckpointError: another architecture, a field that is missing or malformed, or one whose effect is not
            implemented.
    """
    architecture = _architecture(file)
    _refuse_unknown_fields(file, architecture)
    hidden, heads = file.integer("hidden_size"), file.integer("num_attention_heads")
    qkv_bias, output_bias = _biases(file, architecture)
    theta, scaling = _rope(file, architecture)
    return NetworkConfig(
        architecture=architecture,
        num_layers=file.integer("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=file.integer("num_key_value_heads", None if architecture == "qwen3" else heads),
        head_dim=file.integer("head_dim", None if architecture == "qwen3" else hidden // heads),
        intermediate_size=file.integer("intermediate_size"),
        vocab_size=file.integer("vocab_size"),
        context_length=file.integer("max_position_embeddings"),
        norm_eps=file.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=architecture == "qwen3",
        tied_embeddings=file.flag("tie_word_embeddings", False),
    )


def _architecture(file: ConfigFile) -> Architecture:
    found = file.fields.get("architectures")
    if not isinstance(found, list) or len(found) != 1 or found[0] not in ARCHITECTURES:
        model_type = file.fields.get("model_type")
        raise CheckpointError(
            f"{file.path}: has architectures {found!r} (model_type {model_type!r}); "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[found[0]]


def _refuse_unknown_fields(file: ConfigFile, architecture: Architecture) -> None:
    known = READ_FIELDS | HARMLESS_FIELDS | FAMILY_FIELDS[architecture]
    for name, value in file.fields.items():
        if name in known or name.startswith("_") or value in (None, [], {}, ""):
            continue
        if name == "layer_types":
            if not isinstance(value, list) or set(value) != {"full_attention"}:
                raise file.refuse(name, value, "full_attention")
        elif value not in FIXED_FIELDS.get(name, ()):
            raise file.refuse(name, value, " or ".join(map(repr, FIXED_FIELDS.get(name, ()))))


def _biases(file: ConfigFile, architecture: Architecture) -> tuple[bool, bool]:
    """Whether query, key and value have biases, and whether the output has."""
    if architecture == "qwen2":
        return True, False
    internlm = architecture in ("internlm", "internlm2")
    bias = file.flag("bias", True) if internlm else file.flag("attention_bias", False)
    return bias, bias


def _rope(file: ConfigFile, architecture: Architecture) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies and their scaling, in the spelling of any release."""
    if architecture == "internlm" and file.fields.get("rotary"):
        return _internlm_rotary(file), None
    blocks = [name for name in ("rope_parameters", "rope_scaling") if file.fields.get(name)]
    if len(blocks) > 1:
        raise CheckpointError(f"{file.path}: has both {' and '.join(blocks)}, which say the same thing; keep one")
    where = blocks[0] if blocks else "rope_scaling"
    found = file.fields[where] if blocks else {}
    if not isinstance(found, dict):
        raise file.refuse(where, found, f"types {', '.join(ROPE_KEYS)}")
    block = dict(found)
    theta = file.positive("rope_theta", block.pop("rope_theta", None) or file.number("rope_theta", 10000.0))
    kind = block.pop("rope_type", None) or block.get("type", "default")
    block.pop("type", None)
    if kind not in ROPE_KEYS:
        raise file.refuse(where, found, f"types {', '.join(ROPE_KEYS)}")
    for name, value in block.items():
        if name not in ROPE_KEYS[kind] and value is not None and (name, value) != ("partial_rotary_factor", 1.0):
            raise file.refuse(
                f"{where}.{name}", value, f"{', '.join(sorted(ROPE_KEYS[kind])) or 'nothing'} with {kind}"
            )
    return theta, _scaling(file, where, kind, block)


def _scaling(file: ConfigFile, where: str, kind: str, block: dict[str, Any]) -> RopeScaling | None:
    numbers = {name: file.positive(f"{where}.{name}", block.get(name)) for name in ROPE_KEYS[kind]}
    if kind == "linear":
        return RopeScaling(kind="linear", factor=numbers["factor"])
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=numbers["factor"],
            low_freq_factor=numbers["low_freq_factor"],
            high_freq_factor=numbers["high_freq_factor"],
            original_context_length=int(numbers["original_max_position_embeddings"]),
        )
    # "dynamic" changes the frequencies only beyond max_position_embeddings, which is our context length.
    return None


def _internlm_rotary(file: ConfigFile) -> float:
    """InternLM's first spelling; its "dynamic", too, has no effect within the context length."""
    rotary = file.fields["rotary"]
    if not isinstance(rotary, dict) or rotary.get("type") not in ("origin", "dynamic"):
        raise file.refuse("rotary", rotary, "types origin, dynamic")
    return file.positive("rotary.base", rotary.get("base", 10000.0))
