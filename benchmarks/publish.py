"""Puts the latest measurements into the documents: ``python -m benchmarks.publish``, after the benchmarks themselves.

A table stands between two marks, ``<!-- NAME -->`` and ``<!-- /NAME -->``, and only what is between them is replaced.
Some tables stand there a second time, from a CPU without AVX-512; the README and the picture are of one with it.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from benchmarks import report
from benchmarks.report import Comparison
from kernels import library

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
# Marks in the document, each with a file in output/bench
TABLES = ("latest", "steps", "agent", "operators", "onednn", "quality", "busy", "ranks", "streaming")
WITHOUT_AVX512 = {"latest": "latest-without-avx512", "steps": "steps-without-avx512"}
READMES = {
    "README.md": (
        "at a time",
        "tokens/s",
        "first token",
        "{name} tokens/s",
        "machine",
        "start until it serves",
        "memory",
    ),
    "README_CN.md": ("并发", "tokens/s", "首个 token", "{name} tokens/s", "机器", "从启动到可用", "内存"),
}
PICTURE = ROOT / "docs" / "performance.svg"


def readme_table(comparison: Comparison, words: tuple[str, ...]) -> str:
    """The README's two tables in the language of ``words``: the load, then what it was measured on."""
    together, speed, first, of_peer, machine, start, memory = words
    ours, vllm = comparison.servers[0], comparison.server("vllm")
    peers = {"vLLM": vllm is not None, "llama.cpp": bool(comparison.llamacpp)}
    titles = [together, speed, first, *(of_peer.format(name=name) for name, there in peers.items() if there)]
    lines = [f"| {' | '.join(titles)} |", "|" + "--:|" * len(titles)]
    for load in ours.loads:
        cells = [str(load.concurrent), f"{load.tokens_per_second:.0f}", f"{load.first_p50:.0f} ms"]
        if vllm is not None:
            other = vllm.at(load.concurrent)
            cells.append(f"{other.tokens_per_second:.0f}" if other else "")
        if comparison.llamacpp:
            raw = comparison.llamacpp.get(load.concurrent)
            cells.append(f"{raw:.0f}" if raw else "")
        lines.append(f"| {' | '.join(cells)} |")
    limits = comparison.machine
    facts = {
        machine: f"{limits.cpu}, {limits.cores} CPU, {limits.read_gb:.1f} GB/s",
        start: f"{comparison.start_seconds:.1f} s",
        memory: f"{ours.memory_bytes / 2**30:.2f} GiB",
    }
    return "\n".join([*lines, "", "| | |\n|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def replaced(text: str, mark: str, content: str) -> str:
    """``text`` with ``content`` between the two marks.

    Raises:
        ValueError: the marks are not there, once each.
    """
    pattern = rf"^<!-- {mark} -->$.*?^<!-- /{mark} -->$"
    if len(re.findall(pattern, text, re.M | re.S)) != 1:
        raise ValueError(f"not one place for {mark!r}")
    return re.sub(pattern, lambda _: f"<!-- {mark} -->\n{content.strip()}\n<!-- /{mark} -->", text, flags=re.M | re.S)


def main() -> int:
    """Replace what there are results for; say what there are none for."""
    argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__.splitlines()[0]).parse_args()
    avx512 = library.Library(library.build()).instructions().startswith("AVX-512")
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, mark in ({name: name for name in TABLES} if avx512 else WITHOUT_AVX512).items():
        if (file := report.FOLDER / f"{name}.md").exists():
            text = replaced(text, mark, file.read_text(encoding="utf-8"))
        else:
            print(f"{name}: not measured, left as it is")
    DOCUMENT.write_text(text, encoding="utf-8")
    if avx512 and (report.FOLDER / "latest.json").exists():
        comparison = report.read()
        shutil.copyfile(report.FOLDER / "latest.svg", PICTURE)
        for name, words in READMES.items():
            readme = ROOT / name
            content = replaced(readme.read_text(encoding="utf-8"), "table", readme_table(comparison, words))
            readme.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
