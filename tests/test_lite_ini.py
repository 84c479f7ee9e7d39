"""The configuration files of MindSpore Lite: what is written for a graph, and what is made of files that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.lite_gears import Gear, GearError, Gears, GraphInput, generated
from agent.lite_ini import read_ini, write_ini

TOKENS, LENGTHS, TABLES, SLOTS = (
    GraphInput(name, role, "int32", shape)
    for name, role, shape in (
        ("tokens", "token_ids", (-1, -1)),
        ("batch_valid_length", "valid_lengths", (-1,)),
        ("block_tables", "block_tables", (-1, -1)),
        ("slot_mapping", "slot_mapping", (-1,)),
    )
)
PREFILL, DECODE = (TOKENS, LENGTHS, SLOTS), (TOKENS, LENGTHS, TABLES, SLOTS)

# As the owner of a system of that time has them: options that we do not write, comments, tabs
THEIR_PREFILL = """
[ascend_context]
provider=ge
plugin_custom_ops=All
[ge_session_options]
ge.deterministic=1   # slower
[ge_graph_options]
ge.inputShape=batch_valid_length:1;slot_mapping:-1;tokens:1,-1
ge.dynamicDims=512,512;1024,1024;4096,4096\t
#\tmust hold all of seq_length
ge.dynamicNodeType=1
"""
THEIR_DECODE = """
[ge_graph_options]
ge.inputShape=batch_valid_length:-1;block_tables:-1,256;slot_mapping:-1;tokens:-1,1\t
ge.dynamicDims=1,1,1,1;8,8,8,8
"""


def write(folder: Path, content: str) -> Path:
    path = folder / "own.ini"
    path.write_text(content)
    return path


def test_a_file_is_written_for_lite(tmp_path: Path) -> None:
    path = tmp_path / "decode.ini"
    write_ini(path, generated("decode", DECODE, [], Gear(6, 1, 256)))
    assert path.read_text() == (
        "[ascend_context]\nprovider=ge\n\n"
        "[ge_session_options]\nge.externalWeight=1\nge.exec.atomicCleanPolicy=1\nge.event=notify\n"
        "ge.exec.staticMemoryPolicy=2\nge.exec.formatMode=1\nge.exec.precision_mode=must_keep_origin_dtype\n\n"
        "[graph_kernel_param]\nopt_level=2\ndisable_cluster_ops=MatMul,Reshape\nenable_cce_lib=true\n"
        "disable_cce_lib_ops=MatMul\n\n"
        "[ge_graph_options]\nge.inputShape=batch_valid_length:-1;block_tables:-1,256;slot_mapping:-1;tokens:-1,1\n"
        "ge.dynamicDims=1,1,1,1;2,2,2,2;4,4,4,4;6,6,6,6\nge.dynamicNodeType=1\n"
    )


def test_prompts_go_one_by_one_and_have_gears_from_64_tokens_on(tmp_path: Path) -> None:
    path = tmp_path / "prefill.ini"
    write_ini(path, generated("prefill", PREFILL, [], Gear(1, 200, 0)))
    assert "ge.inputShape=batch_valid_length:1;slot_mapping:-1;tokens:1,-1\n" in path.read_text()
    assert "ge.dynamicDims=64,64;128,128;200,200\n" in path.read_text()


def test_one_gear_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "prefill.ini"
    write_ini(path, generated("prefill", PREFILL, [48], Gear(1, 48, 0)))
    assert "ge.inputShape=batch_valid_length:1;slot_mapping:48;tokens:1,48\n" in path.read_text()
    assert "dynamic" not in path.read_text()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for gears in (
        generated("prefill", PREFILL, [], Gear(1, 3000, 0)),
        generated("prefill", DECODE, [17], Gear(1, 17, 8)),
        generated("decode", DECODE, [1, 3], Gear(3, 1, 8)),
    ):
        path = tmp_path / "graph.ini"
        write_ini(path, gears)
        assert read_ini(path, gears.phase, gears.inputs) == gears


def test_files_that_are_there_are_read(tmp_path: Path) -> None:
    prefill = read_ini(write(tmp_path, THEIR_PREFILL), "prefill", PREFILL)
    assert prefill.gears == (Gear(1, 512, 0), Gear(1, 1024, 0), Gear(1, 4096, 0))
    decode = read_ini(write(tmp_path, THEIR_DECODE), "decode", DECODE)
    assert decode.gears == (Gear(1, 1, 256), Gear(8, 1, 256))
    fixed = "[ge_graph_options]\nge.inputShape=batch_valid_length:1;tokens:1,2048;slot_mapping:2048\n"
    assert read_ini(write(tmp_path, fixed), "prefill", PREFILL).gears == (Gear(1, 2048, 0),)


@pytest.mark.parametrize(
    ("call", "gear"),
    [
        (Gear(1, 1, 0), Gear(1, 16, 0)),
        (Gear(1, 16, 0), Gear(1, 16, 0)),
        (Gear(1, 17, 0), Gear(1, 64, 0)),
        (Gear(2, 16, 0), Gear(4, 16, 0)),
    ],
)
def test_the_smallest_gear_that_fits_is_taken(call: Gear, gear: Gear) -> None:
    gears = Gears.of("prefill", PREFILL, [Gear(4, 16, 0), Gear(1, 64, 0), Gear(1, 16, 0)])
    assert gears.smallest(call) == gear
    assert gears.most_rows(Gear(1, 16, 0)) == 4
    assert gears.most_rows(Gear(1, 64, 0)) == 1
    with pytest.raises(GearError, match=r"no gear holds 2 row\(s\) of 17 token\(s\); the largest is 4 row\(s\) of 16"):
        gears.smallest(Gear(2, 17, 0))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[ascend_context]\nprovider=ge\n", "ge.inputShape lists nothing; the prefill graph has batch_valid_length, "),
        (THEIR_DECODE, "ge.inputShape lists batch_valid_length, block_tables, slot_mapping, tokens; the prefill graph"),
        (
            THEIR_PREFILL.replace("1024,1024", "1024"),
            "ge.dynamicDims: 1024 has 1 numbers, and ge.inputShape 2 times -1",
        ),
        (
            THEIR_PREFILL.replace("1024,1024", "1024,1000"),
            r"1024,1000 is no gear: .* slot_mapping \[1024\], token_ids \[1, 1000\]",
        ),
        (THEIR_PREFILL.replace("ge.dynamicDims=", "#"), "ge.inputShape has open dimensions, and there is no ge.dyn"),
        (THEIR_PREFILL.replace("tokens:1,-1", "tokens:-1"), "512,512 is no gear"),
        (THEIR_PREFILL.replace("tokens:1,-1", "tokens:1,x"), "ge.inputShape: '1,x' are no numbers"),
        (THEIR_PREFILL.replace("4096,4096", "4096,-1"), "ge.dynamicDims: '4096,-1' has a number that is no size"),
        ("no section\n", "cannot be read: "),
    ],
)
def test_a_file_that_does_not_fit_is_explained(tmp_path: Path, content: str, problem: str) -> None:
    with pytest.raises(GearError, match=f"own.ini: ({problem})"):
        read_ini(write(tmp_path, content), "prefill", PREFILL)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GearError, match=r"none.ini: cannot be read: .*No such file"):
        read_ini(tmp_path / "none.ini", "prefill", PREFILL)


def test_a_gear_that_the_graph_excludes_is_named() -> None:
    fixed = (GraphInput("tokens", "token_ids", "int32", (2, -1)), LENGTHS, SLOTS)
    with pytest.raises(
        GearError, match=r"prefill: 1 row\(s\) of 8 token\(s\) make tokens \[1, 8\], .* has it as \[2, -1\]"
    ):
        Gears.of("prefill", fixed, [Gear(1, 8, 0)])
    assert generated("prefill", fixed, [8], Gear(1, 8, 0)).gears == (Gear(2, 8, 0),)


def test_the_first_missing_gear_is_named_with_what_to_do() -> None:
    decode = Gears.of("decode", DECODE, [Gear(8, 1, 128)])
    with pytest.raises(GearError, match=r"gear for 9 row\(s\) .* is missing, .* set limits.max_num_seqs to 8 or less"):
        decode.check(Gear(9, 1, 128))
    with pytest.raises(GearError, match=r"with 256 blocks each is missing, .* --context-length of 128 blocks or less"):
        decode.check(Gear(8, 1, 256))
    decode.check(Gear(8, 1, 128))
    with pytest.raises(GearError, match=r"set limits.max_num_batched_tokens to 64 or less"):
        Gears.of("prefill", PREFILL, [Gear(1, 64, 0)]).check(Gear(1, 65, 0))


def test_gears_have_a_number() -> None:
    with pytest.raises(GearError, match=r"prefill: 101 gears; a graph has 1 to 100"):
        generated("prefill", PREFILL, range(1, 102), Gear(1, 101, 0))
