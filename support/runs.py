"""The run folder: what its results were made with, and whether a command may resume it."""

import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from support.flags import HERE, InputError
from support.records import open_to_append, process_rank

# ---- The run folder ------------------------------------------------------------------------------


def open_run(folder: Path, settings: dict, *, device: str, overwrite: bool) -> None:
    """Start a run folder, or resume one that has the same settings.

    Args:
        settings: what determines the results. A dict with a "fingerprint" equals another one if
            the fingerprints are equal, whatever the names.
        device: recorded, but not compared.
        overwrite: delete the records of a run with any settings.

    Raises InputError that names every setting that differs, or if records that are to be deleted
    are being written.
    """
    settings = json.loads(json.dumps(settings))  # as they will be read back
    config = folder / "config.json"
    if config.is_file() and overwrite:
        _delete_results(folder)

    # 1. Start a new run.
    if not config.is_file():
        if any(folder.glob("*.jsonl")):
            raise InputError(f"{folder} holds records, but no config.json; delete the folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, {"settings": settings} | provenance(device))
        except OSError as error:
            raise InputError(f"--run: {folder} cannot be written ({error.strerror})") from None
        return

    # 2. Resume, if all settings are the same.
    changes = _changes(read_config(folder)["settings"], settings)
    if changes:
        raise InputError(
            f"{folder} holds a run with another configuration: {', '.join(changes)}; "
            f"choose another --run, or start over with --overwrite"
        )


# What a stage writes into its folder, apart from config.json and the adapter of V.
RESULT_FILES = ("*.jsonl", "checkpoint.pt", "head.safetensors", "summary.json", "table.md", "*.png")


def _delete_results(folder: Path) -> None:
    """Delete the results of a stage. Raises InputError if another process may be writing them."""
    if process_rank()[1] > 1:
        reason = "another process may already be writing"
        raise InputError(f"--overwrite needs a single process ({reason}); delete {folder} first")
    for path in folder.glob("*.jsonl"):
        open_to_append(path).close()  # refuses if another process is writing it
    for pattern in RESULT_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    # Last: without it, the results would be taken for those of the next settings.
    (folder / "config.json").unlink()


def without_names(value):
    """Replace every dict that has a fingerprint by it: a model that was moved is still the same."""
    if not isinstance(value, dict):
        return value
    if "fingerprint" in value:
        return value["fingerprint"]
    return {key: without_names(entry) for key, entry in value.items()}


def _changes(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Name every setting that differs, such as "rollouts.seed (there 0, now 1)"."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        there, now = old.get(key), new.get(key)
        if without_names(there) == without_names(now):
            continue
        if _is_group(there) and _is_group(now):
            changes += _changes(there, now, f"{prefix}{key}.")
        else:
            changes.append(f"{prefix}{key} (there {_short(there)}, now {_short(now)})")
    return changes


def _is_group(value) -> bool:
    """Return whether a value is a dict of settings, not a graph or a model, which have names."""
    return isinstance(value, dict) and not value.keys() & {"agents", "fingerprint"}


def _short(value) -> str:
    """Show a setting in a few words: a graph or a model by its name and a fingerprint."""
    if isinstance(value, dict) and "agents" in value:
        return f"{value['name']}#{fingerprint(value)[:6]}"
    if isinstance(value, dict) and "fingerprint" in value:
        return f"{value['name']}#{value['fingerprint'][:6]}"
    return json.dumps(value)


def fingerprint(value) -> str:
    """Return a hash of a value that can be written as JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_config(folder: Path) -> dict:
    """Read a folder's config.json. Raises InputError if it is missing, torn or another's."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json here; no stage has written this folder yet")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: not JSON ({error.msg}); the file is torn, "
            f"start this stage again with --overwrite"
        ) from None
    if "settings" not in config:
        raise InputError(f"{folder}: its config.json was not written by a stage of this project")
    return config


def write_config(folder: Path, config: dict) -> None:
    """Write config.json atomically: a kill leaves the old file or the new one."""
    temporary = folder / f"config.json.{os.getpid()}.part"
    temporary.write_text(json.dumps(config, indent=1) + "\n")
    temporary.replace(folder / "config.json")


def provenance(device: str) -> dict:
    """Return the provenance of a run: command, commit, versions, machine, time.

    device: as given by --device.
    """
    import torch  # imported late, see _default_device

    if torch.device(device).type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"CPU, {os.cpu_count()} cores"
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "numpy"):
        versions[package] = version(package)
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": versions,
        "device": f"{device} ({machine})",
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _commit() -> str | None:
    """Return the commit of this code, with "-dirty" if it was changed; None if it has no git."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return None
    return commit or None


# ---- Randomness ----------------------------------------------------------------------------------


def seeded(*parts) -> random.Random:
    """Return a random generator that is seeded by `parts` alone, whatever the order of calls."""
    return random.Random("/".join(map(str, parts)))
