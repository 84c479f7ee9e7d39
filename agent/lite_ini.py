"""The configuration files of MindSpore Lite: what we write for a graph, and what its owner may have written.

``[ge_graph_options]`` holds the shapes: ``ge.inputShape`` names every input with its dimensions, -1 for an open one;
``ge.dynamicDims`` has a group of numbers for each gear, one number for each -1 in that order.
"""

from __future__ import annotations

import configparser
from collections.abc import Sequence
from pathlib import Path

from agent.lite_gears import Gear, GearError, Gears, GraphInput, generated, graph_inputs, needed_gears
from agent.paged_inputs import Phase
from config.manifest import Manifest, PagedGraph
from config.serving_config import LimitsConfig, ModelConfig

# As in the samples of the system that the pairs were made for. Weights in files of their own are what lets GE share
# constants, not only variables, between the graphs of a group.
OPTIONS = {
    "ascend_context": {"provider": "ge"},
    "ge_session_options": {
        "ge.externalWeight": "1",
        "ge.exec.atomicCleanPolicy": "1",
        "ge.event": "notify",
        "ge.exec.staticMemoryPolicy": "2",
        "ge.exec.formatMode": "1",
        "ge.exec.precision_mode": "must_keep_origin_dtype",
    },
    "graph_kernel_param": {
        "opt_level": "2",
        "disable_cluster_ops": "MatMul,Reshape",
        "enable_cce_lib": "true",
        "disable_cce_lib_ops": "MatMul",
    },
}


def write_ini(path: Path, gears: Gears) -> None:
    """Write the file for a graph with these gears."""
    sections = OPTIONS | {"ge_graph_options": graph_options(gears)}
    text = "\n\n".join(
        "\n".join([f"[{section}]", *(f"{key}={value}" for key, value in options.items())])
        for section, options in sections.items()
    )
    path.write_text(text + "\n", encoding="utf-8")


def graph_options(gears: Gears) -> dict[str, str]:
    """The shapes of a graph, inputs in alphabetical order. A dimension is open if the gears differ in it."""
    shapes, open_sizes = [], []
    for graph_input in sorted(gears.inputs, key=lambda graph_input: graph_input.name):
        sizes = list(zip(*(gear.shape(graph_input) for gear in gears.gears), strict=True))
        open_sizes += [column for column in sizes if len(set(column)) > 1]
        dimensions = ",".join(str(column[0]) if len(set(column)) == 1 else "-1" for column in sizes)
        shapes.append(f"{graph_input.name}:{dimensions}")
    options = {"ge.inputShape": ";".join(shapes)}
    if open_sizes:
        groups = zip(*open_sizes, strict=True)
        options["ge.dynamicDims"] = ";".join(",".join(map(str, group)) for group in groups)
        options["ge.dynamicNodeType"] = "1"
    return options


def read_ini(path: Path, phase: Phase, inputs: Sequence[GraphInput]) -> Gears:
    """The gears of a file that was written for a graph with these inputs.

    Raises:
        GearError: it cannot be read, does not fit the graph, or its groups of numbers are none of its gears.
    """
    options = _graph_options(path)
    shapes = _input_shapes(path, options.get("ge.inputShape", ""))
    names = {graph_input.name for graph_input in inputs}
    if shapes.keys() != names:
        listed, has = ", ".join(shapes) or "nothing", ", ".join(sorted(names))
        raise GearError(f"{path}: ge.inputShape lists {listed}; the {phase} graph has {has}")
    roles: dict[str, str] = {graph_input.name: graph_input.role for graph_input in inputs}
    gears = []
    for group in _groups(path, options.get("ge.dynamicDims", ""), shapes):
        left = iter(group)
        filled = {roles[name]: [next(left) if size == -1 else size for size in shape] for name, shape in shapes.items()}
        gears.append(_gear(path, group, filled, inputs))
    try:
        return Gears.of(phase, inputs, gears)
    except GearError as error:
        raise GearError(f"{path}: {error}") from None


