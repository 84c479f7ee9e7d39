"""The shape of one network, whatever family and file it came from, and the names of its weights.

Every checkpoint reader translates into this; the network is built from nothing else.

=============================== ======================================= ==================================
weight                          shape                                   present
=============================== ======================================= ==================================
``embed_tokens``                ``[vocab, hidden]``                     always
``layers.I.attention_norm``     ``[hidden]``                            always
``layers.I.qkv``                ``[(heads + 2 * kv_heads) * d, hidden]`` always; rows: all q, all k, all v
``layers.I.qkv_bias``           ``[(heads + 2 * kv_heads) * d]``        if ``qkv_bias``
``layers.I.q_norm``, ``k_norm`` ``[d]``                                 if ``qk_norm``
``layers.I.output``             ``[hidden, heads * d]``                 always
``layers.I.output_bias``        ``[hidden]``                            if ``output_bias``
``layers.I.mlp_norm``           ``[hidden]``                            always
``layers.I.gate_up``            ``[2 * intermediate, hidden]``          always; rows: all gate, all up
``layers.I.down``               ``[hidden, intermediate]``              always
``norm``                        ``[hidden]``                            always
``head``                        ``[vocab, hidden]``                     unless ``tied_embeddings``
=============================== ======================================= ==================================

Rotary embedding turns element ``i`` of a head with element ``i + d/2`` (Hugging Face's layout); readers of files with
neighbouring pairs (GGUF's Llama) reorder the rows of q and k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the context that the model was first trained on."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    original_context_length: int = 8192  # llama3 only


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A decoder with RMS norms, rotary embedding, grouped attention heads and a gated SiLU MLP."""

    architecture: Literal["llama", "internlm", "internlm2", "qwen2", "qwen3"]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False

    @property
    def qkv_rows(self) -> int:
        """Rows of the packed query, key and value weight."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the network by name, in the order in which they are used."""
        hidden, heads = self.hidden_size, self.num_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (self.vocab_size, hidden)}
        for i in range(self.num_layers):
            layer: dict[str, tuple[int, ...]] = {"attention_norm": (hidden,), "qkv": (self.qkv_rows, hidden)}
            if self.qkv_bias:
                layer["qkv_bias"] = (self.qkv_rows,)
            if self.qk_norm:
                layer |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
            layer["output"] = (hidden, heads)
            if self.output_bias:
                layer["output_bias"] = (hidden,)
            layer |= {
                "mlp_norm": (hidden,),
                "gate_up": (2 * self.intermediate_size, hidden),
                "down": (hidden, self.intermediate_size),
            }
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["norm"] = (hidden,)
        if not self.tied_embeddings:
            shapes["head"] = (self.vocab_size, hidden)
        return shapes
