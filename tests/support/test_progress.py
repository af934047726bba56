"""The line that says how far long work is."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from torch_int4.support.progress import ProgressLine, tell, track, wanted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def states(text: str) -> list[str]:
    """Every state of the line, without the bar."""
    return [state.partition(" |")[0] for state in text.split("\r") if state]


def test_a_line_counts_and_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(["a", "b", "c"], "letters", title="reading", show=True)) == ["a", "b", "c"]
    out, text = capsys.readouterr()
    assert out == ""
    assert states(text)[0] == "torch_int4: reading 0/3 letters"
    assert states(text)[-1] == "torch_int4: reading 3/3 letters"
    assert text.endswith("00:00 left\n")


def test_what_was_done_before_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(4, "blocks", show=True, done=3) as progress:
        progress.advance()
    assert states(capsys.readouterr().err)[0] == "torch_int4: 3/4 blocks"


def test_work_that_begins_anew_counts_anew(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(4, "blocks", show=True) as progress:
        for done in (1, 2, 3, 4, 1, 2):
            progress.reach(done)
    assert states(capsys.readouterr().err)[-1] == "torch_int4: 2/4 blocks"


def test_an_error_leaves_the_count_that_was_reached(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        for item in track([1, 2, 3], "items", show=True):
            if item == 3:
                raise ValueError(item)

    with pytest.raises(ValueError, match="3"):
        work()
    text = capsys.readouterr().err
    assert states(text)[-1] == "torch_int4: 2/3 items"
    assert text.endswith("\n")


def test_only_terminals_get_it_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(track([1], "items")) == [1]
        tell("done")
    assert plain.getvalue() == ""
    assert "1/1 items" in terminal.getvalue()
    assert terminal.getvalue().endswith("torch_int4: done\n")
    assert not wanted(show=False)
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    assert not wanted(show=None)


def test_no_items_are_no_line_and_no_thread_stays(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    assert list(track([], "items", show=True)) == []
    assert capsys.readouterr().err == ""
    list(track([1], "items", show=True))
    assert threading.active_count() == before
