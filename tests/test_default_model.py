"""The default model through agents and HTTP: its greedy text is what another implementation computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch
from default_model import NEW_TOKENS, PROMPTS, default_model
from paged_rows import Row, step
from serving_processes import Serving, serving
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from agent.model_runner import ModelRunner
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


@pytest.fixture(scope="module")
def model_folder() -> Path:
    """The default model in the reference format; kept for the next time, beside the one that ``make export`` leaves."""
    return default_model("float32")


@pytest.fixture(scope="module")
def deployment(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    model = {"path": str(model_folder), "target": "cpu", "cache_memory": "256MiB", "cache_dtype": "float32"}
    with serving(tmp_path_factory.mktemp("default"), [model]) as started:
        yield started


@pytest.fixture(scope="module")
def crowded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The same model with a cache that the prompts do not fit in together."""
    model = {"path": str(model_folder), "target": "cpu", "cache_memory": "10MiB", "cache_dtype": "float32"}
    with serving(tmp_path_factory.mktemp("crowded"), [model]) as started:
        yield started


@pytest.fixture(scope="module")
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


def agreement(answer: Answer, model: PreTrainedModel) -> int:
    """How many of the answer's tokens are compared before a near tie; fails where one of those is another's."""
    with torch.no_grad():
        logits = model(torch.tensor([answer.prompt_ids + answer.token_ids])).logits[0]
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


@pytest.fixture(scope="module")
def answers(deployment: Serving) -> list[Answer]:
    """All prompts at once."""
    return ask_together(deployment, PROMPTS)


def test_greedy_text_equals_the_reference(
    answers: list[Answer],
    reference: PreTrainedModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert all(len(answer.token_ids) == NEW_TOKENS for answer in answers)
    compared = sum(agreement(answer, reference) for answer in answers)
    total = len(PROMPTS) * NEW_TOKENS
    with capsys.disabled():
        print(
            f"\n{compared} of {total} positions equal the reference, {total - compared} after a near tie not compared"
        )
    assert compared > total / 2


def test_logits_of_every_position_equal_the_reference(model_folder: Path, reference: PreTrainedModel) -> None:
    runner = ModelRunner(model_folder, cache_bytes=64 << 20, cache_dtype="float32", threads=None)
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    for prompt in PROMPTS[::10]:
        tokens = tokenizer.encode(prompt).ids
        row = Row(blocks=[3, 1, 2, 4], tokens=tokens)
        first = len(tokens) // 2  # a prompt, then a chunk on what it cached
        parts = [
            runner.run(step([row], [length], runner.manifest.block_size, every_position=True)).values
            for length in (first, len(tokens) - first)
        ]
        with torch.no_grad():
            expected = reference(torch.tensor([tokens])).logits[0].numpy()
        assert np.abs(np.concatenate(parts) - expected).max() < LOGIT_TOLERANCE


def test_alone_gives_the_text_of_the_batch(
    deployment: Serving, answers: list[Answer], reference: PreTrainedModel
) -> None:
    client = deployment.client()
    for prompt, together in list(zip(PROMPTS, answers, strict=True))[::8]:
        alone = ask(client, prompt)
        same = min(agreement(alone, reference), agreement(together, reference))
        assert alone.token_ids[:same] == together.token_ids[:same]


def test_preempted_requests_give_the_same_text(
    crowded: Serving, answers: list[Answer], reference: PreTrainedModel
) -> None:
    some = slice(0, None, 3)
    for undisturbed, preempted in zip(answers[some], ask_together(crowded, PROMPTS[some]), strict=True):
        same = min(agreement(undisturbed, reference), agreement(preempted, reference))
        assert preempted.token_ids[:same] == undisturbed.token_ids[:same]
    assert metric(crowded, "num_preemptions_total") > 0


def test_streamed_text_is_the_full_text_and_the_cache_is_empty_afterwards(deployment: Serving) -> None:
    client = deployment.client()
    for prompt in PROMPTS[::12]:
        parameters = {"max_new_tokens": 24, "return_full_text": False, "return_protocol": "raw"}
        body = {"inputs": prompt, "parameters": parameters}
        full = client.post("/models/internlm/generate", json=body).json()["generated_text"]
        with client.stream("POST", "/models/internlm/generate_stream", json=body) as response:
            pieces = [httpx.Response(200, content=line[5:]).json()["token"]["text"] for line in response.iter_lines()]
        assert "".join(pieces) == full
    assert metric(deployment, "kv_cache_usage_perc") == 0


def metric(deployment: Serving, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = deployment.client().get("/metrics").text.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if name in line and not line.startswith("#")]
    assert values, name
    return sum(values)
