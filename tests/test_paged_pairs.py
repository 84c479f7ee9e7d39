"""Paged pairs of other exporters: adopted, run beside the reference, served like an export of our own."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from paged_pairs import PairShape, write_paged_pair
from paged_rows import Row, step
from serving_processes import Serving, serving
from tiny_checkpoints import VOCAB_SIZE, write_tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from agent import preflight
from agent.paged_pair_runner import PagedPairRunner
from agent.step_batch import PlanError, StepBatch
from config.manifest import ManifestError, read_manifest
from config.serving_config import ModelConfig
from models import adopt, mindir
from models.adopt import AdoptOptions
from models.checkpoint_error import CheckpointError
from models.export import ExportOptions, export

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-3  # of a logit
STATIC = PairShape(prefill=(2, 16), decode=3, tables=8)
BUDGET = 1 << 20  # bytes of a cache
MODELS = ("own", "static", "dynamic")
PROMPTS = ("the fox", "a", "the lazy dog", "jumps", "and then")

Model = torch.nn.Module
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return folder, write_tiny("llama", folder)


@pytest.fixture(scope="module")
def pair(checkpoint: tuple[Path, Model], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A static pair of generation C, whose lengths are columns."""
    folder = tmp_path_factory.mktemp("static")
    return write_paged_pair(checkpoint[0], folder, alike=False, shape=STATIC, lengths_as="column")


