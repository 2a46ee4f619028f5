"""Tests of support/progress.py: what is counted, and what is shown in a log and on a terminal."""

import io
import sys

import pytest

from support.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_log_gets_lines_and_a_terminal_a_bar(monkeypatch, stream, shown):
    """An earlier run has finished 1 of 4. Tokens from before the bar are not the bar's."""
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    progress = Progress(shown=shown)
    progress.message_generated(5000)
    with progress.over("trees", 4, unit="problems", done=1):
        progress.message_generated(800)
        progress.message_recalled()
        progress.advance()
        progress.advance(2)
    assert (progress.num_generated, progress.num_recalled, progress.num_tokens) == (2, 1, 5800)
    assert progress.finished == 4
    written = stderr.getvalue()
    if not shown:
        assert written == ""
    elif stream is Terminal:
        assert "4/4" in written.rstrip().split("\r")[-1]
    else:
        first, last = [line for line in written.splitlines() if line]
        assert "1/4 problems" in first and "4/4 problems" in last and "3 messages" in last
