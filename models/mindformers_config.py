"""The network that a MindFormers YAML file describes, at ``model.model_config``.

Its keys mean what they do in ``mindformers/models/llama/llama_config.py`` and ``research/*/*_config.py``. Every key
falls under one rule, as in ``huggingface_config``: read here, known to say nothing about the result, fixed to the one
value that is implemented, or unknown and then refused unless it is null or empty. What a file says beside its model
(training, devices, data) is not looked at, but for a mixture of experts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml

from models.checkpoint_error import CheckpointError
from models.config_fields import ConfigFields
from models.network_config import NetworkConfig, RopeScaling
from models.weight_map import FusedRows

YAML_SUFFIXES = (".yaml", ".yml")
Family = Literal["llama", "internlm", "internlm2"]
# By model.arch.type: its model_config.type and our name. The "Parallel" ones are the same networks, split explicitly.
ARCHITECTURES: dict[str, tuple[str, Family]] = {
    "LlamaForCausalLM": ("LlamaConfig", "llama"),
    "ParallelLlamaForCausalLM": ("LlamaConfig", "llama"),
    "ParallelQwenForCausalLM": ("LlamaConfig", "llama"),
    "InternLMForCausalLM": ("InternLMConfig", "internlm"),
    "InternLM2ForCausalLM": ("InternLM2Config", "internlm2"),
}
NORM_EPS = {"llama": 1e-5, "internlm": 1e-6, "internlm2": 1e-5}  # where the file names none
THETA = {"llama": 10000.0, "internlm": 10000.0, "internlm2": 1000000.0}
READ_KEYS = {
    *("type", "num_layers", "hidden_size", "num_heads", "n_kv_heads", "vocab_size", "rms_norm_eps"),
    *("intermediate_size", "multiple_of", "ffn_dim_multiplier", "tie_word_embeddings"),
    *("seq_length", "max_position_embedding", "max_position_embeddings", "theta", "extend_method", "scaling_factor"),
    *("bos_token_id", "eos_token_id", "mindformers_version"),
}
FAMILY_KEYS = {"llama": {"qkv_has_bias", "attn_proj_has_bias"}, "internlm": {"has_bias"}, "internlm2": set[str]()}
FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "return_hidden_states": (False,),
    "use_moe": (False,),
}
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
HARMLESS_KEYS = {
    # how numbers are kept and computed: ours are float32 wherever it matters
    *("compute_dtype", "layernorm_compute_type", "layernorm_compute_dtype", "softmax_compute_type"),
    *("softmax_compute_dtype", "rotary_dtype", "param_init_type", "embedding_init_type", "residual_dtype"),
    *("init_method_std", "fused_rms_norm", "rmsnorm_compute_2d", "compute_in_2d", "use_rope_slice"),
    # which tensors are stored together is seen from the tensors
    "qkv_concat",
    # how MindFormers runs it
    *("batch_size", "use_past", "use_past_shard", "is_dynamic", "is_flexible_shape", "use_kvcache_op"),
    *("use_flash_attention", "use_paged_attention", "use_ring_attention", "use_attn_mask_compression"),
    *("use_eod_attn_mask_compression", "block_size", "num_blocks", "chunk_prefill", "input_sliced_sig", "llm_backend"),
    *("offset", "parallel_optimizer", "fine_grain_interleave", "pp_interleave_num", "pipeline_stage"),
    *("checkpoint_name_or_path", "auto_map", "auto_register", "ignore_token_id", "pad_token_id"),
    *("emb_dropout_prob", "calculate_per_token_loss"),
    # defaults for generation, which a request sets here
    *("repetition_penalty", "max_decode_length", "max_new_tokens", "top_k", "top_p", "temperature", "do_sample"),
}


class MindFormersFile(ConfigFields):
    """A YAML file of MindFormers; ``fields`` are those of ``model.model_config``."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        """``content`` is the parsed file."""
        super().__init__(path, content["model"]["model_config"])
        self.architecture = (content["model"].get("arch") or {}).get("type")
        self.tokenizer: dict[str, Any] = (content.get("processor") or {}).get("tokenizer") or {}
        self.experts = (content.get("moe_config") or {}).get("expert_num", 1)


def find_mindformers_file(folder: Path) -> MindFormersFile | None:
    """The YAML file in ``folder`` that describes a model, if one does.

    Raises:
        CheckpointError: several do, or one cannot be read.
    """
    files = [file for path in yaml_files(folder) if (file := _mindformers_file(path)) is not None]
    if len(files) > 1:
        names = ", ".join(file.path.name for file in files)
        raise CheckpointError(f"{folder}: holds {len(files)} descriptions of a model ({names}); leave one in it")
    return files[0] if files else None


def yaml_files(folder: Path) -> list[Path]:
    """All YAML files in a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix in YAML_SUFFIXES)


def _mindformers_file(path: Path) -> MindFormersFile | None:
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("model_config"), dict):
        return None
    return MindFormersFile(path, content)


