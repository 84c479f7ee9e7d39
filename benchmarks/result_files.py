"""The files that a measurement writes: whether it can is known before it takes its time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


def check(output: Path, endings: Iterable[str]) -> None:
    """See that ``write`` will be able to do what it is asked for. What stands there already stays as it is.

    Raises:
        OSError: it will not; the message names the file.
        ValueError: ``output`` names no file.
    """
    for path in _paths(output, endings):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            existed = path.exists()
            with path.open("ab"):
                pass
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.filename}: {error.strerror}") from None
        if not existed:
            path.unlink()


def write(output: Path, contents: Mapping[str, str]) -> list[Path]:
    """Write a file for each ending; their paths.

    Raises:
        OSError: they cannot be written.
    """
    paths = _paths(output, contents)
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


def _paths(output: Path, endings: Iterable[str]) -> list[Path]:
    if not output.name:
        raise ValueError(f"{output} is a folder: name the file in it, without its ending")
    return [output.with_name(output.name + ending) for ending in endings]