class _Parser(configparser.ConfigParser):
    """``;`` is part of a value here, and keys keep their capitals."""

    def optionxform(self, optionstr: str) -> str:
        """A key as it is written."""
        return optionstr


def _graph_options(path: Path) -> dict[str, str]:
    parser = _Parser(interpolation=None, delimiters=("=",), comment_prefixes=("#",), inline_comment_prefixes=("#",))
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise GearError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    return dict(parser["ge_graph_options"]) if parser.has_section("ge_graph_options") else {}


def _input_shapes(path: Path, text: str) -> dict[str, list[int]]:
    """``tokens:1,-1;slot_mapping:-1`` taken apart."""
    shapes = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, _, dimensions = part.partition(":")
        shapes[name.strip()] = _numbers(path, "ge.inputShape", dimensions, least=-1)
    return shapes


def _groups(path: Path, text: str, shapes: dict[str, list[int]]) -> list[list[int]]:
    """The numbers of each gear; one empty group where no dimension is open."""
    num_open = sum(size == -1 for shape in shapes.values() for size in shape)
    groups = [_numbers(path, "ge.dynamicDims", part, least=1) for part in text.split(";") if part.strip()]
    for group in groups:
        if len(group) != num_open:
            numbers = ",".join(map(str, group))
            raise GearError(
                f"{path}: ge.dynamicDims: {numbers} has {len(group)} numbers, and ge.inputShape {num_open} times -1"
            )
    if num_open and not groups:
        raise GearError(f"{path}: ge.inputShape has open dimensions, and there is no ge.dynamicDims")
    return groups or [[]]


def _numbers(path: Path, key: str, text: str, *, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise GearError(f"{path}: {key}: {text.strip()!r} are no numbers") from None
    if any(number < least or number == 0 for number in numbers):
        raise GearError(f"{path}: {key}: {text.strip()!r} has a number that is no size")
    return numbers


def _gear(path: Path, group: list[int], shapes: dict[str, list[int]], inputs: Sequence[GraphInput]) -> Gear:
    """The gear whose inputs have these shapes, by role."""
    tokens, tables = shapes["token_ids"], shapes.get("block_tables", [0, 0])
    if len(tokens) == len(tables) == 2:
        gear = Gear(tokens[0], tokens[1], tables[1])
        if all(list(gear.shape(graph_input)) == shapes[graph_input.role] for graph_input in inputs):
            return gear
    numbers = ",".join(map(str, group)) or "its one shape"
    stated = ", ".join(f"{role} {shape}" for role, shape in shapes.items())
    raise GearError(f"{path}: {numbers} is no gear: its inputs do not fit together ({stated})")


def pair_gears(config: ModelConfig, limits: LimitsConfig, manifest: Manifest) -> dict[Phase, Gears]:
    """The gears of both graphs: those of their owner's files, or ours.

    Raises:
        GearError: a file cannot be read or does not fit its graph, or there is no gear for what the limits allow.
    """
    assert manifest.pair, "only pairs have gears"
    needed = needed_gears(manifest, limits)

    def gears(phase: Phase, graph: PagedGraph, sizes: tuple[int, ...], key: str) -> Gears:
        inputs, ini = graph_inputs(graph), own_ini(config, phase)
        try:
            found = read_ini(ini, phase, inputs) if ini else generated(phase, inputs, sizes, needed[phase])
            found.check(needed[phase])
        except GearError as error:
            raise GearError(str(error), f"{phase}_ini" if ini else key) from None
        return found

    return {
        "prefill": gears("prefill", manifest.pair.prefill, config.prefill_lengths, "prefill_lengths"),
        "decode": gears("decode", manifest.pair.decode, config.decode_rows, "decode_rows"),
    }


def own_ini(config: ModelConfig, phase: Phase) -> Path | None:
    """The configuration file that the owner of a graph has for it."""
    path = config.prefill_ini if phase == "prefill" else config.decode_ini
    return Path(path) if path else None
