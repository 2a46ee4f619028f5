"""The run folder: what its results were made with, and whether a command may resume it.

`config.json` records settings and provenance. The same settings resume a run, others are refused by
name.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from support.flags import ROOT, InputError
from support.records import errors_name, open_to_append, parse_json, process_rank

# ---- Start or resume -----------------------------------------------------------------------------

# What a stage writes into its folder, apart from config.json and adapters.
RESULT_FILES = ("*.jsonl", "checkpoint.pt", "head.safetensors", "summary.json", "table.md", "*.png")


def open_run(folder: Path, settings: dict, *, device: str, overwrite: bool) -> None:
    """Start a run folder, or resume one that has the same settings.

    Args:
        settings: what determines the results, see `differences`.
        device: recorded, but not compared.
        overwrite: delete the records of a run with any settings.

    Raises InputError that names every setting that differs.
    """
    settings = json.loads(json.dumps(settings))  # as they will be read back
    config = folder / "config.json"
    if config.is_file() and overwrite:
        _delete_results(folder)
    if config.is_file():
        changes = differences(read_config(folder)["settings"], settings)
        if changes:
            raise InputError(
                f"{folder} holds a run with another configuration: {', '.join(changes)}; "
                f"choose another --run, or start over with --overwrite"
            )
        return
    if any(folder.glob("*.jsonl")):
        raise InputError(f"{folder} holds records, but no config.json; delete the folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, {"settings": settings} | provenance(device))


def _delete_results(folder: Path) -> None:
    """Delete the results of a stage. Raises InputError if another process may be writing them."""
    if process_rank()[1] > 1:
        raise InputError(f"--overwrite needs a single process; delete {folder} first")
    for path in folder.glob("*.jsonl"):
        open_to_append(path).close()  # refuses if another process is writing it
    for pattern in RESULT_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    # Last: without it, the results would be taken for those of the next settings.
    (folder / "config.json").unlink()


def read_config(folder: Path, *, must_be_finished: bool = False) -> dict:
    """Read a folder's config.json. Raises InputError if it is damaged, or training not finished."""
    path = folder / "config.json"
    config = parse_json(path.read_bytes(), str(path))
    if must_be_finished and not config.get("finished"):
        raise InputError(f"{folder}: its training is not finished; the same command resumes it")
    return config


def write_config(folder: Path, config: dict) -> None:
    """Write config.json atomically: a kill leaves the old file or the new one."""
    temporary = folder / f"config.json.{os.getpid()}.part"
    temporary.write_text(json.dumps(config, indent=1) + "\n")
    temporary.replace(folder / "config.json")


def write_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint atomically, as `write_config` does."""
    import torch  # imported late: a report needs no torch

    temporary = path.with_suffix(".part")
    with errors_name(f"{path} cannot be written; is the disk full?"):
        torch.save(state, temporary)
    temporary.replace(path)


# ---- Settings ------------------------------------------------------------------------------------
# A model is recorded as {"name": ..., "fingerprint": ...}: one that was moved is still the same.


def without_names(value):
    """Replace every dict that has a fingerprint by it."""
    if not isinstance(value, dict):
        return value
    if "fingerprint" in value:
        return value["fingerprint"]
    return {key: without_names(entry) for key, entry in value.items()}


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Name every setting that differs, such as "rollouts.seed (there 0, now 1)"."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        there, now = old.get(key), new.get(key)
        # A graph and a model have names; they differ as a whole.
        if isinstance(there, dict) and isinstance(now, dict) and "name" not in there:
            changes += differences(there, now, f"{prefix}{key}.")
        elif without_names(there) != without_names(now):
            changes.append(f"{prefix}{key} (there {_short(there)}, now {_short(now)})")
    return changes


def _short(value) -> str:
    """Show a setting in a few words: a graph or a model by its name and a fingerprint."""
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']}#{value.get('fingerprint', fingerprint(value))[:6]}"
    return json.dumps(value)


def fingerprint(value) -> str:
    """Return a hash of a value that can be written as JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_fingerprint(paths: Iterable[Path]) -> str:
    """Return a hash of the names and contents of files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def provenance(device: str) -> dict:
    """Return the provenance of a run: command, commit, versions, machine, time.

    device: as given by --device.
    """
    import torch  # imported late: a report needs no torch

    machine = f"CPU, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name(device)
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "transformers", "peft", "numpy"):
        versions[package] = version(package)
    # The commit of this code, with "-dirty" if it was changed; None without git.
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    if shutil.which("git") is not None:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "versions": versions,
        "device": f"{device} ({machine})",
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def peak_memory(device: str) -> str:
    """Show the most memory that this process has taken."""
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB allocated on the GPU"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**30:.1f} GiB of the process"


# ---- Randomness ----------------------------------------------------------------------------------


def seeded(*parts) -> random.Random:
    """Return a random generator that is seeded by `parts` alone, whatever the order of calls."""
    return random.Random("/".join(map(str, parts)))
