"""Tests of support/progress.py: what is counted, and what is shown in a log and on a terminal."""

import io
import re
import sys
import time

import pytest
import tqdm.std

from support.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_log_gets_a_line_every_half_minute_and_a_terminal_a_bar(monkeypatch, stream, shown):
    """An earlier run has finished 1 of 4. Tokens from before the bar are not the bar's."""
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    seconds = 1000.0
    monkeypatch.setattr(time, "perf_counter", lambda: seconds)
    monkeypatch.setattr(tqdm.std, "time", lambda: seconds)
    progress = Progress(shown=shown)
    progress.message_generated(5000)
    with progress.over("trees", 4, unit="problems", done=1):
        seconds += 20
        progress.message_generated(800)
        progress.message_recalled()
        seconds += 20
        progress.advance()
        seconds += 20  # not half a minute after the last line
        progress.advance(1, "note 77")
        seconds += 70
        progress.advance(1, "note 78")
    assert (progress.num_generated, progress.num_recalled, progress.num_tokens) == (2, 1, 5800)
    written = stderr.getvalue()
    if not shown:
        assert written == ""
    elif stream is Terminal:
        assert "4/4" in written.rstrip().split("\r")[-1]
    else:  # problems, minutes and seconds, messages and tokens per second or the note
        lines = [list(map(int, re.findall(r"\d+", line))) for line in written.splitlines()]
        lines = [line for line in lines if line][:3]
        assert lines == [[1, 4, 0, 0], [2, 4, 0, 40, 2, 20], [4, 4, 2, 10, 78]]
