"""Tests of support/runs.py: the run folder, which settings may resume it, and seeds."""

import json
import re

import pytest
import torch
from conftest import become_process

from support import runs
from support.flags import InputError
from support.records import open_to_append


def open_with(folder, settings, *, overwrite=False):
    runs.open_run(folder, settings, device="cpu", overwrite=overwrite)


def test_a_configuration_records_settings_and_provenance(tmp_path):
    open_with(tmp_path / "run", {"counts": (1, 8)})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"] == {"counts": [1, 8]}
    assert config.keys() >= {"commit", "versions", "started", "command", "device"}
    open_with(tmp_path / "run", {"counts": (1, 8)})  # tuples are read back as lists


MODEL = {"name": "a/model", "fingerprint": "12345678"}
MOVED, OTHER = MODEL | {"name": "b/model"}, MODEL | {"fingerprint": "87654321"}
SETTINGS = {"seed": 0, "top_k": None, "labels": {"seed": 0, "model": MODEL}, "model": MODEL}

CHANGES = [  # changed settings, and all that the complaint names
    ({"seed": 1}, {"seed"}),
    ({"seed": 1, "top_k": 5}, {"seed", "top_k"}),
    ({"lam": 0.5}, {"lam"}),
    ({"labels": {"seed": 1, "model": MODEL}}, {"labels.seed"}),
    ({"labels": None}, {"labels"}),
    ({"model": OTHER}, {"model"}),
    ({"labels": {"seed": 0, "model": OTHER}}, {"labels.model"}),
    ({"model": MOVED, "labels": {"model": MOVED, "seed": 0}}, set()),  # it is still the same
]


@pytest.mark.parametrize("changes, names", CHANGES)
def test_changed_settings_are_refused_by_name_whichever_was_first(tmp_path, changes, names):
    changed = SETTINGS | changes
    for name, old, new in (("a", SETTINGS, changed), ("b", changed, SETTINGS)):
        folder = tmp_path / name
        open_with(folder, old)
        refused = set()
        try:
            open_with(folder, new)
        except InputError as error:
            refused = set(re.findall(r"([\w.]+) \(there ", str(error)))
        assert refused == names
        assert runs.read_config(folder)["settings"] == old


def test_overwriting_starts_over_unless_somebody_is_writing(tmp_path, monkeypatch):
    open_with(tmp_path, {"seed": 0})
    records = tmp_path / "trees.jsonl"
    records.write_text("{}\n")
    become_process(monkeypatch, 0, 2)
    with pytest.raises(InputError, match="--overwrite"):
        open_with(tmp_path, {"seed": 1}, overwrite=True)
    become_process(monkeypatch, 0, 1)
    with open_to_append(records), pytest.raises(InputError, match="trees.jsonl"):
        open_with(tmp_path, {"seed": 1}, overwrite=True)
    assert records.read_text() == "{}\n"
    assert runs.read_config(tmp_path)["settings"] == {"seed": 0}

    for name in ("checkpoint.pt", "head.safetensors", "summary.json", "em.png", "my.txt"):
        (tmp_path / name).write_text("")
    open_with(tmp_path, {"seed": 1}, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "my.txt"}
    assert runs.read_config(tmp_path)["settings"] == {"seed": 1}


def test_results_are_never_left_under_another_configuration(tmp_path):
    """If deleting fails halfway, the old configuration is still there."""
    open_with(tmp_path, {"seed": 0})
    (tmp_path / "em.png").mkdir()  # cannot be deleted as a file
    with pytest.raises(OSError):
        open_with(tmp_path, {"seed": 1}, overwrite=True)
    assert runs.read_config(tmp_path)["settings"] == {"seed": 0}

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trees.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="config.json"):
        open_with(tmp_path / "other", {"seed": 0})


def test_a_configuration_is_replaced_as_a_whole(tmp_path):
    """So a kill leaves the old one or the new one."""
    runs.write_config(tmp_path, {"settings": {"seed": 0}})
    with open(tmp_path / "config.json") as old:
        runs.write_config(tmp_path, {"settings": {"seed": 1}})
        assert json.load(old)["settings"] == {"seed": 0}
    assert runs.read_config(tmp_path)["settings"] == {"seed": 1}


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    runs.write_checkpoint(path, {"epoch": 1})
    with pytest.raises(InputError, match="checkpoint|path"):
        runs.write_checkpoint(path, {"epoch": 2, "cannot be written": lambda: 0})
    assert torch.load(path) == {"epoch": 1}


def test_a_fingerprint_tells_contents_apart_and_nothing_else(tmp_path):
    first = {"seed": 0, "model": {"a": 1, "b": 2}}
    assert runs.fingerprint(first) == runs.fingerprint({"model": {"b": 2, "a": 1}, "seed": 0})
    assert runs.fingerprint(first) != runs.fingerprint(first | {"seed": 1})
    seen = set()
    for name, content in (("a/x", "1"), ("b/x", "1"), ("c/x", "2"), ("d/y", "1")):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(content)
        seen.add(runs.file_fingerprint([path]))
    assert len(seen) == 3


def test_seeded_generators_are_a_function_of_their_parts():
    assert runs.seeded(0, "p").random() == runs.seeded(0, "p").random()
    assert len({runs.seeded(*parts).random() for parts in ((0, "p"), (1, "p"), (0, "q"))}) == 3
