"""Tests of runs.py: flags, progress, resuming, several processes, and the run folder."""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from support import runs
from support.flags import InputError, Parser, cli
from support.progress import Progress, SearchProgress, Work
from support.records import (
    all_shards,
    append_jsonl,
    device_of_this_process,
    is_mine,
    only,
    open_to_append,
    read_jsonl,
    read_records,
    shard_path,
    without_shard,
    write_line,
)
from support.runs import open_run, read_config, seeded, write_config
from tree import without_texts

# ---- Flags and bad input -------------------------------------------------------------------------

NUMBERS = [  # type of a flag, its text, and its value
    (runs.positive_int, "1", 1),
    (runs.positive_int, "+12", 12),
    (runs.non_negative_int, "0", 0),
    (runs.non_negative_int, "7", 7),
    (runs.positive_float, "0.5", 0.5),
    (runs.positive_float, "1e-3", 0.001),
    (runs.non_negative_float, "0", 0.0),
    (runs.unit_float, "0", 0.0),
    (runs.unit_float, "1", 1.0),
    (runs.positive_unit_float, "1", 1.0),
]


@pytest.mark.parametrize("number_type, text, value", NUMBERS)
def test_numbers_of_flags_are_read(number_type, text, value):
    assert number_type(text) == value


BAD_NUMBERS = [  # type of a flag, its text, and the complaint
    (runs.positive_int, "0", "'0' is not a whole number of at least 1"),
    (runs.positive_int, "-5", "'-5' is not a whole number of at least 1"),
    (runs.positive_int, "1.5", "'1.5' is not a whole number of at least 1"),
    (runs.positive_int, "", "'' is not a whole number of at least 1"),
    (runs.non_negative_int, "-1", "'-1' is not a whole number of at least 0"),
    (runs.positive_float, "0", "'0' is not a number above 0"),
    (runs.positive_float, "inf", "'inf' is not a number above 0"),
    (runs.non_negative_float, "-1", "'-1' is not a number at least 0"),
    (runs.unit_float, "1.5", "'1.5' is not a number at least 0 and at most 1"),
    (runs.unit_float, "nan", "'nan' is not a number at least 0 and at most 1"),
    (runs.unit_float, "half", "'half' is not a number at least 0 and at most 1"),
    (runs.positive_unit_float, "0", "'0' is not a number above 0 and at most 1"),
]


@pytest.mark.parametrize("number_type, text, complaint", BAD_NUMBERS)
def test_bad_numbers_of_flags_are_refused(number_type, text, complaint):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        number_type(text)
    assert str(error.value) == complaint


def make_parser():
    parser = Parser("Label problems.\n\nMore about it.")
    parser.add_argument("--num-problems", type=runs.positive_int, default=5, help="problems")
    parser.add_argument("--value", default=None, help="folder of V")
    parser.add_argument("--overwrite", action="store_true", help="start over")
    return parser


@pytest.mark.parametrize("argv", [["--num-problems", "0"], ["--problems", "3"], ["--num", "3"]])
def test_a_wrong_flag_is_an_input_error(argv):
    """An abbreviated flag (--num) is a wrong one as well."""
    with pytest.raises(InputError, match=r"\(--help lists the flags\)"):
        make_parser().parse_args(argv)


def test_help_shows_the_first_paragraph_and_the_defaults():
    text = make_parser().format_help()
    assert "Label problems." in text
    assert "More about it." not in text
    assert "problems (default: 5)" in text
    assert text.count("(default: ") == 1


