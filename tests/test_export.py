"""``python -m models.export`` as a user runs it: reused, replaced, interrupted, refused; and what the files say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray
from tiny_checkpoints import VOCAB_SIZE, edit_config, write_tiny

from agent.model_runner import ModelRunner
from config.manifest import ManifestError, read_manifest, verify_files
from kernels import library
from models import mindir
from models.graphs import dynamic, write_graph

ROOT = Path(__file__).resolve().parent.parent
EVERY_FILE = {
    "argmax.mindir", "chat_template.jinja", "decode.mindir", "manifest.json", "prefill.mindir", "tokenizer.json",
    "topk.mindir", "weights.bin",
}  # fmt: skip
# A test run in the background of a script ignores SIGINT, and so would its children
DEFAULT_SIGNALS = ["env", "--default-signal=INT"]


def command(checkpoint: Path, folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "models.export", str(checkpoint), "--output", str(folder), *options]


def run_export(checkpoint: Path, folder: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **env}
    return subprocess.run(
        command(checkpoint, folder, *options), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny("llama", folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    done = run_export(checkpoint, folder)
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout
    return folder


def test_another_user_can_serve_it(exported: Path) -> None:
    assert {oct(path.stat().st_mode & 0o777) for path in exported.rglob("*.mindir")} == {"0o644"}


def test_everything_is_beside_the_graphs_and_in_the_manifest(exported: Path) -> None:
    manifest = read_manifest(exported)
    assert {path.name for path in exported.iterdir()} == EVERY_FILE
    assert set(manifest.files) == EVERY_FILE - {"manifest.json"}
    verify_files(exported, manifest)
    assert (manifest.vocab_size, manifest.context_length, manifest.world_size) == (VOCAB_SIZE, 256, 1)


def test_both_graphs_take_the_manifests_inputs_in_its_order(exported: Path) -> None:
    manifest = read_manifest(exported)
    for phase in ("prefill", "decode"):
        assert mindir.inputs(mindir.read(exported / f"{phase}.mindir")) == manifest.inputs
    assert [tensor.name for tensor in manifest.inputs] == [
        "token_ids", "positions", "slot_mapping", "block_tables", "query_lens", "context_lens", "logits_indices",
        "key_cache", "value_cache",
    ]  # fmt: skip
    assert manifest.inputs[-1].shape == (-1, manifest.block_size, manifest.num_kv_heads, manifest.head_dim)


def test_weights_are_stored_once_and_no_folder_of_this_machine_is_named(exported: Path) -> None:
    weights = sum(
        np.prod(parameter.dims)
        for parameter in mindir.read(exported / "prefill.mindir").graph.parameter
    )  # fmt: skip
    assert (exported / "weights.bin").stat().st_size < 4 * weights + 64 * 100
    for graph in exported.glob("*.mindir"):
        assert str(ROOT).encode() not in graph.read_bytes()


@pytest.mark.slow
def test_an_export_that_matches_is_reused_and_another_replaced(checkpoint: Path, exported: Path) -> None:
    before = (exported / "manifest.json").stat()
    again = run_export(checkpoint, exported)
    assert again.returncode == 0
    assert "exported already" in again.stderr
    assert (exported / "manifest.json").stat().st_ino == before.st_ino

    other = run_export(checkpoint, exported, "--context-length", "100")
    assert other.returncode == 0, other.stderr
    assert read_manifest(exported).context_length == 100
    assert run_export(checkpoint, exported).returncode == 0


def test_a_damaged_export_is_not_used_but_made_anew(checkpoint: Path, exported: Path) -> None:
    weights = exported / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ManifestError, match=r"weights\.bin: is not the file that was exported"):
        ModelRunner(exported, cache_bytes=1 << 20, cache_dtype="float32", threads=1)
    assert run_export(checkpoint, exported).returncode == 0
    verify_files(exported, read_manifest(exported))


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGTERM, signal.SIGKILL))]
)
def test_an_interrupted_export_leaves_nothing_half_written(checkpoint: Path, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "models" / "tiny"
    with subprocess.Popen(
        [*DEFAULT_SIGNALS, *command(checkpoint, folder)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "exporting decode graph" in line:  # the prefill graph is on disk
                process.send_signal(number)
                break
        said = process.stderr.read()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert not folder.exists()
    if number != signal.SIGKILL:
        assert "interrupted; nothing was changed" in said
        assert "Traceback" not in said
        assert list(folder.parent.glob(".tiny.partial-*")) == []
    assert run_export(checkpoint, folder).returncode == 0
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny.lock", "tiny"]


@pytest.mark.parametrize("kind", ["a file", "a folder", "the checkpoint"])
def test_nothing_but_an_export_is_replaced(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    target = checkpoint if kind == "the checkpoint" else tmp_path / "mine"
    if kind == "a folder":
        target.mkdir()
        (target / "precious.txt").write_text("not yours")
    elif kind == "a file":
        target.write_text("not yours")
    before = sorted(target.iterdir()) if target.is_dir() else target.read_text()
    refused = run_export(checkpoint, target)
    assert refused.returncode == 1
    assert f"{target}: exists and is not an exported model" in refused.stderr
    assert before == (sorted(target.iterdir()) if target.is_dir() else target.read_text())


def test_a_graph_whose_weights_mindspore_puts_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does beyond 1 GB; the limit is lowered, since a test has no model of that size."""
    monkeypatch.setattr("mindspore.train.serialization.TOTAL_SAVE", 1)  # KB
    weight = np.arange(1024, dtype=np.float32)
    graph = tmp_path / "large.mindir"
    write_graph(Plus(weight), graph, dynamic(ms.float32, None))
    (parameter,) = mindir.read(graph).graph.parameter
    assert mindir.read_external(parameter, tmp_path) == weight.tobytes()


