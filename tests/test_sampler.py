"""Sampling against Hugging Face's own processors, token by token, and the promises that the batch relies on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from agent.draw import SETTINGS, draw, race_times
from agent.logits import RUN, Logits
from agent.logprobs import token_logprobs
from agent.protocol import Floats, SamplingParams, SeatReset, pack_ints
from agent.sampler import Sampler
from agent.token_counts import PENALTIES, TokenCounts, penalized

SEATS = 8
vocabularies = st.sampled_from([1, 2, 7, 61, 300, 5000])
seeds = st.integers(0, 2**64 - 1)
shares = st.sampled_from([1e-9, 0.05, 0.3, 0.5, 0.9, 0.99])
sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.01, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 50, 4000, 10**6]),
    top_p=st.just(1.0) | shares,
    min_p=st.just(0.0) | st.sampled_from([0.01, 0.2, 1.0]),
    typical_p=st.just(1.0) | shares,
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.3]),
    frequency_penalty=st.sampled_from([0.0, -1.0, 0.4]),
    presence_penalty=st.sampled_from([0.0, -0.5, 1.5]),
    seed=seeds,
    min_new_tokens=st.sampled_from([0, 2, 5]),
)


def random_logits(rows: int, vocab: int, seed: int, scale: float = 3.0) -> Floats:
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * scale).astype(np.float32)


def reset(params: SamplingParams, prompt: Sequence[int], output: Sequence[int] = (), seat: int = 0) -> SeatReset:
    return SeatReset(seat=seat, params=params, prompt_ids=pack_ints(prompt), output_ids=pack_ints(output))


def sampled(logits: Floats, *resets: SeatReset) -> list[int]:
    """The next tokens of requests, one for each row of ``logits``."""
    sampler = Sampler(SEATS, logits.shape[1])
    for one in resets:
        sampler.reset(one)
    return sampler.sample(Logits.of(logits), np.array([one.seat for one in resets], np.int32)).tolist()


def hugging_face(row: Floats, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray[Any, Any]:
    """The probabilities of the next token, in double precision, by Hugging Face's processors."""
    scores = torch.tensor(row, dtype=torch.float64)[None]
    ids = torch.tensor([prompt + output])
    if params.repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token, count in Counter(output).items():
        scores[0, token] -= params.frequency_penalty * count + params.presence_penalty
    for token, bias in params.logit_bias:
        scores[0, token] += bias
    if params.min_new_tokens and params.end_token_ids:
        ends = list(params.end_token_ids)
        minimum = hf.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_new_tokens, ends, device="cpu")
        scores = minimum(ids, scores)
    scores = hf.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = hf.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(ids, scores)
    if params.typical_p < 1:
        scores = hf.TypicalLogitsWarper(params.typical_p)(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


def race_time(seed: int, number: int, key: int) -> float:
    """``race_times`` in whole numbers."""

    def mix(state: int) -> int:
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return state ^ state >> 31

    golden = 0x9E3779B97F4A7C15
    row = mix((mix((seed + golden) % 2**64) + (number + 1) * golden) % 2**64)
    return -math.log(((mix((row + (key + 1) * golden) % 2**64) >> 11) + 0.5) / 2**53)


def race(params: SamplingParams, number: int, probabilities: dict[int, float]) -> list[tuple[float, int]]:
    """When each key arrives that can, the first one first."""
    times = {key: race_time(params.seed, number, key) for key in probabilities}
    return sorted((times[key] / chance, key) for key, chance in probabilities.items() if chance > 0)


def is_filtered(params: SamplingParams) -> bool:
    return bool(params.top_k or params.top_p < 1 or params.min_p or params.typical_p < 1)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data(), sampling_params, vocabularies)
