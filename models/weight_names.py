"""What the tensors of a weight are called in each format, by the weight's role; ``{}`` is the number of its layer."""

from __future__ import annotations

GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "attention_norm": "blk.{}.attn_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "output": "blk.{}.attn_output",
    "mlp_norm": "blk.{}.ffn_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
HUGGINGFACE_NAMES = {
    "embed_tokens": "model.embed_tokens",
    "attention_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "output": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
INTERNLM2_NAMES = {
    "embed_tokens": "model.tok_embeddings",
    "attention_norm": "model.layers.{}.attention_norm",
    "qkv": "model.layers.{}.attention.wqkv",
    "output": "model.layers.{}.attention.wo",
    "mlp_norm": "model.layers.{}.ffn_norm",
    "gate": "model.layers.{}.feed_forward.w1",
    "up": "model.layers.{}.feed_forward.w3",
    "down": "model.layers.{}.feed_forward.w2",
    "norm": "model.norm",
    "head": "output",
}
# MindFormers' Llama and its relatives (mindformers/models/llama/convert_weight.py, research/internlm, internlm2, qwen2
# and qwen2_5/convert_weight.py): Hugging Face's rows under other names. Its converter from Meta's files moves rotary
# partners into halves (``permute``), as its network turns ``i`` with ``i + d/2`` (RotaryEmbedding.slice_half).
MINDFORMERS_NAMES = {
    "embed_tokens": "model.tok_embeddings",
    "attention_norm": "model.layers.{}.attention_norm",
    "q": "model.layers.{}.attention.wq",
    "k": "model.layers.{}.attention.wk",
    "v": "model.layers.{}.attention.wv",
    "output": "model.layers.{}.attention.wo",
    "mlp_norm": "model.layers.{}.ffn_norm",
    "gate": "model.layers.{}.feed_forward.w1",
    "up": "model.layers.{}.feed_forward.w3",
    "down": "model.layers.{}.feed_forward.w2",
    "norm": "model.norm_out",
    "head": "lm_head",
}
MINDFORMERS_EMBEDDING = "model.tok_embeddings.embedding_weight"
# Where ``qkv_concat`` has put weights together; the last is InternLM2's.
MINDFORMERS_FUSED = (
    ("qkv", "model.layers.{}.attention.w_qkv"),
    ("gate_up", "model.layers.{}.feed_forward.w_gate_hidden"),
    ("qkv", "model.layers.{}.attention.w"),
)
