"""Progress of a script: a bar on a terminal, a plain line every half minute in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts messages and tokens of a whole script, and shows them beside what is finished.

    Searches that advance together finish together, so messages and tokens a second tell more than
    the time left, which is shown only once something has finished.

    Attributes:
        num_generated, num_recalled: messages so far, by the model and from the journal.
        num_tokens: generated so far.
    """

    def __init__(self, *, shown: bool):
        on_terminal = sys.stderr.isatty()
        self.bar_shown = shown and on_terminal
        self.lines_shown = shown and not on_terminal
        self.num_generated = 0
        self.num_recalled = 0
        self.num_tokens = 0
        self.bar: tqdm | None = None

    @contextmanager
    def over(self, description: str, total: int, *, unit: str, done: int = 0) -> Iterator[None]:
        """Show how many of `total` units are finished, inside a `with` block.

        done: how many an earlier run has finished.
        """
        self.start = self.last_line = time.perf_counter()
        self.tokens_before = self.num_tokens
        self.description, self.total, self.unit = description, total, unit
        self.finished = done
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=f" {unit}",
            disable=not self.bar_shown,
            smoothing=0,  # average speed since the start
            dynamic_ncols=True,
        )
        with self.bar:
            yield
        self.bar = None

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count units as finished. note: shown in place of messages and tokens."""
        if self.bar is not None:
            self.finished += amount
            self.bar.update(amount)
            self._show(note)

    def message_generated(self, num_tokens: int) -> None:
        self.num_generated += 1
        self.num_tokens += num_tokens
        self._show()

    def message_recalled(self) -> None:
        self.num_recalled += 1
        self._show()

    def describe_messages(self) -> str:
        generated, recalled = f"{self.num_generated:,}", f"{self.num_recalled:,}"
        return f"{generated} messages generated, {recalled} from the journal"

    def _show(self, note: str = "") -> None:
        if self.bar is None:
            return
        now = time.perf_counter()
        elapsed = now - self.start
        if not note:
            num_messages = self.num_generated + self.num_recalled
            tokens_per_second = (self.num_tokens - self.tokens_before) / max(elapsed, 1e-9)
            note = f"{num_messages:,} messages, {tokens_per_second:.0f} tokens/s"
        self.bar.set_postfix_str(note, refresh=False)
        if self.lines_shown and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            share = f"{self.finished}/{self.total} {self.unit}"
            line = f"{self.description}: {share} in {tqdm.format_interval(elapsed)}; {note}"
            print(line, file=sys.stderr, flush=True)
