"""The default model through agents and HTTP: its greedy text is what another implementation computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from serving_processes import Serving, serving
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models import export

NEW_TOKENS = 48
NEAR_TIE = 0.01  # between the reference's two best logits: from there on f32 sums in another order may choose otherwise
LOGIT_TOLERANCE = 1e-3
PROMPTS = [
    line.replace("\\n", "\n").replace("\\t", "\t")
    for line in (Path(__file__).parent / "golden_prompts.txt").read_text(encoding="utf-8").splitlines()
]


@dataclass(frozen=True)
class Answer:
    """A full answer with its token ids."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str


@pytest.fixture(scope="module")
def model_folder() -> Path:
    """The exported default model, as ``make export`` leaves it."""
    options = export.ExportOptions(operators=export.choose_operators("auto"))
    export.export(export.default_checkpoint(), export.DEFAULT_FOLDER, options)
    return export.DEFAULT_FOLDER


@pytest.fixture(scope="module")
def deployment(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    model = {"path": str(model_folder), "target": "cpu", "cache_memory": "256MiB"}
    with serving(tmp_path_factory.mktemp("default"), [model]) as started:
        yield started


@pytest.fixture(scope="module")
def crowded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The same model with a cache that the prompts do not fit in together."""
    model = {"path": str(model_folder), "target": "cpu", "cache_memory": "16MiB"}
    with serving(tmp_path_factory.mktemp("crowded"), [model]) as started:
        yield started


@pytest.fixture(scope="module")
def reference() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """transformers with PyTorch on the weights of the same file."""
    path = export.default_checkpoint()
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        **source
    )


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
    reference: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = reference
    compared = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.prompt_ids == tokenizer(prompt)["input_ids"]
        assert len(answer.token_ids) == NEW_TOKENS
        compared += agreement(answer, model)
    total = len(PROMPTS) * NEW_TOKENS
    with capsys.disabled():
        print(
            f"\n{compared} of {total} positions equal the reference, {total - compared} after a near tie not compared"
        )
    assert compared > total / 2


def test_alone_gives_the_text_of_the_batch(
    deployment: Serving, answers: list[Answer], reference: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    client = deployment.client()
    for prompt, together in list(zip(PROMPTS, answers, strict=True))[::8]:
        alone = ask(client, prompt)
        same = min(agreement(alone, reference[0]), agreement(together, reference[0]))
        assert alone.token_ids[:same] == together.token_ids[:same]


def test_preempted_requests_give_the_same_text(
    crowded: Serving, answers: list[Answer], reference: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    for undisturbed, preempted in zip(answers, ask_together(crowded, PROMPTS), strict=True):
        same = min(agreement(undisturbed, reference[0]), agreement(preempted, reference[0]))
        assert preempted.token_ids[:same] == undisturbed.token_ids[:same]
    assert metric(crowded, "num_preemptions_total") > 0


def test_streamed_text_is_the_full_text_and_the_cache_is_empty_afterwards(deployment: Serving) -> None:
    client = deployment.client()
    for prompt in PROMPTS[::6]:
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
