"""Progress of a script: a bar on a terminal, a plain line every half minute in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """Counts messages and tokens of a whole script, and shows them beside what is finished.

    Searches that advance together finish together, so messages and tokens a second tell more than
    the time left, which is shown only once something has finished.

    Attributes:
        num_generated, num_recalled: messages so far, by the model and from the journal.
        num_tokens: generated so far.
        finished: units of the newest bar.
    """

    def __init__(self, *, shown: bool):
        self.shown = shown
        self.num_generated = 0
        self.num_recalled = 0
        self.num_tokens = 0
        self.finished = 0
        self.bar: tqdm | None = None

    @contextmanager
    def over(self, description: str, total: int, *, unit: str, done: int = 0) -> Iterator[None]:
        """Show how many of `total` units are finished, inside a `with` block.

        done: how many an earlier run has finished.
        """
        style = {"dynamic_ncols": True, "smoothing": 0, "unit": f" {unit}"}
        if not sys.stderr.isatty():
            line = f"{{desc}}: {{n_fmt}}/{{total_fmt}} {unit} in {{elapsed}}{{postfix}}\n"
            style = {"mininterval": 30, "bar_format": line}
        self.start, self.tokens_before = time.perf_counter(), self.num_tokens
        self.messages_before = self.num_generated + self.num_recalled
        self.finished = done
        style["miniters"] = 0  # the note changes even if no unit finishes
        hidden = not self.shown
        self.bar = tqdm(desc=description, total=total, initial=done, disable=hidden, **style)
        with self.bar:
            yield
        self.bar = None

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count units as finished. note: shown in place of messages and tokens."""
        self.finished += amount
        if self.bar is None:
            return
        if not note:
            num_messages = self.num_generated + self.num_recalled - self.messages_before
            seconds = time.perf_counter() - self.start
            tokens_per_second = (self.num_tokens - self.tokens_before) / max(seconds, 1e-9)
            note = f"{num_messages:,} messages, {tokens_per_second:.0f} tokens/s"
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(amount)

    def message_generated(self, num_tokens: int) -> None:
        self.num_generated += 1
        self.num_tokens += num_tokens
        self.advance(0)

    def message_recalled(self) -> None:
        self.num_recalled += 1
        self.advance(0)

    def describe_messages(self) -> str:
        return f"{self.num_generated:,} messages generated, {self.num_recalled:,} from the journal"