def mindformers_config(file: MindFormersFile) -> NetworkConfig:
    """Translate a YAML file.

    Raises:
        CheckpointError: another architecture, a key that is missing or malformed, or one whose effect is not
            implemented.
    """
    family = _family(file)
    _refuse_unknown_keys(file, family)
    hidden, heads = file.integer("hidden_size"), file.integer("num_heads")
    qkv_bias, output_bias = _biases(file, family)
    theta, scaling = _rope(file, family)
    return NetworkConfig(
        architecture="qwen2" if family == "llama" and qkv_bias and not output_bias else family,
        num_layers=file.integer("num_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=file.integer("n_kv_heads", 8 if family == "internlm2" else heads),
        head_dim=hidden // heads,
        intermediate_size=_intermediate_size(file, family, hidden),
        vocab_size=file.integer("vocab_size"),
        context_length=_context_length(file),
        norm_eps=file.number("rms_norm_eps", NORM_EPS[family]),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        tied_embeddings=file.flag("tie_word_embeddings", False),
    )


def fused_rows(file: MindFormersFile) -> FusedRows:
    """How the rows of tensors that ``qkv_concat`` has made of several stand.

    To MindFormers 1.3 query, key and value stand one after the other (llama_transformer.py and convert_weight.py of
    1.3.2), later those of each key/value head (the same files of 1.6.0). Their names and shapes are the same.

    Raises:
        CheckpointError: the file does not say which release has written them.
    """
    if _family(file) == "internlm2":
        return "grouped"  # as InternLM2 itself has them, in every release (research/internlm2/internlm2_transformer.py)
    version = str(file.fields.get("mindformers_version"))
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else None
    if release is None or (1, 3) < release < (1, 6):
        raise CheckpointError(
            f"{file.path}: its weights were put together with qkv_concat, and mindformers_version = {version} does not "
            'say in which order: add mindformers_version: "1.3" to model_config for weights of MindFormers 1.3 or '
            'before, "1.6" for those of 1.6 or later; or give weights that were converted without qkv_concat'
        )
    return "stacked" if release <= (1, 3) else "grouped"


def _family(file: MindFormersFile) -> Family:
    kind, family = ARCHITECTURES.get(str(file.architecture), (None, None))
    if family is None or file.fields.get("type") != kind:
        raise CheckpointError(
            f"{file.path}: has architecture {file.architecture!r} with {file.fields.get('type')!r}; supported: "
            f"{', '.join(ARCHITECTURES)}; of a file that names a Hugging Face folder, give that folder"
        )
    return family


def _refuse_unknown_keys(file: MindFormersFile, family: Family) -> None:
    if file.experts != 1:
        raise file.refuse("moe_config.expert_num", file.experts, "1")
    known = READ_KEYS | HARMLESS_KEYS | FAMILY_KEYS[family]
    for name, value in file.fields.items():
        if name in known or value in (None, [], {}, ""):
            continue
        if value not in FIXED_KEYS.get(name, ()):
            raise file.refuse(name, value, " or ".join(map(repr, FIXED_KEYS.get(name, ()))))


def _biases(file: MindFormersFile, family: Family) -> tuple[bool, bool]:
    """Whether query, key and value have biases, and whether the output has."""
    if family == "internlm":
        bias = file.flag("has_bias", True)
        return bias, bias
    return file.flag("qkv_has_bias", False), file.flag("attn_proj_has_bias", False)


def _intermediate_size(file: MindFormersFile, family: Family, hidden: int) -> int:
    """As the file says, else as LlamaFeedForward computes it."""
    if family == "internlm2" or file.fields.get("intermediate_size") is not None:
        return file.integer("intermediate_size", 14336)
    size = 4 * hidden
    if file.fields.get("ffn_dim_multiplier") is not None:
        size = int((file.number("ffn_dim_multiplier") + 0.01) * size)
    multiple = file.integer("multiple_of", 256)
    return -(-int(2 * size / 3) // multiple) * multiple


def _context_length(file: MindFormersFile) -> int:
    """What the network can do; ``seq_length`` may be less, for a run of MindFormers with less memory."""
    lengths = ("max_position_embedding", "max_position_embeddings")
    return max(file.integer("seq_length", 2048), *(file.integer(name, 1) for name in lengths))


def _rope(file: MindFormersFile, family: Family) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies and their scaling, as ``FreqsMgr`` in mindformers/modules/layers.py has it."""
    theta = file.number("theta", THETA[family])
    method, factor = file.fields.get("extend_method") or "None", file.fields.get("scaling_factor")
    if method == "None":
        return theta, None
    if method == "PI":
        return theta, RopeScaling(kind="linear", factor=file.positive("scaling_factor", factor))
    if method == "NTK":
        return theta * file.positive("scaling_factor", factor), None
    keys = {"linear": ("factor",), "LLAMA3": LLAMA3_KEYS}.get(method)
    if keys is None:
        raise file.refuse("extend_method", method, "None, PI, NTK, linear, LLAMA3")
    if not isinstance(factor, dict) or set(factor) != set(keys):
        raise file.refuse("scaling_factor", factor, f"{', '.join(keys)} with {method}")
    numbers = [file.positive(f"scaling_factor.{name}", factor[name]) for name in keys]
    if method == "linear":
        return theta, RopeScaling(kind="linear", factor=numbers[0])
    return theta, RopeScaling(
        kind="llama3",
        factor=numbers[0],
        low_freq_factor=numbers[1],
        high_freq_factor=numbers[2],
        original_context_length=int(numbers[3]),
    )