@pytest.fixture(scope="module")
def adopted(pair: Pair, checkpoint: tuple[Path, Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "pair"
    adopt.adopt([pair], checkpoint[0], folder, AdoptOptions())
    return folder


@pytest.fixture(scope="module")
def runner(adopted: Path) -> PagedPairRunner:
    return open_pair(adopted)


def open_pair(folder: Path, dtype: str = "float32") -> PagedPairRunner:
    return PagedPairRunner(folder, device=0, cache_bytes=BUDGET, cache_dtype=dtype, threads=1)


def reference(model: Model, tokens: list[int]) -> NDArray[np.float32]:
    """transformers' logits of every position."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def random_tokens(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, count)]


def check_steps(runner: PagedPairRunner, model: Model, tolerance: float = TOLERANCE) -> None:
    """Prompts of several lengths, then tokens of more rows than a call of a static graph holds."""
    size = runner.manifest.block_size
    lengths = [13, 1, 5, 8]
    rows = [Row(list(range(1 + 5 * i, 6 + 5 * i))[::-1], random_tokens(i, lengths[i] + 6)) for i in range(4)]
    rows[3].blocks = [21, 23, 22, 20]
    expected = [reference(model, row.tokens) for row in rows]
    logits = runner.run(step(rows, lengths, size)).values
    for steps in range(5):
        for i, row in enumerate(rows):
            assert np.abs(logits[i] - expected[i][row.computed - 1]).max() < tolerance, (steps, i)
        logits = runner.run(step(rows, [1] * 4, size)).values
    both = runner.run(step([rows[2], Row([24 - 1], random_tokens(9, 3))], [1, 3], size)).values  # a mixed step
    assert both.shape == (2, VOCAB_SIZE)


def test_a_pair_computes_what_the_reference_does(runner: PagedPairRunner, checkpoint: tuple[Path, Model]) -> None:
    assert runner.num_blocks == STATIC.num_blocks
    check_steps(runner, checkpoint[1])


@pytest.fixture(scope="module")
def dynamic_pair(checkpoint: tuple[Path, Model], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair of generation D as it is exported today."""
    return write_paged_pair(checkpoint[0], tmp_path_factory.mktemp("dynamic"), alike=True, shape=PairShape())


@pytest.mark.slow
def test_a_pair_of_open_shapes_computes_it(dynamic_pair: Pair, checkpoint: tuple[Path, Model], tmp_path: Path) -> None:
    manifest = adopt.adopt([dynamic_pair], checkpoint[0], tmp_path / "model", AdoptOptions())
    assert manifest.pair
    assert manifest.pair.padding_slot == -1
    assert manifest.capabilities.max_num_batched_tokens is None
    assert manifest.context_length == 92  # all but the null block
    check_steps(open_pair(tmp_path / "model"), checkpoint[1])


@pytest.mark.slow
def test_open_shapes_without_block_tables_compute_it(checkpoint: tuple[Path, Model], tmp_path: Path) -> None:
    paths = write_paged_pair(checkpoint[0], tmp_path, alike=False, shape=PairShape())
    adopt.adopt([paths], checkpoint[0], tmp_path / "model", AdoptOptions(context_length=50))
    runner = open_pair(tmp_path / "model")
    assert runner.manifest.context_length == 50
    check_steps(runner, checkpoint[1])


@pytest.mark.slow
def test_either_padding_lengths_as_rows_and_a_half_precision_cache(
    checkpoint: tuple[Path, Model], tmp_path: Path
) -> None:
    shape = PairShape(prefill=(1, 16), decode=3, tables=8, cache_dtype="float16")
    paths = write_paged_pair(checkpoint[0], tmp_path, alike=True, shape=shape, lengths_as="row")
    for slot in (-1, 0):
        options = AdoptOptions(padding_slot=slot)  # type: ignore[arg-type]
        adopt.adopt([paths], checkpoint[0], tmp_path / "model", options)
        check_steps(open_pair(tmp_path / "model", "float16"), checkpoint[1], tolerance=0.05)


def test_what_the_graphs_do_not_take_at_once_is_run_in_several_calls(
    runner: PagedPairRunner, checkpoint: tuple[Path, Model]
) -> None:
    size, tokens = runner.manifest.block_size, random_tokens(1, 12)
    row, expected = Row([1, 2, 3], tokens), reference(checkpoint[1], tokens)
    scored = runner.run(step([row], [4], size, every_position=True)).values
    assert np.abs(scored - expected[:4]).max() < TOLERANCE
    rest = runner.run(step([row], [8], size)).values  # on cached tokens
    assert np.abs(rest[0] - expected[11]).max() < TOLERANCE
    nothing: StepBatch = dataclasses.replace(step([Row([1], tokens)], [4], size), logits_indices=np.zeros(0, np.int32))
    assert runner.run(nothing).values.shape == (0, VOCAB_SIZE)
    with pytest.raises(PlanError, match="nothing to copy a block for"):
        runner.copy_blocks(np.array([[1, 2]], np.int32))


def test_the_folder_is_linked_and_says_what_the_graphs_can_do(adopted: Path, pair: Pair) -> None:
    manifest = read_manifest(adopted)
    assert manifest.pair
    assert (adopted / manifest.pair.prefill.file).samefile(pair[0])
    assert (adopted / manifest.pair.decode.file).samefile(pair[1])
    assert set(manifest.files) == {
        path.relative_to(adopted).as_posix()
        for path in adopted.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    can = manifest.capabilities
    assert (can.cached_context, can.mixed_steps, can.prompt_logits) == (False, False, False)
    assert can.max_num_batched_tokens == 16
    assert (manifest.context_length, manifest.num_layers, manifest.target) == (32, 2, "cpu")
    assert [tensor.name for tensor in manifest.pair.prefill.inputs] == ["token_ids", "valid_lengths", "slot_mapping"]


def test_a_cache_is_as_large_and_of_the_type_that_the_graphs_have(adopted: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="hold a cache of float32, not float16"):
        open_pair(adopted, "float16")
    with pytest.raises(ManifestError, match="cache_memory: the graphs hold a cache of 49152 bytes"):
        PagedPairRunner(adopted, device=0, cache_bytes=49151, cache_dtype="float32", threads=1)
    model = ModelConfig(path=str(adopted), names=("a",), agent_ports=(1,), cache_memory="49151B", cache_dtype="float32")
    with pytest.raises(ManifestError, match="keeps the weights that its graphs have"):
        read_manifest(adopted).check_weights("bfloat16")
    assert ("cache_memory", "49151B holds fewer than 24 blocks of 2048 bytes") in preflight._model_problems(model)


def test_graphs_that_do_not_share_a_cache_are_not_served(
    pair: Pair, checkpoint: tuple[Path, Model], tmp_path: Path
) -> None:
    """What the one knows as keys, the other knows as values: names, types and shapes are all as they should be."""

    def other(name: str) -> str:
        swapped = name.replace("key_cache", "swapped").replace("value_cache", "key_cache")
        return swapped.replace("swapped", "value_cache")

    model = mindir.read(pair[1])
    for parameter in model.graph.parameter:
        parameter.name = other(parameter.name)
    for node in model.graph.node:
        node.input[:] = [other(name) for name in node.input]
    decode = tmp_path / "decode.mindir"
    decode.write_bytes(model.SerializeToString())
    adopt.adopt([(pair[0], decode)], checkpoint[0], tmp_path / "model", AdoptOptions())
    with pytest.raises(ManifestError, match="prefill and decode graph do not share their cache"):
        open_pair(tmp_path / "model")


def test_a_pair_for_ascend_says_that_there_is_none(pair: Pair, checkpoint: tuple[Path, Model], tmp_path: Path) -> None:
    adopt.adopt([pair], checkpoint[0], tmp_path / "model", AdoptOptions(target="ascend"))
    with pytest.raises(ManifestError, match=r"^target: ascend needs an Ascend NPU .* finds none here$"):
        open_pair(tmp_path / "model")


def test_weights_of_two_checkpoints_are_no_pair(pair: Pair, checkpoint: tuple[Path, Model], tmp_path: Path) -> None:
    model = mindir.read(pair[1])
    weight = next(each for each in model.graph.parameter if each.name.endswith(":norm"))
    weight.raw_data = weight.raw_data[::-1]
    other = tmp_path / "decode.mindir"
    other.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="have different numbers in norm: they are not of one checkpoint"):
        adopt.adopt([(pair[0], other)], checkpoint[0], tmp_path / "model", AdoptOptions())
    assert not (tmp_path / "model").exists()


def move_weights(graph: Path) -> None:
    """Out of a graph into a file beside it."""
    model = mindir.read(graph)
    with (graph.parent / mindir.WEIGHTS_FILE).open("wb") as file:
        weights = mindir.WeightsFile(file)
        for parameter in model.graph.parameter:
            data = parameter.raw_data
            weights.put(parameter, lambda _, data=data: data)
            parameter.ClearField("raw_data")
    graph.chmod(0o644)
    graph.write_bytes(model.SerializeToString())


@pytest.mark.slow
def test_weights_beside_the_graphs_come_along(pair: Pair, checkpoint: tuple[Path, Model], tmp_path: Path) -> None:
    """As MindSpore leaves them beyond 1 GB: in other files, which the graph names."""
    graphs = []
    for phase, source in zip(("full", "inc"), pair, strict=True):
        graph = tmp_path / phase / "rank_0_graph.mindir"
        graph.parent.mkdir()
        shutil.copyfile(source, graph)
        move_weights(graph)
        graphs.append(graph)
    manifest = adopt.adopt([(graphs[0], graphs[1])], checkpoint[0], tmp_path / "model", AdoptOptions())
    assert {"prefill/rank_0_graph.mindir", "prefill/weights.bin", "decode/weights.bin"} <= set(manifest.files)
    check_steps(open_pair(tmp_path / "model"), checkpoint[1])

    model = mindir.read(graphs[0])
    model.graph.parameter[0].external_data.location = "../inc/weights.bin"
    graphs[0].write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"in \.\./inc/weights\.bin, which is not a file beside it"):
        adopt.adopt([(graphs[0], graphs[1])], checkpoint[0], tmp_path / "other", AdoptOptions())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--context-length", "33"], "33 is more than the 32 tokens that the graphs can hold"),
        (["--tokenizer", "docs"], "docs: has neither tokenizer.json nor tokenizer.model"),
        (["--output", "docs"], "docs: exists and is not an exported model"),
    ],
    ids=["context", "tokenizer", "output"],
)
def test_what_cannot_be_adopted_is_said(
    options: list[str],
    problem: str,
    pair: Pair,
    checkpoint: tuple[Path, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--tokenizer", str(checkpoint[0]), "--output", str(tmp_path / "model"), *options]
    assert adopt.main([*map(str, pair), *words]) == 1
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.skipif("MINDFORMERS_PAIR" not in os.environ, reason="MINDFORMERS_PAIR names no folder with a pair")
def test_a_pair_of_mindformers_is_adopted_for_ascend_only(tmp_path: Path) -> None:
    pair = Path(os.environ["MINDFORMERS_PAIR"], "prefill.mindir"), Path(os.environ["MINDFORMERS_PAIR"], "decode.mindir")
    Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"--target cpu: .* on Ascend only: it uses .*ReshapeAndCache"):
        adopt.adopt([pair], tmp_path, tmp_path / "model", AdoptOptions(target="cpu"))
    manifest = adopt.adopt([pair], tmp_path, tmp_path / "model", AdoptOptions())
    assert manifest.pair
    assert (manifest.target, manifest.pair.cache_dtype, manifest.vocab_size) == ("ascend", "float16", 128)


@pytest.fixture(scope="module")
def deployment(
    checkpoint: tuple[Path, Model], pair: Pair, dynamic_pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """Our own export of a checkpoint, and pairs of it that were adopted by the command."""
    folder = tmp_path_factory.mktemp("served")
    export(checkpoint[0], folder / "own", ExportOptions(operators="portable", block_size=8, context_length=32))
    for name, files in (("static", pair), ("dynamic", dynamic_pair)):
        command = ["-m", "models.adopt", *map(str, files), "--tokenizer", str(checkpoint[0]), "--output"]
        subprocess.run([sys.executable, *command, str(folder / name)], cwd=ROOT, check=True, capture_output=True)
    models = [
        {"path": str(folder / name), "names": [name], "target": "cpu", "cache_dtype": "float32", "cache_memory": "1MiB"}
        for name in MODELS
    ]
    with serving(folder, models) as started:
        yield started


def ask(client: httpx.Client, model: str, prompt: str, **parameters: object) -> httpx.Response:
    settings = {"max_new_tokens": 8, "ignore_eos": True, "return_full_text": False, **parameters}
    return client.post(f"/models/{model}/generate", json={"inputs": prompt, "parameters": settings})


@pytest.mark.slow
def test_an_adopted_pair_answers_like_our_own_export(deployment: Serving) -> None:
    client = deployment.client()
    expected = [ask(client, "own", prompt).json()["generated_text"] for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    for model in MODELS:
        with ThreadPoolExecutor(len(PROMPTS)) as threads:  # more at a time than a call of the static graphs holds
            answers = list(threads.map(partial(ask, client, model), PROMPTS))
        assert [answer.json()["generated_text"] for answer in answers] == expected, model


@pytest.mark.slow
def test_what_an_adopted_pair_cannot_do_is_refused_at_the_door(deployment: Serving) -> None:
    client = deployment.client()
    scored = ask(client, "static", "the fox", details=True, decoder_input_details=True)
    assert (scored.status_code, scored.json()["field"]) == (422, "decoder_input_details")
    long = ask(client, "static", "the fox", max_new_tokens=16)
    assert long.status_code == 422
    assert "context of 16" in long.json()["error"]
