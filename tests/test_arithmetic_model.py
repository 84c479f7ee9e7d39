"""The stand-in: its rule, its files, and that any mistake with the cache shows in its text."""

from __future__ import annotations

import doctest
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_plans import BLOCK_SIZE, PlanRow, Sequenced, make_plan
from tokenizers import Tokenizer

from agent import arithmetic_model
from agent.arithmetic_model import ALPHABET, BEGIN, BROKEN, END, VOCAB_SIZE, ArithmeticModel, answer, write_model
from agent.protocol import StepPlan, ints, pack_ints
from agent.step_batch import StepShapes, read_plan
from config.manifest import ManifestError, read_manifest, verify_files

FOLDER = Path(__file__).parent.parent / "config" / "standin"
PROMPTS = ["hi", "The quick brown fox", "你好世界", "🙂🙂", "a" * 40, "def f(x):\n    return x"]


def new_model(step_seconds: float = 0.0) -> ArithmeticModel:
    return ArithmeticModel(FOLDER, cache_bytes=128 * 1024, step_seconds=step_seconds)


def logits_of(model: ArithmeticModel, plan: StepPlan) -> np.ndarray:
    shapes = StepShapes(
        vocab_size=VOCAB_SIZE,
        context_length=8192,
        block_size=BLOCK_SIZE,
        num_blocks=model.num_blocks,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
    )
    return model.run(read_plan(plan, shapes)[0]).values


def best(model: ArithmeticModel, plan: StepPlan) -> list[int]:
    return logits_of(model, plan).argmax(axis=1).tolist()


def prompt_tokens(text: str) -> list[int]:
    return [BEGIN, *text.encode()]


def rule(tokens: list[int]) -> int:
    """The next token as the docstring tells it, written down a second time, without arrays."""
    for character in ALPHABET:
        code = character.encode()
        for length in range(1, len(code)):
            if bytes(token % 256 for token in tokens[-length:]) == code[:length] and max(tokens[-length:]) < 256:
                return code[length]
    number = int(str(sum(place * token for place, token in enumerate(tokens, start=1)))[:-1] or "0") % 37
    return END if number == 36 else ALPHABET[number].encode()[0]


def test_worked_example() -> None:
    assert doctest.testmod(arithmetic_model) == (0, 1)
    assert len(ALPHABET) == 36
    assert "#" not in ALPHABET