def test_bad_input_is_one_line_and_code_2(monkeypatch, capsys):
    def main(args):
        raise InputError("no such file")

    monkeypatch.setattr(sys, "argv", ["folder/stage.py"])
    with pytest.raises(SystemExit) as stop:
        cli(lambda: None, main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "stage.py: error: no such file\n"


def test_output_that_nobody_reads_any_more_is_no_error():
    """As in `report.py RUN | head`: what is still in the buffer has no reader, either."""
    script = (
        "import sys; from runs import cli\n"
        "def main(args):\n"
        "    print('first', flush=True); sys.stdin.read(); print('second', flush=True)\n"
        "cli(lambda: None, main)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=runs.HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout.readline() == b"first\n"
        child.stdout.close()
        child.stdin.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def test_an_interrupt_is_one_line_and_code_130(monkeypatch, capsys):
    def main(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit) as stop:
        cli(lambda: None, main)
    assert stop.value.code == 130
    [line] = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("stage.py: interrupted; ")
    assert "the command without --overwrite resumes" in line


# ---- Progress ------------------------------------------------------------------------------------


class Clock:
    """Replaces the module `time`. It advances only when a test says so."""

    def __init__(self):
        self.seconds = 1000.0

    def perf_counter(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runs, "time", clock)
    return clock


def test_a_line_of_progress_says_share_time_and_note(clock, monkeypatch, capsys):
    """In a log: 1 of 4 units took 10 seconds, so that 3 units are left, about 30 seconds."""
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", 0)
    with Progress(4, description="trees") as progress:
        clock.seconds += 10
        progress.advance(1, "12 messages")
        clock.seconds += 5
        progress.advance(1)
    assert capsys.readouterr().err.split("\n") == [
        "trees: 25%, 00:10 so far, about 00:30 left; 12 messages",
        "trees: 50%, 00:15 so far, about 00:15 left",
        "",
    ]


def test_a_log_gets_a_line_at_most_every_half_minute(clock, capsys):
    with Progress(100, description="trees") as progress:
        for _ in range(100):
            clock.seconds += 1
            progress.advance(1)
    err = capsys.readouterr().err
    assert "\r" not in err
    assert err.split("\n") == [
        "trees: 30%, 00:30 so far, about 01:10 left",
        "trees: 60%, 01:00 so far, about 00:40 left",
        "trees: 90%, 01:30 so far, about 00:10 left",
        "",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", 0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4, description="trees") as progress:
        for _ in range(4):
            progress.advance(1, "12 messages")
    written = terminal.getvalue()
    last_bar = written.rstrip().split("\r")[-1]
    assert last_bar.startswith("trees 100%|")
    assert "12 messages" in last_bar
    assert "so far" not in written


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_that_is_not_shown_writes_nothing(monkeypatch, stream):
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", 0)
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress(4, description="trees", shown=False) as progress:
        progress.advance(4, "12 messages")
    assert stderr.getvalue() == ""
    assert progress.done == 4


def test_more_work_than_the_total_raises_the_total():
    with Progress(4, description="trees", shown=False) as progress:
        progress.advance(6)
    assert progress.total == 6


def make_search_progress(num_searches, messages_per_search, **options):
    expected = Work(prompts=0, messages=messages_per_search)
    return SearchProgress(num_searches, expected, description="trees", **options)


def test_searches_are_expected_to_need_what_is_given():
    with make_search_progress(5, 20, shown=False) as progress:
        assert progress.total == 5 * 20
        progress.sampled(0, 10)
        assert progress.total == 5 * 20
        assert progress.done == 10


def test_finished_searches_count_what_they_used():
    """Expected 3 x 20. The first needs 8, the second 14: (8 + 2 x 20), then (8 + 14 + 20)."""
    with make_search_progress(3, 20, shown=False) as progress:
        progress.sampled(0, 8)
        progress.search_finished(8)
        assert progress.total == 8 + 2 * 20
        progress.sampled(0, 14)
        progress.search_finished(14)
        assert progress.total == 8 + 14 + 20


def test_before_any_search_has_finished_the_bar_shows_80_percent_at_most():
    """The searches need ten times as many messages as expected."""
    with make_search_progress(4, 10, shown=False) as progress:
        for _ in range(100):
            progress.sampled(0, 4)
            assert progress.done <= 0.8 * progress.total
        assert progress.done == 400
        assert progress.total == 1.25 * 400


@pytest.mark.parametrize("messages_per_search", [5, 12, 100])
def test_when_all_searches_have_finished_everything_is_done(messages_per_search):
    """Four searches advance together and finish at 6, 9, 12 and 20 messages."""
    lengths = [6, 9, 12, 20]
    with make_search_progress(4, messages_per_search, shown=False) as progress:
        for step in range(1, 21):
            progress.sampled(0, sum(length >= step for length in lengths))
            if step in lengths:
                progress.search_finished(step)
    assert progress.done == sum(lengths)
    assert progress.total == sum(lengths)


def test_the_estimate_of_two_searches_of_known_length_is_right(clock, monkeypatch, capsys):
    """Two searches of 10 messages, one after the other, a second per message.

    After 10 messages the first has finished: 10 of 20 messages are done, and 10 seconds are left.
    """
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", 0)
    with make_search_progress(2, 10) as progress:
        for _ in range(2):
            for _ in range(10):
                clock.seconds += 1
                progress.sampled(0, 1)
            progress.search_finished(10)
            assert progress.total == 20
    lines = capsys.readouterr().err.splitlines()
    first_finished = "trees: 50%, 00:10 so far, about 00:10 left; 1/2 problems, 10 messages"
    both_finished = "trees: 100%, 00:20 so far, about 00:00 left; 2/2 problems, 20 messages"
    assert first_finished in lines
    assert lines[-1] == both_finished


def test_work_counts_prompts_messages_and_scored_states():
    """Each of two searches: 3 prompts + 5 messages + 2 x 4 states."""
    expected = Work(prompts=3, messages=5, states=4)
    with SearchProgress(2, expected, description="mcts", shown=False) as progress:
        assert progress.total == 2 * (3 + 5 + 2 * 4)
        progress.sampled(3, 5)
        assert progress.done == 3 + 5
        progress.scored(4)
        assert progress.done == 3 + 5 + 2 * 4
        progress.search_finished(5)
        assert progress.done == progress.total / 2


def test_prompts_and_states_are_expected_in_proportion_to_messages():
    """The first of two searches needs 10 messages and not 5, so that its work counts twice."""
    expected = Work(prompts=3, messages=5, states=4)
    with SearchProgress(2, expected, description="mcts", shown=False) as progress:
        progress.sampled(6, 10)
        progress.search_finished(10)
        second = max(5, 1.25 * 10 / 2)
        assert progress.total == (10 + second) * (3 + 5 + 2 * 4) / 5


def test_problems_of_an_earlier_run_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", 0)
    with make_search_progress(2, 10, num_finished_before=3) as progress:
        progress.sampled(0, 10)
        progress.search_finished(10)
    assert "4/5 problems, 10 messages" in capsys.readouterr().err.splitlines()[-1]


# ---- JSON lines and resuming ---------------------------------------------------------------------


def test_a_record_with_any_line_separator_is_read_back(tmp_path):
    path = tmp_path / "x.jsonl"
    record = {"id": "p", "message": "one\ntwo\u2028three\x85four"}
    with open_to_append(path) as file:
        append_jsonl(file, record)
    assert read_jsonl(path) == [record]


def test_letters_of_any_alphabet_are_written_as_they_are(tmp_path):
    path = tmp_path / "x.jsonl"
    with open_to_append(path) as file:
        append_jsonl(file, {"message": "π ≈ 3"})
    assert path.read_bytes() == '{"message": "π ≈ 3"}\n'.encode()


def test_empty_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": 1}\n\n{"id": 2}\n')
    assert read_jsonl(path) == [{"id": 1}, {"id": 2}]
    path.write_bytes(b'{"id": 1}\n \n{"id"\n')
    with pytest.raises(InputError, match="x.jsonl, line 3: not JSON"):
        read_jsonl(path)


def test_lines_that_are_no_objects_or_not_utf8_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    for content, fault in ((b'{"id": 1}\n5\n', "not an object"), (b'{}\n"\xe9"\n', "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"x.jsonl, line 2: {fault}"):
            read_jsonl(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_a_reader_ignores_a_torn_last_line_and_leaves_it_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 2, "que')
    assert read_records(path) == {1: {"id": 1}}
    assert path.read_bytes() == b'{"id": 1}\n{"id": 2, "que'


def test_a_file_that_nobody_has_written_yet_has_no_records(tmp_path):
    assert read_records(tmp_path / "x.jsonl") == {}


def test_a_reader_beside_a_writer_loses_nothing(tmp_path):
    # A reader once cut a line that was being written, and the file could not be parsed any more.
    path = tmp_path / "x.jsonl"
    with open_to_append(path) as file:
        append_jsonl(file, {"id": 1})
        file.write(b'{"id": 2, ')
        file.flush()
        assert list(read_records(path)) == [1]
        file.write(b'"x": 0}\n')
    assert read_jsonl(path) == [{"id": 1}, {"id": 2, "x": 0}]


@pytest.mark.parametrize(
    "keep, kept",
    [(only("question"), {"question": "q7"}), (without_texts, {"nodes": [{"N": 7}]})],
    ids=["to resume", "to show the labels"],
)
def test_large_trees_are_never_in_memory_together(tmp_path, keep, kept):
    """Of 20 MB of records only what is needed is in memory, and one line at a time."""
    path = tmp_path / "trees.jsonl"
    with open(path, "w") as file:
        for index in range(400):
            nodes = [{"message": "x" * 50_000, "N": index}]
            record = {"id": f"p{index}", "question": f"q{index}", "nodes": nodes}
            file.write(json.dumps(record) + "\n")
    tracemalloc.start()
    records = read_records(path, keep)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert records["p7"] == kept and len(records) == 400
    assert peak < 0.05 * path.stat().st_size


def test_the_rest_of_a_line_that_is_being_written_is_not_taken_for_a_line(tmp_path, monkeypatch):
    """The reader meets a torn line, and before it looks again the writer has completed it."""
    path = tmp_path / "x.jsonl"
    path.touch()
    read = [b'{"id": 1}\n', b'{"id": 2, ', b'"x": 3}\n', b'{"id": 3}\n']
    monkeypatch.setattr(runs, "open", lambda *_: contextlib.nullcontext(iter(read)), raising=False)
    assert read_records(path) == {1: {"id": 1}}


def test_the_writer_cuts_off_a_torn_last_line_of_any_length(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    whole = b'{"id": 1}\n'
    for torn in (b"{", b'{"id": 2, "long": "' + b"x" * 200_000):
        path.write_bytes(whole + torn)
        with open_to_append(path) as file:
            append_jsonl(file, {"id": 3})
        assert path.read_bytes() == whole + b'{"id": 3}\n'
        assert "x.jsonl: the last line is torn" in capsys.readouterr().err


def test_a_file_that_is_whole_or_has_only_a_torn_line_is_repaired_without_loss(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": 1}\n')
    open_to_append(path).close()
    assert path.read_bytes() == b'{"id": 1}\n'
    assert capsys.readouterr().err == ""
    path.write_bytes(b'{"id"')
    open_to_append(path).close()
    assert path.read_bytes() == b""


BLOCK = 65536  # bytes that are read at once, from the end of the file

ENDS_OF_LINES = [  # content of a file, and the number of bytes of its finished lines
    (b"", 0),
    (b"{}", 0),
    (b"\n", 1),
    (b"{}\n", 3),
    (b"{}\n{", 3),
    # The newline is the last byte, or the first one, of a block that is read.
    (b"{}\n" + b"x" * BLOCK, 3),
    (b"{}\n" + b"x" * (BLOCK - 1), 3),
    (b"\n" + b"x" * BLOCK, 1),
    (b"{}\n{}\n" + b"x" * (2 * BLOCK - 1), 6),
    (b"x" * (BLOCK + 1), 0),
]


@pytest.mark.parametrize("content, num_finished_bytes", ENDS_OF_LINES)
def test_the_last_line_end_is_found_wherever_it_is(content, num_finished_bytes):
    assert runs._end_of_last_line(io.BytesIO(content), len(content)) == num_finished_bytes


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_line_that_is_written_again_replaces_itself_and_all_after_it(tmp_path, index):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    with open_to_append(path) as file:
        write_line(file, index, {"again": index})
    expected = [{"step": step} for step in range(index)] + [{"again": index}]
    assert read_jsonl(path) == expected


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "x.jsonl"
    with open_to_append(path) as file:
        append_jsonl(file, {"id": 1})
        file.write(b'{"id": 2, ')
        file.flush()
        with pytest.raises(InputError, match="x.jsonl: another process is writing this file"):
            open_to_append(path)
        file.write(b'"x": 0}\n')
    assert len(read_jsonl(path)) == 2
    open_to_append(path).close()  # the lock ends with the writer


def test_a_torn_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1}\n{"id": 2, \n{"id": 3}\n')
    with pytest.raises(InputError, match="x.jsonl, line 2"):
        read_records(path)


# ---- Several processes ---------------------------------------------------------------------------

PROBLEM_IDS = [f"p{index}" for index in range(40)]


def become_process(monkeypatch, rank, world_size):
    """Set the environment as a launcher does."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def test_each_problem_belongs_to_exactly_one_process(monkeypatch):
    shares = []
    for rank in range(3):
        become_process(monkeypatch, rank, 3)
        shares.append([problem_id for problem_id in PROBLEM_IDS if is_mine(problem_id)])
    assert sorted(sum(shares, [])) == sorted(PROBLEM_IDS)
    assert min(map(len, shares)) > 5


def test_without_a_launcher_one_process_has_all_problems(monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert all(is_mine(problem_id) for problem_id in PROBLEM_IDS)
    assert shard_path(tmp_path / "x.jsonl") == tmp_path / "x.jsonl"


def test_processes_see_each_others_records(tmp_path, monkeypatch):
    # 1. Each of three processes is killed while it writes its second record.
    path = tmp_path / "x.jsonl"
    for rank in range(3):
        become_process(monkeypatch, rank, 3)
        assert shard_path(path).name == f"x.{rank}of3.jsonl"
        with open_to_append(shard_path(path)) as file:
            append_jsonl(file, {"id": f"by {rank}"})
            file.write(b'{"torn')

    # 2. The last process resumes.
    assert list(read_records(path)) == ["by 0", "by 1", "by 2"]

    # 3. One process alone resumes.
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert len(read_records(path)) == 3


def test_a_launched_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of_this_process("cuda") == "cuda:3"
    assert device_of_this_process("cuda:1") == "cuda:1"
    assert device_of_this_process("cpu") == "cpu"
    monkeypatch.delenv("LOCAL_RANK")
    assert device_of_this_process("cuda") == "cuda"


def test_a_shard_leads_back_to_its_file(tmp_path, monkeypatch):
    path = tmp_path / "vote-3.jsonl"
    become_process(monkeypatch, 1, 2)
    shard_path(path).touch()
    assert all_shards(path) == [path, tmp_path / "vote-3.1of2.jsonl"]
    assert without_shard(shard_path(path)) == path
    assert without_shard(path) == path


def test_shards_of_a_method_whose_name_begins_alike_are_not_read(tmp_path, monkeypatch):
    become_process(monkeypatch, 0, 2)
    for name in ("vote-1", "vote-16"):
        with open_to_append(shard_path(tmp_path / f"{name}.jsonl")) as file:
            append_jsonl(file, {"id": "p", "method": name})
    assert read_records(tmp_path / "vote-1.jsonl") == {"p": {"id": "p", "method": "vote-1"}}


def test_records_are_sorted_by_id_whoever_has_written_them(tmp_path):
    """V's settings name the trees in this order, however many processes labelled them."""
    (tmp_path / "x.jsonl").write_text('{"id": "b"}\n{"id": "d"}\n{"id": "c"}\n')
    (tmp_path / "x.0of2.jsonl").write_text('{"id": "a"}\n')
    assert list(read_records(tmp_path / "x.jsonl")) == ["a", "b", "c", "d"]


# ---- The run folder ------------------------------------------------------------------------------


def test_another_configuration_is_refused_by_name_unless_overwritten(tmp_path):
    records = tmp_path / "trees.jsonl"
    open_run(tmp_path, {"seed": 0, "c_uct": 1.0}, device="cpu", overwrite=False)
    records.write_text("{}\n")
    open_run(tmp_path, {"seed": 0, "c_uct": 1.0}, device="cpu", overwrite=False)
    with pytest.raises(InputError, match=r"seed \(there 0, now 1\).*--overwrite"):
        open_run(tmp_path, {"seed": 1, "c_uct": 1.0}, device="cpu", overwrite=False)
    assert records.exists()

    with open_to_append(records), pytest.raises(InputError, match="another process is writing"):
        open_run(tmp_path, {"seed": 1, "c_uct": 1.0}, device="cpu", overwrite=True)
    assert records.read_text() == "{}\n"
    assert read_config(tmp_path)["settings"] == {"seed": 0, "c_uct": 1.0}

    open_run(tmp_path, {"seed": 1, "c_uct": 1.0}, device="cpu", overwrite=True)
    assert not records.exists()
    assert read_config(tmp_path)["settings"] == {"seed": 1, "c_uct": 1.0}


def test_a_setting_inside_others_is_refused_by_its_own_name(tmp_path):
    """V records all settings of its labels; what differs must not drown in them."""
    labels = {"seed": 0, "prompts": "a long text" * 99}
    open_run(tmp_path, {"rollouts": labels}, device="cpu", overwrite=False)
    with pytest.raises(InputError) as error:
        open_run(tmp_path, {"rollouts": labels | {"seed": 1}}, device="cpu", overwrite=False)
    assert "configuration: rollouts.seed (there 0, now 1); choose" in str(error.value)
    with pytest.raises(InputError, match=r"rollouts \(there .*, now null\)"):
        open_run(tmp_path, {"rollouts": None}, device="cpu", overwrite=False)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--run: .*file/value cannot be written"):
        open_run(tmp_path / "file" / "value", {}, device="cpu", overwrite=False)


def test_a_model_is_compared_by_its_fingerprint_wherever_it_is(tmp_path):
    model = {"name": "a/model", "fingerprint": "12345678"}
    moved, other = model | {"name": "b/model"}, model | {"fingerprint": "87654321"}

    def open_with(model):
        settings = {"model": model, "rollouts": {"model": model}}
        open_run(tmp_path, settings, device="cpu", overwrite=False)

    open_with(model)
    open_with(moved)
    refusal = r"model \(there a/model#123456, now a/model#876543\), rollouts"
    with pytest.raises(InputError, match=refusal):
        open_with(other)


def test_a_fingerprint_does_not_depend_on_the_order_of_settings():
    first = {"seed": 0, "model": {"a": 1, "b": 2}}
    second = {"model": {"b": 2, "a": 1}, "seed": 0}
    assert runs.fingerprint(first) == runs.fingerprint(second)
    assert runs.fingerprint(first) != runs.fingerprint(first | {"seed": 1})


def test_records_without_a_configuration_are_not_taken_over(tmp_path):
    (tmp_path / "trees.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(InputError, match="holds records, but no config.json; delete the folder"):
        open_run(tmp_path, {"seed": 1}, device="cpu", overwrite=False)


def test_overwriting_deletes_every_result_and_the_configuration_last(tmp_path, monkeypatch):
    open_run(tmp_path, {"seed": 0}, device="cpu", overwrite=False)
    results = ["trees.jsonl", "checkpoint.pt", "summary.json", "table.md", "em.png"]
    for name in results:
        (tmp_path / name).write_text("")
    deleted = []
    monkeypatch.setattr(Path, "unlink", lambda path: deleted.append(path.name))
    open_run(tmp_path, {"seed": 0}, device="cpu", overwrite=True)
    # A kill in between leaves the old configuration, never old results under a new one.
    assert sorted(deleted[:-1]) == sorted(results)
    assert deleted[-1] == "config.json"


def test_a_machine_without_git_records_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    open_run(tmp_path, {"seed": 0}, device="cpu", overwrite=False)
    assert read_config(tmp_path)["commit"] is None


def test_one_of_several_processes_does_not_overwrite(tmp_path, monkeypatch):
    open_run(tmp_path, {"seed": 0}, device="cpu", overwrite=False)
    become_process(monkeypatch, 0, 2)
    with pytest.raises(InputError, match="--overwrite needs a single process"):
        open_run(tmp_path, {"seed": 1}, device="cpu", overwrite=True)
    assert read_config(tmp_path)["settings"] == {"seed": 0}


def test_a_missing_or_torn_configuration_is_named(tmp_path):
    with pytest.raises(InputError, match="no config.json here"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"sett')
    with pytest.raises(InputError, match="config.json: not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="was not written by a stage of this project"):
        read_config(tmp_path)


def test_a_configuration_records_settings_and_provenance(tmp_path):
    open_run(tmp_path, {"counts": (1, 8)}, device="cpu", overwrite=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"] == {"counts": [1, 8]}
    assert config.keys() >= {"command", "commit", "versions", "started"}
    assert config["device"].startswith("cpu (CPU, ")
    # Tuples are read back as lists, and are no other configuration.
    open_run(tmp_path, {"counts": (1, 8)}, device="cpu", overwrite=False)


def test_a_kill_while_the_configuration_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_config(tmp_path, {"settings": {"seed": 0}})

    def killed(path, text):
        with open(path, "w") as file:
            file.write(text[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            write_config(tmp_path, {"settings": {"seed": 1}})
    assert read_config(tmp_path) == {"settings": {"seed": 0}}


def test_the_command_is_recorded_with_its_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/stage.py", "--seed", "7"])
    open_run(tmp_path, {}, device="cpu", overwrite=False)
    assert read_config(tmp_path)["command"] == "python stage.py --seed 7"


def test_a_commit_is_dirty_if_the_code_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    monkeypatch.setattr(runs, "HERE", tmp_path)
    (tmp_path / "x.py").write_text("1\n")
    git("init", "-q")
    git("add", "x.py")
    git("commit", "-q", "-m", "first")
    clean = runs._commit()
    assert len(clean) == 40
    (tmp_path / "x.py").write_text("2\n")
    assert runs._commit() == f"{clean}-dirty"


# ---- Randomness ----------------------------------------------------------------------------------


def test_seeded_generators_are_a_function_of_their_parts():
    assert seeded(0, "p").random() == seeded(0, "p").random()
    assert seeded(0, "p").random() != seeded(1, "p").random()
    assert seeded(0, "p").random() != seeded(0, "q").random()
