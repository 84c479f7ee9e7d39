"""The curves of latencies as SVG."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

from hypothesis import given
from hypothesis import strategies as st

from benchmarks import picture, serve_report
from benchmarks.latency import percentile
from benchmarks.prompts import Prompt
from benchmarks.serve_report import Run
from benchmarks.target import Reading, Target
from benchmarks.traffic import Outcome


def test_a_curve_rises_from_the_smallest_to_the_largest_value() -> None:
    drawn = ElementTree.fromstring(picture.curves("<&>", "ms", {"one": [100.0, 1.0, 10.0], "none": [], "zero": [0.0]}))
    one, zero = [line.get("points", "") for line in drawn.iter() if line.tag.endswith("polyline")]
    points = [tuple(map(float, point.split(","))) for point in one.split()]
    assert [x for x, _ in points] == [64, 250.7, 250.7, 437.3, 437.3, 624]  # a third of the width for each value
    assert [y for _, y in points] == [238, 238, 158, 158, 78, 78]  # and of the height for each power of ten from 0.1 on
    assert "none" not in {text.text for text in drawn.iter()}
    assert zero == "64.0,318.0 624.0,318.0"


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=900), st.sampled_from([0.25, 0.5, 0.75, 0.9]))
def test_a_curve_passes_the_percentiles_of_the_table(values: list[float], share: float) -> None:
    drawn = ElementTree.fromstring(picture.curves("", "ms", {"one": values}, limits={"one": percentile(values, share)}))
    [curve] = [line.get("points", "") for line in drawn.iter() if line.tag.endswith("polyline")]
    [limit] = [float(line.get("y1", "")) for line in drawn.iter() if line.get("stroke-dasharray")]
    points = [tuple(map(float, point.split(","))) for point in curve.split()]
    x = 64 + 560 * share
    assert any(
        left - 0.1 <= x <= right + 0.1 and min(low, high) - 0.1 <= limit <= max(low, high) + 0.1
        for (left, low), (right, high) in itertools.pairwise(points)
    )


def test_a_picture_says_what_was_asked_of_whom_and_shows_the_limits() -> None:
    outcomes = [Outcome(Prompt("hi", 3), 10.0, 10.0, 11.5, Reading((11.0, 11.5), "ab", 3), None)]
    run = Run(outcomes, begin=10.0, seconds=4.0, client_cpu=0.1, most=2, made=None, planned=5, cut_off=2)
    limits = {"ttft": 600.0, "tpot": 300.0}
    report, values = serve_report.report_of(
        run, Target("chat", "http://test", "<m>"), None, load="4 a second", seed=0, limits=limits
    )
    assert (report.stopped, report.planned, report.requests, report.cut_off) == (True, 5, 1, 2)
    assert serve_report.table(report).startswith("STOPPED by Ctrl-C: 1 of 5 requests had ended, 2 were cut off\n")
    drawn = ElementTree.fromstring(serve_report.drawing(report, values))
    texts = {text.text for text in drawn.iter()}
    assert texts >= {"<m>: 4 a second", "TTFT 600 ms", "TPOT 300 ms", "share of values that are no larger"}
    about = "protocol chat, 1 of 5 requests, 0 failed, 1 tokens/s, stopped by Ctrl-C, 0 within the limits (dashed)"
    assert about in texts
    assert len([line for line in drawn.iter() if line.get("stroke-dasharray")]) == 2
