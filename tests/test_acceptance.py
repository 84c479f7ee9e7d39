"""The acceptance: every stage for real, and a report that says what came of each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from golden_text import reference
from tokenizers import Tokenizer

from agent import acceptance_report, golden_text
from agent.acceptance import Acceptance, StageResult
from agent.golden_text import GoldenText
from models import export
from models.checkpoint import open_checkpoint

GOLDEN = GoldenText("Once", (5, 6, 7, 8), (3.0, 2.0, 0.001, 4.0))


def test_tokens_count_until_the_first_near_tie() -> None:
    assert golden_text.decided(GOLDEN, 0.01) == 2
    assert golden_text.decided(GOLDEN, 0.0001) == 4
    assert golden_text.same(GOLDEN, [5, 6, 99, 99], 0.01) == 2
    assert golden_text.same(GOLDEN, [5, 99, 7, 8], 0.01) == 1
    assert golden_text.same(GOLDEN, [5, 6, 7, 9], 0.0001) == 3


def test_the_report_is_the_same_for_people_and_programs() -> None:
    stages = [
        StageResult(stage="operators", outcome="passed", seconds=1.0, found="5 compared", details={"operators": []}),
        StageResult(stage="one rank: export", outcome="failed", seconds=2.0, found="a | b\nc"),
    ]
    finding = {"area": "host", "check": "compiler", "level": "warning", "found": "none", "advice": "install g++"}
    data = acceptance_report.as_data("cpu", {"version": 1, "findings": [finding]}, stages)
    text = acceptance_report.as_markdown(data)
    assert "| one rank: export | failed | 2.0 | a \\| b c |" in text
    assert "- warning: compiler: none — install g++" in text
    assert not data["passed"]
    [block] = re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert json.loads(block) == data


def test_ranks_that_a_host_has_no_devices_for_are_skipped(tmp_path: Path) -> None:
    results = Acceptance("ascend", tmp_path, devices=0).run()
    next(results)  # the operators, which fail here
    assert [(one.stage, one.outcome) for one in results] == [("one rank", "skipped"), ("two ranks", "skipped")]


@pytest.mark.alone
@pytest.mark.slow
def test_the_whole_chain_on_the_cpu(tmp_path: Path) -> None:
    results = list(Acceptance("cpu", tmp_path).run())
    assert [(one.stage, one.outcome) for one in results if one.outcome != "passed"] == [], results
    by_name = {one.stage: one for one in results}
    assert len(by_name) == 9
    for ranks in (1, 2):
        name = "one rank" if ranks == 1 else "two ranks"
        assert len(by_name[f"{name}: start"].details["proofs"]) == ranks
        texts = by_name[f"{name}: golden text"].details["texts"]
        assert sum(text["compared"] for text in texts) > sum(len(one.token_ids) for one in golden_text.read()) / 2
        assert by_name[f"{name}: benchmark"].details["tokens"] > 0


@pytest.mark.slow
def test_a_failed_stage_stops_only_those_that_need_it(tmp_path: Path) -> None:
    for name in ("one_rank", "two_ranks"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "mine.txt").write_text("not an export, so it is not replaced")
    results = {one.stage: one for one in Acceptance("cpu", tmp_path).run()}
    assert results["operators"].outcome == "passed"
    for name in ("one rank", "two ranks"):
        assert results[f"{name}: export"].outcome == "failed"
        assert "is not an exported model" in results[f"{name}: export"].found
        for stage in ("start", "golden text", "benchmark"):
            assert results[f"{name}: {stage}"].outcome == "skipped"


@pytest.mark.slow
def test_the_golden_text_is_that_of_the_reference() -> None:
    tokenizer = Tokenizer.from_str(open_checkpoint(export.default_checkpoint()).text.tokenizer_json)
    for golden in golden_text.read():
        prompt_ids = tokenizer.encode(golden.prompt).ids
        with torch.no_grad():
            logits = reference()(torch.tensor([[*prompt_ids, *golden.token_ids]])).logits[0, len(prompt_ids) - 1 : -1]
        best = logits.topk(2)
        leads = best.values[:, 0] - best.values[:, 1]
        clear = leads > 0.01
        assert best.indices[clear, 0].tolist() == torch.tensor(golden.token_ids)[clear].tolist()
        assert torch.allclose(leads, torch.tensor(golden.leads), atol=0.01)