def test_the_token_is_the_one_that_wins_the_race(data: st.DataObject, params: SamplingParams, vocab: int) -> None:
    tokens = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=12)
    prompt, output = data.draw(tokens), data.draw(tokens)[1:]
    ends = data.draw(st.sets(st.integers(0, vocab - 1), max_size=min(2, vocab - 1)))
    biases = st.dictionaries(st.integers(0, vocab - 1), st.sampled_from([-100.0, -1.5, 2.0, 30.0]), max_size=4)
    bias = tuple(data.draw(biases).items())
    params = msgspec.structs.replace(params, end_token_ids=tuple(ends), logit_bias=bias)
    row = random_logits(1, vocab, data.draw(st.integers(0, 999)), scale=data.draw(st.sampled_from([0.02, 3.0])))[0]
    [token] = sampled(row[None], reset(params, prompt, output))

    probabilities = hugging_face(row, params, prompt, output)

    def winner(chances: dict[int, float]) -> int:
        first, *others = race(params, len(output), chances)
        assume(not others or others[0][0] > first[0] * (1 + 1e-4))  # single precision moves them
        return first[1]

    chances = dict(enumerate(probabilities.tolist()))
    if not is_filtered(params):  # first a run of neighbours wins, then one of its tokens
        runs = {-1 - run: float(probabilities[run * RUN :][:RUN].sum()) for run in range(-(-vocab // RUN))}
        first = (-1 - winner(runs)) * RUN
        chances = {key: chances[key] for key in range(first, min(first + RUN, vocab))}
    assert token == winner(chances)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=1.0, typical_p=0.6),
        SamplingParams(temperature=2.0, top_k=10, top_p=0.9, min_p=0.02, typical_p=0.9),
    ],
)
@pytest.mark.parametrize("over", ["tokens of one answer", "first tokens of many seeds"])
def test_distribution(params: SamplingParams, over: str) -> None:
    """The frequencies of 20,000 draws with fixed seeds are those of the probabilities (chi-square)."""
    draws, row = 20_000, random_logits(1, 40, seed=5, scale=1.5)[0]
    one = np.zeros(draws, SETTINGS)
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
        one[name] = getattr(params, name)
    one["number" if over == "tokens of one answer" else "seed"] = np.arange(draws)
    counts = np.bincount(draw(Logits.of(row[None]), np.zeros(draws, np.int64), one), minlength=40)
    expected = hugging_face(row, params, [0], []) * draws
    assert not counts[expected == 0].any()
    likely = expected > 5
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic < scipy.stats.chi2.ppf(0.999, df=max(int(likely.sum()) - 1, 1))


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.5), SamplingParams(temperature=1.5, top_p=0.95)])
def test_rounding_hardly_ever_decides(params: SamplingParams) -> None:
    """Logits that differ in their last digits, as those of a row in two batches do, lead to the same tokens."""
    rows, vocab = 200, 50_000
    logits = random_logits(rows, vocab, seed=4, scale=1.0)
    elsewhere = logits * (1 + 1e-6 * np.random.default_rng(5).uniform(-1, 1, logits.shape)).astype(np.float32)
    settings = np.zeros(rows, SETTINGS)
    settings["temperature"], settings["top_p"], settings["typical_p"] = params.temperature, params.top_p, 1.0
    settings["seed"] = np.arange(rows)
    here, there = (draw(Logits.of(values), np.arange(rows), settings) for values in (logits, elsewhere))
    assert np.count_nonzero(here != there) <= 2


@settings(max_examples=150, deadline=None)
@given(st.lists(sampling_params | st.just(SamplingParams()), min_size=1, max_size=SEATS), vocabularies, st.data())
def test_neighbours_do_not_matter(params: list[SamplingParams], vocab: int, data: st.DataObject) -> None:
    """Each row of a batch, in any order of seats, gets the token that it gets alone."""
    logits = random_logits(len(params), vocab, seed=vocab)
    ids = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=5)
    seats = data.draw(st.permutations(range(SEATS)))
    resets = [reset(one, data.draw(ids), data.draw(ids), seat) for one, seat in zip(params, seats, strict=False)]
    together = sampled(logits, *resets)
    alone = [sampled(logits[i : i + 1], msgspec.structs.replace(one, seat=0))[0] for i, one in enumerate(resets)]
    assert together == alone


@settings(max_examples=100, deadline=None)
@given(sampling_params, st.integers(0, 12), vocabularies)
def test_preemption_does_not_matter(params: SamplingParams, preempted_after: int, vocab: int) -> None:
    """A request that takes its seat again, with its answer so far, goes on as if nothing had happened."""
    params = msgspec.structs.replace(params, end_token_ids=(0,) if vocab > 1 else ())
    logits = random_logits(13, vocab, seed=preempted_after)
    prompt, output = [0], []
    sampler, seat = Sampler(SEATS, vocab), np.array([3], np.int32)
    sampler.reset(reset(params, prompt, seat=3))
    for row in logits:
        output += sampler.sample(Logits.of(row[None]), seat).tolist()
    before = output[:preempted_after]
    again = Sampler(SEATS, vocab)
    again.reset(reset(params, prompt, before, seat=3))
    for row in logits[preempted_after:]:
        before += again.sample(Logits.of(row[None]), seat).tolist()
    assert before == output


