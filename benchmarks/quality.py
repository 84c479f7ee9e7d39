"""What a format of weights or cache costs in quality: ``python -m benchmarks.quality FOLDER... --reference FOLDER``.

Each exported model is asked for two numbers. Its *perplexity* over a text that is not in any training set. And its
*matched prefix*: how many of 48 greedy tokens it would choose as the reference did, before it first chooses another.
The reference is an export in float32 with a cache in float32. End tokens are passed over, so that every answer has 48.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from agent.model_runner import ModelRunner
from agent.protocol import Floats
from agent.step_batch import StepBatch
from benchmarks import prompts, result_files
from benchmarks.report import FOLDER

NEW_TOKENS = 48
ROWS = 32  # that are decoded together
STEP_TOKENS = 128  # of a text; its logits are 25 MB
WINDOWS, WINDOW_TOKENS = 64, 24  # pieces of the passage, as further prompts
CACHE_BYTES = 512 << 20

HEAD = "| model | weights | cache | perplexity | matched prefix, of 48 |\n|---|---|---|--:|--:|"
Tokens = list[int]


@dataclass
class Text:
    """One row of a step: its tokens, how many of them are cached, and the first of the blocks that it owns."""

    tokens: Tokens
    first_block: int
    cached: int = 0


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


class Model:
    """An exported model that runs texts. Every text has blocks of its own, as many as the longest one needs."""

    def __init__(self, folder: Path, cache_dtype: str, longest: int) -> None:
        """Load the export; ``longest`` is the number of tokens of the longest text."""
        self.runner = ModelRunner(folder, cache_bytes=CACHE_BYTES, cache_dtype=cache_dtype, threads=None)
        self.manifest = self.runner.manifest
        self._width = -(-longest // self.manifest.block_size)

    def texts(self, tokens: Sequence[Tokens]) -> list[Text]:
        """New texts, with nothing in the cache."""
        return [Text(list(one), 1 + i * self._width) for i, one in enumerate(tokens)]

    def logits(self, texts: Sequence[Text], *, every: bool) -> Floats:
        """Run what is not cached yet of all texts in one step: logits after every token, or after each text's last."""
        size = self.manifest.block_size
        spans = [np.arange(text.cached, len(text.tokens)) for text in texts]
        tables = [np.arange(text.first_block, text.first_block + self._width) for text in texts]
        lens = np.array([span.size for span in spans])
        slots = [table[span // size] * size + span % size for span, table in zip(spans, tables, strict=True)]
        ids = [text.tokens[text.cached :] for text in texts]
        batch = StepBatch(
            token_ids=int32(np.concatenate(ids)),
            positions=int32(np.concatenate(spans)),
            slot_mapping=int32(np.concatenate(slots)),
            block_tables=int32(np.stack(tables)),
            query_lens=int32(lens),
            context_lens=int32(np.array([len(text.tokens) for text in texts])),
            logits_indices=int32(np.arange(lens.sum()) if every else np.cumsum(lens) - 1),
        )
        for text in texts:
            text.cached = len(text.tokens)
        return self.runner.run(batch).values

    def best(self, logits: Floats) -> NDArray[np.intp]:
        """The best tokens that do not end an answer."""
        logits = logits.copy()
        logits[:, list(self.manifest.tokenizer.eos_token_ids)] = -np.inf
        chosen: NDArray[np.intp] = logits.argmax(axis=1)
        return chosen


def int32(values: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """As a step has them."""
    return np.ascontiguousarray(values, dtype=np.int32)


def perplexity(model: Model, passage: Tokens) -> Mean:
    """e to the mean negative log-likelihood of each token but the first."""
    [text] = model.texts([[]])
    losses: list[float] = []
    for first in range(0, len(passage), STEP_TOKENS):
        text.tokens = passage[: first + STEP_TOKENS]
        logits = model.logits([text], every=True).astype(np.float64)
        following = passage[first + 1 : first + 1 + STEP_TOKENS]
        logits = logits[: len(following)]
        top = logits.max(axis=1)
        totals = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        losses += (totals - logits[np.arange(len(following)), following]).tolist()
    value = float(np.exp(np.mean(losses)))
    return Mean(value, value * standard_error(losses))  # the error of an exponential, to first order


def greedy(model: Model, asked: Sequence[Tokens]) -> list[Tokens]:
    """The greedy answers to prompts, ``NEW_TOKENS`` each."""
    answers: list[Tokens] = []
    for begin in range(0, len(asked), ROWS):
        texts = model.texts(asked[begin : begin + ROWS])
        chosen = [int(model.best(model.logits([text], every=False))[0]) for text in texts]
        for _ in range(NEW_TOKENS - 1):
            for text, token in zip(texts, chosen, strict=True):
                text.tokens.append(token)
            chosen = model.best(model.logits(texts, every=False)).tolist()
        for text, prompt, token in zip(texts, asked[begin:], chosen, strict=False):
            answers.append([*text.tokens[len(prompt) :], token])
    return answers


def matched_prefix(model: Model, asked: Sequence[Tokens], answers: Sequence[Tokens]) -> Mean:
    """How far the model would have gone along with the reference's answers.

    As long as it chooses the same tokens it sees the same context, so one look at the whole answer tells.
    """
    lengths = []
    for prompt, answer in zip(asked, answers, strict=True):
        logits = model.logits(model.texts([prompt + answer[:-1]]), every=True)
        lengths.append(common_length(model.best(logits[len(prompt) - 1 :]).tolist(), answer))
    return Mean(float(np.mean(lengths)), standard_error(lengths))


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def prompts_of(tokenizer: Tokenizer) -> list[Tokens]:
    """All short prompts and as many pieces of the passage."""
    passage = tokenizer.encode(prompts.PASSAGE).ids
    starts = np.linspace(0, len(passage) - WINDOW_TOKENS, WINDOWS).astype(int)
    short = [encoding.ids for encoding in tokenizer.encode_batch([prompt.text for prompt in prompts.short_prompts()])]
    return short + [passage[start : start + WINDOW_TOKENS] for start in starts]


def lines(reference: Path, folders: Sequence[Path], cache_dtype: str) -> Iterator[str]:
    """A line of the table for the reference and for each export."""
    tokenizer = Tokenizer.from_file(str(reference / "tokenizer.json"))
    asked = prompts_of(tokenizer)
    passage = tokenizer.encode(prompts.PASSAGE).ids
    longest = len(passage)
    short = max(map(len, asked)) + NEW_TOKENS
    answers = greedy(Model(reference, "float32", short), asked)
    yield from (HEAD,)
    for folder, dtype in [(reference, "float32"), *((folder, cache_dtype) for folder in folders)]:
        model = Model(folder, dtype, longest)
        cells = (
            folder.name,
            model.manifest.weights,
            dtype,
            str(perplexity(model, passage)),
            str(matched_prefix(model, asked, answers)),
        )
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="exported models")
    parser.add_argument("--reference", required=True, type=Path, help="the same model, exported with float32 weights")
    parser.add_argument("--cache-dtype", default="float32", help="of the models' caches (default: %(default)s)")
    arguments = parser.parse_args()
    found = []
    for line in lines(arguments.reference, arguments.folders, arguments.cache_dtype):
        print(line, flush=True)
        found.append(line)
    result_files.write(FOLDER / "quality", {".md": "\n".join(found) + "\n"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
