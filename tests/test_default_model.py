"""The default model through agents and HTTP: its greedy text is what another implementation computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from default_model import NEW_TOKENS, PROMPTS, default_model
from golden_text import LOGIT_TOLERANCE, Answer, agreement, ask, ask_together, metric, reference
from paged_rows import Row, step
from serving_processes import Serving, serving
from tokenizers import Tokenizer

from agent.model_runner import ModelRunner


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
def answers(deployment: Serving) -> list[Answer]:
    """All prompts at once."""
    return ask_together(deployment, PROMPTS)


def test_greedy_text_equals_the_reference(
    answers: list[Answer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert all(len(answer.token_ids) == NEW_TOKENS for answer in answers)
    compared = sum(agreement(answer) for answer in answers)
    total = len(PROMPTS) * NEW_TOKENS
    with capsys.disabled():
        print(
            f"\n{compared} of {total} positions equal the reference, {total - compared} after a near tie not compared"
        )
    assert compared > total / 2


@pytest.mark.slow
def test_logits_of_every_position_equal_the_reference(model_folder: Path) -> None:
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
            expected = reference()(torch.tensor([tokens])).logits[0].numpy()
        assert np.abs(np.concatenate(parts) - expected).max() < LOGIT_TOLERANCE


@pytest.mark.slow
def test_alone_gives_the_text_of_the_batch(deployment: Serving, answers: list[Answer]) -> None:
    client = deployment.client()
    for prompt, together in list(zip(PROMPTS, answers, strict=True))[::8]:
        alone = ask(client, prompt)
        same = min(agreement(alone), agreement(together))
        assert alone.token_ids[:same] == together.token_ids[:same]


@pytest.mark.slow
def test_preempted_requests_give_the_same_text(crowded: Serving, answers: list[Answer]) -> None:
    some = slice(0, None, 3)
    for undisturbed, preempted in zip(answers[some], ask_together(crowded, PROMPTS[some]), strict=True):
        same = min(agreement(undisturbed), agreement(preempted))
        assert preempted.token_ids[:same] == undisturbed.token_ids[:same]
    assert metric(crowded, "num_preemptions_total") > 0


@pytest.mark.slow
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