def test_a_seat_keeps_nothing_of_the_request_before() -> None:
    logits = Logits.of(np.array([[0.0, 1.0, 0.5]], np.float32))
    sampler, seat = Sampler(1, 3), np.array([0], np.int32)
    sampler.reset(reset(SamplingParams(presence_penalty=9.0), [1]))
    assert [sampler.sample(logits, seat).tolist() for _ in range(3)] == [[1], [2], [0]]
    sampler.reset(reset(SamplingParams(), [1]))
    assert sampler.sample(logits, seat).tolist() == [1]
    sampler.reset(reset(SamplingParams(presence_penalty=9.0), [1]))
    assert sampler.sample(logits, seat).tolist() == [1]
    assert sampler.holds(seat)
    sampler.clear()
    assert not sampler.holds(seat)


def test_a_bias_moves_its_own_row_and_does_not_free_what_is_forbidden() -> None:
    logits = random_logits(3, 300, seed=8)
    best = logits.argmax(axis=1).tolist()
    other = (best[1] + 1) % 300
    biased = SamplingParams(logit_bias=((other, 100.0),))
    forbidden = SamplingParams(logit_bias=((best[2], 100.0),), min_new_tokens=1, end_token_ids=(best[2],))
    resets = [reset(SamplingParams(), [1], seat=0), reset(biased, [1], seat=1), reset(forbidden, [1], seat=2)]
    first, second, third = sampled(logits, *resets)
    assert (first, second) == (best[0], other)
    assert third != best[2]
    assert sampled(logits[1:2], reset(SamplingParams(logit_bias=((best[1], -100.0),)), [1])) != [best[1]]


def test_greedy_takes_the_first_of_equals_and_leaves_the_logits_alone() -> None:
    logits = np.array([[1, 3, 3, 2], [-np.inf] * 4, [5, 5, 5, 5]], np.float32)
    before = logits.copy()
    penalized = SamplingParams(repetition_penalty=2.0, min_new_tokens=1, end_token_ids=(0,))
    resets = reset(SamplingParams(), [1]), reset(SamplingParams(), [1], seat=1), reset(penalized, [1], seat=2)
    assert sampled(logits, *resets) == [1, 0, 2]
    assert (logits == before).all()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=0.8, top_k=50, top_p=0.9, typical_p=0.9),
        SamplingParams(temperature=0.8, top_k=5, repetition_penalty=1.3, min_new_tokens=1, end_token_ids=(7,)),
    ],
)
def test_most_logits_are_not_looked_at(params: SamplingParams) -> None:
    """Runs whose maximum is not among the best may hold anything."""
    logits = random_logits(3, 5000, seed=9)
    resets = [reset(msgspec.structs.replace(params, seed=seat), [3, 4], seat=seat) for seat in range(3)]
    expected = sampled(logits, *resets)
    maxima = Logits.of(logits).maxima
    worse = maxima < np.sort(maxima, axis=1)[:, [-60]]
    worse[:, 0] = False  # penalties and forbidden tokens are there
    hidden = Logits(np.where(np.repeat(worse, 64, axis=1)[:, :5000], np.float32(np.nan), logits), maxima)
    sampler = Sampler(SEATS, 5000)
    for one in resets:
        sampler.reset(one)
    assert sampler.sample(hidden, np.arange(3, dtype=np.int32)).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-30, 1e30])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"typical_p": 0.5}])
def test_extremes(temperature: float, filters: dict[str, float]) -> None:
    params = SamplingParams(temperature=temperature, **filters)
    rows = np.array([[-np.inf, -np.inf, 2, -np.inf], [3e38, -3e38, 0, 1], [-np.inf] * 4], np.float32)
    first, second, third = sampled(rows, *(reset(params, [0], seat=seat) for seat in range(3)))
    assert first == 2  # the only token that is possible
    assert second in range(4)
    assert third == 0  # nothing is possible
    if temperature < 1e29:
        assert second == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_none_are_an_error(bad: float, temperature: float) -> None:
    row = np.array([[1, bad, 2]], np.float32)
    with pytest.raises(FloatingPointError):
        sampled(row, reset(SamplingParams(temperature=temperature), [0]))