class Plus(nn.Cell):
    """Adds a weight."""

    def __init__(self, weight: NDArray[np.float32]) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(weight), name="weight")

    def construct(self, x: Tensor) -> Tensor:
        return x + self.weight


def test_a_full_disk_is_said_and_nothing_is_left(checkpoint: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails in the middle of the weights."""
    limited = ["bash", "-c", 'ulimit -f 100; trap "" XFSZ; exec "$@"', "bash"]
    done = subprocess.run(
        [*limited, *command(checkpoint, tmp_path / "tiny")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "nothing was changed" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".tiny.lock"]


def test_what_cannot_be_exported_is_named(checkpoint: Path, tmp_path: Path) -> None:
    nothing = run_export(tmp_path / "nowhere", tmp_path / "out")
    assert nothing.returncode == 1
    assert "nowhere: does not exist" in nothing.stderr
    write_tiny("llama", tmp_path / "gelu")
    edit_config(tmp_path / "gelu", hidden_act="gelu")
    wrong = run_export(tmp_path / "gelu", tmp_path / "out")
    assert wrong.returncode == 1
    assert "hidden_act" in wrong.stderr
    assert "Traceback" not in nothing.stderr + wrong.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_a_compiler_the_export_runs_on_standard_operators(checkpoint: Path, tmp_path: Path) -> None:
    done = run_export(checkpoint, tmp_path / "tiny", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "standard operators, which are ten to twenty times slower" in done.stderr
    assert read_manifest(tmp_path / "tiny").cache_write == "host"
    refused = run_export(checkpoint, tmp_path / "other", "--operators", "native", CXX="no-such-compiler")
    assert refused.returncode == 1
    assert "no C++ compiler" in refused.stderr


@pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler: there are no C++ operators")
def test_operators_of_a_foreign_library_are_not_loaded(exported: Path, tmp_path: Path) -> None:
    model = mindir.read(exported / "decode.mindir")
    mindir.link(model, "/tmp/evil.so")
    foreign = tmp_path / "foreign.mindir"
    foreign.write_bytes(model.SerializeToString())
    with pytest.raises(mindir.MindIRError, match=r"library that is not ours: /tmp/evil\.so:"):
        mindir.attach(foreign, tmp_path / "copy.mindir", library.path())
    with pytest.raises(mindir.MindIRError, match="are not built here"):
        mindir.attach(exported / "decode.mindir", tmp_path / "copy.mindir", None)


def test_post_sampling_graphs(exported: Path) -> None:
    logits = np.random.default_rng(0).standard_normal((4, VOCAB_SIZE), dtype=np.float32)
    ms.set_device("CPU")  # as everybody does who runs something: whoever came after a default could not any more
    best = nn.GraphCell(ms.load(str(exported / "argmax.mindir")))
    assert best(Tensor(logits)).asnumpy().tolist() == logits.argmax(1).tolist()

    top = nn.GraphCell(ms.load(str(exported / "topk.mindir")))
    top.set_inputs(dynamic(ms.float32, None, None), dynamic(ms.float32, None), dynamic(ms.int32))
    temperature = np.array([0.5, 1.0, 2.0, 0.1], dtype=np.float32)
    for k in (1, 5, VOCAB_SIZE):
        values, ids = (part.asnumpy() for part in top(Tensor(logits), Tensor(temperature), Tensor(k, ms.int32)))
        order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        assert np.array_equal(ids, order)
        np.testing.assert_allclose(values, np.take_along_axis(logits / temperature[:, None], order, 1), rtol=1e-6)


def test_the_manifest_is_readable_by_a_person(exported: Path) -> None:
    text = (exported / "manifest.json").read_text(encoding="utf-8")
    assert len(text.splitlines()) > 20
    assert json.loads(text)["architecture"] == "llama"
