"""The default model's greedy text over HTTP, and how far it is another implementation's."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import gguf
import httpx
import numpy as np
import torch
from default_model import NEW_TOKENS
from serving_processes import Serving
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from models import export

NEAR_TIE = 0.01  # between the reference's two best logits: from there on f32 sums in another order may choose otherwise
LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Answer:
    """A full answer with its token ids."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str


@cache
def reference() -> PreTrainedModel:
    """transformers' Llama with PyTorch on the weights of the same file.

    Its own GGUF reader takes half a minute; the slow tests compare ours with it, and here the weights are filled in.
    """
    file = gguf.GGUFReader(export.default_checkpoint())
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    weights = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in file.tensors}
    state = model.state_dict()
    for name, parameter in state.items():
        if name != "lm_head.weight":
            value = torch.from_numpy(weights[gguf_name(name)].copy())
            heads = {"attn_q": 9, "attn_k": 3}.get(gguf_name(name).split(".")[-2])
            if heads:  # GGUF has rotary partners side by side, transformers half a head apart
                value = value.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(value.shape)
            parameter.copy_(value)
    return model


def gguf_name(name: str) -> str:
    """What GGUF calls a weight of transformers' Llama."""
    theirs = {
        "model.": "", "embed_tokens": "token_embd", "layers": "blk", "self_attn.": "attn_", "mlp.": "ffn_",
        "_proj": "", "attn_o.": "attn_output.", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for old, new in theirs.items():
        name = name.replace(old, new)
    return "output_norm.weight" if name == "norm.weight" else name


def ask(client: httpx.Client, prompt: str) -> Answer:
    """48 greedy tokens, whatever they are."""
    parameters = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "details": True, "decoder_input_details": True}
    response = client.post("/models/llama2/generate", json={"inputs": prompt, "parameters": parameters})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    details = body["details"]
    return Answer(
        prompt_ids=[token["id"] for token in details["prefill"]],
        token_ids=[token["id"] for token in details["tokens"]],
        logprobs=[token["logprob"] for token in details["prefill"][1:] + details["tokens"]],
        text=body["generated_text"],
    )


def ask_together(deployment: Serving, prompts: Sequence[str]) -> list[Answer]:
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(partial(ask, deployment.client()), prompts))


def agreement(answer: Answer) -> int:
    """How many of the answer's tokens are compared before a near tie; fails where one of those is another's."""
    with torch.no_grad():
        logits = reference()(torch.tensor([answer.prompt_ids + answer.token_ids])).logits[0]
    expected = torch.log_softmax(logits, -1)[:-1].gather(
        1, torch.tensor(answer.prompt_ids + answer.token_ids)[1:, None]
    )
    assert np.abs(expected[:, 0].numpy() - np.array(answer.logprobs)).max() < LOGIT_TOLERANCE
    best = logits[len(answer.prompt_ids) - 1 : -1].topk(2)
    for i, token in enumerate(answer.token_ids):
        if best.values[i][0] - best.values[i][1] < NEAR_TIE:
            return i
        assert token == best.indices[i][0], f"token {i} of {answer.text!r}"
    return len(answer.token_ids)


def metric(deployment: Serving, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = deployment.client().get("/metrics").text.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if name in line and not line.startswith("#")]
    assert values, name
    return sum(values)
