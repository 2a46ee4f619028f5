"""Tests of support/records.py: JSON lines that survive a kill, shards, and the journal."""

from types import SimpleNamespace

import pytest
from conftest import become_process

from support.flags import InputError
from support.records import (
    Journal,
    append_jsonl,
    is_mine,
    only,
    open_to_append,
    read_jsonl,
    read_records,
    shard_path,
    unfinished,
    write_line,
)

# ---- JSON lines ----------------------------------------------------------------------------------


NO_OBJECTS = [b'{"id"', b"5", b'"\xe9"', b"[" * 99999, b'{"W": NaN}', b'{"Q": [-Infinity]}']


@pytest.mark.parametrize("line", [*NO_OBJECTS, b'{"W": 1e999}'])
def test_a_line_that_is_no_object_is_named_and_empty_lines_count(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": 1}\n \n' + line + b'\n{"id": 4}\n')
    for read in (read_jsonl, read_records):
        with pytest.raises(InputError, match="x.jsonl, line 3: "):
            read(path)


def test_a_file_that_lacks_records_or_fields_is_named_unless_nobody_has_written_it_yet(tmp_path):
    """A field may be missing at any depth: a file of another program, or of an older version."""
    path = tmp_path / "x.jsonl"
    assert read_records(path) == {}
    path.write_bytes(b"")
    with pytest.raises(InputError, match="x.jsonl: it is empty"):
        read_jsonl(path)
    path.write_bytes(b'{"id": 1, "nodes": [{"N": 3}]}\n')
    [record] = read_jsonl(path)
    assert record == {"id": 1, "nodes": [{"N": 3}]}
    for read in (lambda: record["gold"], lambda: record["nodes"][0]["W"]):
        with pytest.raises(InputError, match="x.jsonl, line 1: it lacks '(gold|W)'"):
            read()


def test_a_reader_beside_a_writer_skips_the_torn_line_and_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    with open_to_append(path) as file:
        append_jsonl(file, {"id": 1})
        for part in (b'{"id": 2', b', "x": 0}'):  # the second ends a record, but not its line
            file.write(part)
            file.flush()
            assert list(read_records(path)) == [1]
            with pytest.raises(InputError, match="x.jsonl"):
                open_to_append(path)
        file.write(b"\n")
    open_to_append(path).close()  # the lock ends with the writer
    assert read_jsonl(path) == [{"id": 1}, {"id": 2, "x": 0}]


@pytest.mark.parametrize("whole", [b"", b"\n", b'{"id": 1}\n'])
@pytest.mark.parametrize("torn", [b"", b"{", b'{"long": "' + b"x" * 200_000])
def test_the_writer_cuts_off_a_torn_last_line_of_any_length(tmp_path, whole, torn):
    path = tmp_path / "x.jsonl"
    path.write_bytes(whole + torn)
    with open_to_append(path) as file:
        append_jsonl(file, {"id": 3})
    assert path.read_bytes() == whole + b'{"id": 3}\n'


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_line_that_is_written_again_replaces_itself_and_all_after_it(tmp_path, index):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    with open_to_append(path) as file:
        write_line(file, index, {"again": index})
    expected = [{"step": step} for step in range(index)] + [{"again": index}]
    assert read_jsonl(path) == expected


# ---- Several processes ---------------------------------------------------------------------------


def test_each_problem_belongs_to_exactly_one_process_until_it_is_finished(monkeypatch, tmp_path):
    """A problem that any process has finished is left out."""
    problems = [SimpleNamespace(id=f"p{index}") for index in range(40)]
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "p7"}\n')
    shares = []
    for rank in range(3):
        become_process(monkeypatch, rank, 3)
        with unfinished(path, problems, only("id")) as (file, records, todo, num_done):
            assert num_done == sum(is_mine(name) for name in records)
            append_jsonl(file, {"id": todo[0].id})
            shares.append([problem.id for problem in todo])
    assert sorted([*sum(shares, []), "p7"]) == sorted(problem.id for problem in problems)
    assert min(map(len, shares)) > 5
    assert read_records(path).keys() == {"p7", *[share[0] for share in shares]}
    become_process(monkeypatch, 0, 1)
    with unfinished(path, problems, only("id")) as (_, records, todo, num_done):
        assert (len(records), len(todo), num_done) == (4, 36, 4)


@pytest.mark.parametrize("rank, world_size", [("x", "2"), ("2", "2"), ("-1", "2"), ("1", "1")])
def test_a_process_that_there_cannot_be_is_refused(monkeypatch, rank, world_size):
    become_process(monkeypatch, rank, world_size)
    with pytest.raises(InputError, match=f"RANK={rank}"):
        is_mine("p")


def test_the_records_of_all_processes_are_read_sorted_by_id(tmp_path, monkeypatch):
    """Whatever the number of processes was. A method whose name begins alike is another one."""
    path = tmp_path / "vote-1.jsonl"
    path.write_text('{"id": "d"}\n{"id": "c"}\n')
    for rank, world_size, ids in ((0, 2, "b"), (1, 3, "a")):
        become_process(monkeypatch, rank, world_size)
        for name in ("vote-1", "vote-16"):
            with open_to_append(shard_path(tmp_path / f"{name}.jsonl")) as file:
                append_jsonl(file, {"id": ids, "name": name})
                file.write(b'{"id": "torn')
    assert list(read_records(path)) == ["a", "b", "c", "d"]
    assert read_records(path)["a"]["name"] == "vote-1"


# ---- The journal ---------------------------------------------------------------------------------


def texts_in(journal, keys) -> list[str | None]:
    return [(journal.find(key) or {"text": None})["text"] for key in keys]


def test_entries_are_found_by_key_now_and_later_and_by_two_processes(tmp_path):
    """Each process has a file of its own, and reads those of others when it starts."""
    with Journal(tmp_path, "j", {}) as first:
        first.add("a", {"text": "one\ntwo\u2028three"})
        with Journal(tmp_path, "j", {}) as second:
            second.add("b", {"text": "zwölf"})
            first.add("c", {"text": "new"})
            assert texts_in(first, "abc") == ["one\ntwo\u2028three", None, "new"]
            assert texts_in(second, "abc") == ["one\ntwo\u2028three", "zwölf", None]
    with Journal(tmp_path, "j", {}) as later, Journal(tmp_path, "other", {}) as other:
        assert texts_in(later, "abc") == ["one\ntwo\u2028three", "zwölf", "new"]
        assert other.find("a") is None


def test_a_torn_entry_is_done_again_and_a_damaged_file_named(tmp_path):
    with Journal(tmp_path, "j", {}) as journal:
        journal.add("a", {"text": "x"})
        journal.add("b", {"text": "y"})
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[:-3])
    with Journal(tmp_path, "j", {}) as journal:
        assert texts_in(journal, "ab") == ["x", None]
        journal.add("b", {"text": "y"})
    assert journal.path.read_bytes() == content
    journal.path.write_bytes(content + b"nonsense\n")
    with pytest.raises(InputError, match="j.jsonl, line 3: "):
        Journal(tmp_path, "j", {})
