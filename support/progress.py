"""Progress: a bar on a terminal, lines in a log."""

import sys
import time
from typing import NamedTuple

from tqdm import tqdm

# ---- Progress ------------------------------------------------------------------------------------


class Progress:
    """Show work done and time left: a bar on a terminal, a plain line every half minute in a log.

    The time left assumes that every unit of work takes the time of the average unit so far.

    Args:
        total: amount of work. May be corrected later through the attribute `total`.
        description: what is being done.
        shown: False shows nothing at all.
    """

    SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, total: float, *, description: str, shown: bool = True):
        self.total, self.done = total, 0
        self.description = description
        self.start = self.last_line = time.perf_counter()
        on_terminal = sys.stderr.isatty()
        self.lines_shown = shown and not on_terminal
        self.bar = tqdm(
            total=total,
            desc=description,
            disable=not (shown and on_terminal),
            smoothing=0,  # average speed since the start
            miniters=1,  # show every update that comes 0.1 s after the one before
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def advance(self, amount: float, note: str = "") -> None:
        """Count `amount` more as done. note: shown after the time left."""
        self.done += amount
        self.total = max(self.total, self.done)
        self.bar.total = self.total
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(amount)
        self._write_line(note)

    def _write_line(self, note: str) -> None:
        now = time.perf_counter()
        if not self.lines_shown or now - self.last_line < self.SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        elapsed = now - self.start
        left = elapsed * (self.total - self.done) / max(self.done, 1e-9)
        times = f"{tqdm.format_interval(elapsed)} so far, about {tqdm.format_interval(left)} left"
        share = self.done / max(self.total, 1e-9)
        line = f"{self.description}: {share:.0%}, {times}"
        print(f"{line}; {note}" if note else line, file=sys.stderr, flush=True)


def ignore(*arguments) -> None:
    """Do nothing: the default of a hook."""


class Work(NamedTuple):
    """Work of a search: prompts read, messages sampled, and states scored by a model."""

    prompts: float
    messages: float
    states: float = 0

    @property
    def units(self) -> float:
        """The work as one number. On a CPU, scoring a state takes about as long as two messages."""
        return self.prompts + self.messages + 2 * self.states


class SearchProgress(Progress):
    """Progress of many searches.

    Searches that advance together all finish at the very end, so the number of finished searches
    says little. The bar counts work instead, whose amount is not known beforehand: each unfinished
    search is expected to need `expected.messages`, or a quarter more than the average so far if
    that is more, and prompts and states in proportion.

    Args:
        expected: the expected work of one search.
        num_finished_before: problems that an earlier run has finished, for the note.
    """

    def __init__(
        self,
        num_searches: int,
        expected: Work,
        *,
        description: str,
        num_finished_before: int = 0,
        shown: bool = True,
    ):
        super().__init__(num_searches * expected.units, description=description, shown=shown)
        self.num_searches = num_searches
        self.expected = expected
        self.num_finished_before = num_finished_before
        self.num_finished = 0
        self.num_messages = 0
        self.messages_of_finished = 0

    def sampled(self, num_prompts: int, num_messages: int) -> None:
        self.num_messages += num_messages
        self._update(Work(num_prompts, num_messages).units)

    def scored(self, num_states: int) -> None:
        self._update(Work(0, 0, num_states).units)

    def search_finished(self, num_messages: int) -> None:
        self.num_finished += 1
        self.messages_of_finished += num_messages
        self._update(0)

    def _update(self, units: float) -> None:
        num_unfinished = self.num_searches - self.num_finished
        if num_unfinished == 0:
            self.total = self.done + units
        else:
            average = self.num_messages / self.num_searches
            expected_messages = max(self.expected.messages, 1.25 * average)
            messages = self.messages_of_finished + num_unfinished * expected_messages
            self.total = messages * self.expected.units / self.expected.messages
        num_finished = self.num_finished_before + self.num_finished
        num_problems = self.num_finished_before + self.num_searches
        note = f"{num_finished}/{num_problems} problems, {self.num_messages} messages"
        self.advance(units, note)
