"""The timeline's file against the spans it was made of."""

import json

import pytest

from rlhf.timeline import Recorder, Span, covered, read, shares, write


def test_a_trace_comes_back_and_is_what_chrome_reads(tmp_path):
    spans = [Span("learner 0", "train", 10.0, 12.5), Span("generator 1", "sample", 11.0, 11.25)]
    write(tmp_path / "t.json", spans)
    assert read(tmp_path / "t.json") == [Span(s.track, s.name, s.start - 10, s.end - 10) for s in spans]
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    (train,) = [e for e in events if e["name"] == "train"]
    assert (names[train["tid"]], train["ts"], train["dur"]) == ("learner 0", 0, 2_500_000)


def test_shares_count_what_is_within_the_time():
    spans = [Span("a 0", "x", 0.0, 4.0), Span("a 0", "y", 5.0, 6.0), Span("a 0", "x", 9.0, 12.0)]
    assert shares(spans, 2.0, 10.0)["a 0"] == pytest.approx({"x": 3 / 8, "y": 1 / 8, "waiting": 4 / 8})
    assert covered(spans, 2.0, 10.0) == pytest.approx(4 / 8)


def test_a_recorder_gives_each_span_once():
    recorder = Recorder("a 0")
    with pytest.raises(ZeroDivisionError), recorder.span("x"):
        _ = 1 / 0
    (span,) = recorder.take()
    assert (span.track, span.name) == ("a 0", "x")
    assert span.end >= span.start
    assert recorder.take() == ()
