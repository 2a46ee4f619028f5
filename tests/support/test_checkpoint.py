"""Tests of what support/runs.py does for the scripts that train."""

import pickle

import pytest
import torch

from support.runs import write_checkpoint


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"epoch": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_checkpoint(path, {"epoch": 2, "cannot be written": lambda: 0})
    assert torch.load(path) == {"epoch": 1}