def test_committed_files_are_what_the_module_writes(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert {path.name for path in FOLDER.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        assert (FOLDER / path.name).read_bytes() == path.read_bytes()
    verify_files(FOLDER, read_manifest(FOLDER))


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"tokenizer\.json"):
        ArithmeticModel(tmp_path, cache_bytes=1024)


@given(st.text())
def test_tokenizer_has_a_token_for_each_byte(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokens = tokenizer.encode(text.replace("<", "("), add_special_tokens=False).ids
    assert tokens == list(text.replace("<", "(").encode())
    assert tokenizer.decode(tokens) == text.replace("<", "(")


def test_special_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE == read_manifest(FOLDER).vocab_size
    assert tokenizer.encode("<s>a<|user|>b</s>").ids == [256, 97, 259, 98, 257]
    assert tokenizer.decode([256, 97, 259, 98, 257]) == "ab"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_answers_follow_the_rule(prompt: str) -> None:
    model = new_model()
    request = Sequenced(seat=0, tokens=prompt_tokens(prompt), blocks=[5, 3, 9, 1, 30, 2, 8, 7])
    for _ in range(60):
        expected = rule(request.tokens)
        assert best(model, make_plan([request.row()])) == [expected]
        request.tokens.append(expected)
    output = [*request.output, END]
    text = bytes(output[: output.index(END)]).decode(errors="ignore")  # the last character may be unfinished
    assert answer(prompt, len(text)) == text
    assert len(answer(prompt, 60)) >= len(text)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_batch_chunks_and_blocks_do_not_matter(data: st.DataObject) -> None:
    """Any requests together, in any chunks, over any blocks, beside a padding row: each gets its own answer."""
    model = new_model()
    texts = data.draw(st.lists(st.text("ab é中", min_size=0, max_size=40), min_size=1, max_size=5))
    free = data.draw(st.permutations(range(1, 64)))
    requests = [
        Sequenced(seat=i, tokens=prompt_tokens(text), blocks=list(free[12 * i : 12 * i + 12]))
        for i, text in enumerate(texts)
    ]
    padding = PlanRow(seat=60, tokens=[7], start=0, blocks=[0], sampled=False)
    for _ in range(data.draw(st.integers(1, 25))):
        chosen = data.draw(st.lists(st.sampled_from(range(len(requests))), min_size=1, unique=True))
        rows = [requests[i].row(data.draw(st.integers(1, 20))) for i in chosen]
        tokens = iter(best(model, make_plan([*rows, padding])))
        for i, row in zip(chosen, rows, strict=True):
            if row.sampled:
                expected = rule(requests[i].tokens)
                assert next(tokens) == expected
                requests[i].tokens.append(expected)


def test_positions_of_a_prompt_are_answered_from_their_own_prefix() -> None:
    tokens = prompt_tokens("any 中 prompt")
    known = dict(zip(range(len(tokens) - 1), tokens[1:], strict=True))
    got = best(new_model(), make_plan([PlanRow(0, tokens, 0, [4, 2], known=known)]))
    assert got == [rule(tokens), *(rule(tokens[:end]) for end in range(1, len(tokens)))]


def test_logits_order() -> None:
    logits = logits_of(new_model(), make_plan([PlanRow(0, prompt_tokens("hi"), 0, [1])]))
    assert logits.shape == (1, VOCAB_SIZE)
    assert logits.dtype == np.float32
    ranked = np.sort(logits[0])[::-1]
    assert ranked[0] - ranked[1] == 2.5
    assert (np.diff(ranked) < 0).all()


def spoiled(plan: StepPlan, **fields: list[int]) -> StepPlan:
    return msgspec.structs.replace(plan, **{name: pack_ints(values) for name, values in fields.items()})


def test_every_mistake_shows() -> None:
    """A decode step after a prompt of 40 tokens in blocks 3, 1, 2; block 5 holds another request's like part."""
    model = new_model()
    tokens = prompt_tokens("x" * 39)
    best(model, make_plan([PlanRow(0, tokens, 0, [3, 1, 2])]))
    best(model, make_plan([PlanRow(0, prompt_tokens("y" * 39), 0, [4, 5, 6])]))
    plan = make_plan([PlanRow(0, [97], 40, [3, 1, 2])])
    right = rule([*tokens, 97])
    assert best(model, plan) == [right]
    slot, position = ints(plan.slot_mapping).tolist(), ints(plan.positions).tolist()
    mistakes = {
        "blocks in a wrong order": {"block_tables": [1, 3, 2]},
        "a block of another request": {"block_tables": [3, 5, 2]},
        "a block that was never written": {"block_tables": [3, 1, 20]},
        "the null block": {"block_tables": [3, 0, 2]},
        "a wrong slot in the right block": {"slot_mapping": [slot[0] + 1]},
        "a slot of another block": {"slot_mapping": [5 * BLOCK_SIZE + 9]},
        "a slot of the null block": {"slot_mapping": [slot[0] % BLOCK_SIZE]},
        "no slot": {"slot_mapping": [-1]},
        "a wrong position": {"positions": [position[0] - 1]},
        "a context that is too long": {"context_lens": [42]},
        "a context that is too short": {"context_lens": [40]},
        "a wrong token": {"token_ids": [98]},
    }
    for mistake, fields in mistakes.items():
        model = new_model()
        best(model, make_plan([PlanRow(0, tokens, 0, [3, 1, 2])]))
        best(model, make_plan([PlanRow(0, prompt_tokens("y" * 39), 0, [4, 5, 6])]))
        assert best(model, spoiled(plan, **fields)) != [right], mistake


def test_entries_of_an_earlier_request_are_found_out() -> None:
    model = new_model()
    best(model, make_plan([PlanRow(0, prompt_tokens("y" * 39), 0, [4, 5, 6])]))
    skipping = PlanRow(0, prompt_tokens("abc")[2:], 2, [5])  # as if its first two tokens were cached in block 5
    assert best(model, make_plan([skipping])) == [BROKEN]


def test_a_fault_is_that_of_a_text_in_a_row() -> None:
    """In prompt and answer together. What is left of another row in the same block is not the row's."""
    model = ArithmeticModel(FOLDER, cache_bytes=128 * 1024, faults={"idg": "raise"})
    request = Sequenced(seat=0, tokens=prompt_tokens("hi"), blocks=[5])
    for token in b"dg":
        assert best(model, make_plan([request.row()])) == [token]
        request.tokens.append(token)
    with pytest.raises(RuntimeError, match="a text that raises"):
        best(model, make_plan([request.row()]))
    shorter = Sequenced(seat=0, tokens=prompt_tokens("hi"), blocks=[5])
    assert best(model, make_plan([shorter.row()])) == [ord("d")]


def test_step_seconds_is_the_least_time_of_a_step() -> None:
    model = new_model(step_seconds=0.05)
    started = time.monotonic()
    logits_of(model, make_plan([PlanRow(0, [BEGIN], 0, [1])]))
    assert time.monotonic() - started >= 0.05