def test_race_times() -> None:
    """Fixed values (they decide what a seed means from release to release), and even spread over each of the three."""
    one = np.zeros(3, SETTINGS)
    one["seed"], one["number"] = [0, 1, 2**64 - 1], [0, 1, 0]
    times = race_times(one, np.array([0, 7, -1]))
    expected = [[race_time(int(row["seed"]), int(row["number"]), key) for key in (0, 7, -1)] for row in one]
    assert times.tolist() == pytest.approx(np.array(expected))
    assert times[0].tolist() == pytest.approx([1.9753741086451175, 1.7545638194336175, 0.34886890445421287])
    many = np.zeros(20_000, SETTINGS)
    spread = [race_times(one[:1], np.arange(20_000))[0]]
    for name in ("seed", "number"):
        many[:] = 0
        many[name] = np.arange(20_000)
        spread.append(race_times(many, np.array([5]))[:, 0])
    for times in spread:
        assert times.min() > 0
        assert scipy.stats.kstest(times, "expon").pvalue > 0.01
    assert np.abs(np.corrcoef(spread) - np.eye(3)).max() < 0.03


def test_logprobs_of_known_tokens() -> None:
    logits = random_logits(5, 3000, seed=3)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    targets = np.array([0, 7, 2999, 7, 100], np.int32)
    known, ids, values = token_logprobs(Logits.of(logits), np.arange(5), targets, np.full(5, 4))
    np.testing.assert_allclose(known, expected[np.arange(5), targets], atol=1e-5)
    assert ids.tolist() == np.argsort(-expected, axis=1)[:, :4].tolist()
    np.testing.assert_allclose(values, np.take_along_axis(expected, ids.astype(np.int64), 1), atol=1e-5)


def test_logprobs_are_of_raw_logits_and_only_for_rows_that_ask() -> None:
    logits = random_logits(4, 50, seed=1)
    asks = [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}, {"top_logprobs": 1}]
    sampler, seats = Sampler(SEATS, 50), np.arange(4, dtype=np.int32)
    for seat, ask in enumerate(asks):
        sampler.reset(reset(SamplingParams(temperature=2.0, top_k=5, presence_penalty=2.0, **ask), [1], [2], seat))
    record = Logits.of(logits)
    tokens = sampler.sample(record, seats)
    chosen, ids, best = sampler.logprobs(record, seats, tokens)
    expected = torch.log_softmax(torch.tensor(logits), -1).numpy()
    np.testing.assert_allclose(chosen[1:], expected[np.arange(1, 4), tokens[1:]], atol=1e-5)
    assert ids.shape == best.shape == (4, 3)
    assert np.isnan(chosen).tolist() == [True, False, False, False]
    assert np.isnan(best).sum(axis=1).tolist() == [3, 3, 0, 2]
    assert ids[2].tolist() == np.argsort(-logits[2])[:3].tolist()
    assert ids[3, 0] == logits[3].argmax()
    sampler.reset(reset(SamplingParams(top_logprobs=1_000_000), [1], [2], 1))
    _, ids, best = sampler.logprobs(record, seats, tokens)
    assert ids.shape == (4, 50), "no more than there are"
    assert sorted(ids[1].tolist()) == list(range(50))
    nobody = sampler.logprobs(record[:1], seats[:1], tokens[:1])
    assert [array.size for array in nobody] == [0, 0, 0]


@given(st.lists(st.integers(0, 30)), st.lists(st.integers(0, 30)), st.lists(st.integers(0, 30)))
def test_token_counts(prompt: list[int], output: list[int], later: list[int]) -> None:
    counts = TokenCounts(np.array(prompt, np.int32), np.array(output, np.int32))
    for token in later:
        counts.add(token)
    penalties = np.full(counts.ids.size, np.array((1.5, 0.25, 0.5), PENALTIES))
    row = random_logits(1, 31, seed=2)[0]
    expected = row.copy()
    for token in {*prompt, *output, *later}:
        expected[token] *= 1.5 if row[token] < 0 else 1 / 1.5
    for token, count in Counter(output + later).items():
        expected[token] -= 0.25 * count + 0.5
    row[counts.ids] = penalized(row[counts.ids], counts.counts, penalties)
    np.testing.assert_allclose(row, expected, rtol=1e-5)
