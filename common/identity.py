"""Identities: what a job was computed from, whatever its path."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.files import to_line
from common.progress import taking_long

# the suffixes and names of a model's configuration, weights, tokenizer, chat templates and code
MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".jinja", ".tiktoken", ".py")
VOCABULARIES = ("vocab.txt", "merges.txt")
NO_MODEL_FILES = ("training_job.json", "trainer_state.json", "training_args.bin")


def model_files(folder: str | Path) -> list[Path]:
    """The files of a model directory that change what the model does, sorted by name."""
    found = [*Path(folder).glob("*"), *Path(folder, "additional_chat_templates").glob("*.jinja")]
    return sorted(
        file
        for file in found
        if (file.suffix in MODEL_SUFFIXES or file.name in VOCABULARIES)
        and file.name not in NO_MODEL_FILES
        and file.is_file()
    )


def content_hash(path: str | Path) -> str | None:
    """SHA-256 of a file, or of the `model_files` of a folder, for an adapter with its base.

    None if the path is neither a file nor a model directory."""
    if Path(path).is_file():
        with open(path, "rb") as file, taking_long(f"reading {path} (its hash)"):
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = [f"{file.name} {content_hash(file)}\n" for file in model_files(path)]
    if base := _base_identity(Path(path)):
        lines.append(f"base {base}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def adapter_base(folder: str | Path) -> tuple[str | None, str | None]:
    """(base model, its revision) that the adapter in a folder names; (None, None) without one."""
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_bytes())
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, TypeError, KeyError):
        return None, None
    return (base, revision) if isinstance(base, str) else (None, None)


def _base_identity(folder: Path) -> str:
    """What the base of an adapter is; "" for a folder without an adapter."""
    base, revision = adapter_base(folder)
    if base is None:
        return ""
    hashes = [f"{file.name} {content_hash(file)}" for file in model_files(base)]
    return "\n".join(hashes) if hashes else hub_identity(base, revision)


def identity(name: str, revision: str | None = None) -> str:
    """What a model is, for the `job` of a run that can resume: the hash of a local file or
    directory, or the name of a hub model with its commit."""
    return content_hash(name) or hub_identity(name, revision)


def hub_identity(name: str, revision: str | None = None) -> str:
    """NAME@COMMIT, for an adapter with its base; NAME alone if the hub and its cache lack it."""
    from huggingface_hub import hf_hub_download  # would slow --help

    for file in ("adapter_config.json", "config.json"):
        try:
            found = Path(hf_hub_download(name, file, revision=revision))
        except (OSError, ValueError):
            continue  # no such file; if there is no such model, the loader says so
        return f"{name}@{found.parent.name} {_base_identity(found.parent)}".strip()
    return name


def rows_hash(rows: Iterable[Any]) -> str:
    """SHA-256 of records, as a training's job file has it."""
    return hashlib.sha256("".join(map(to_line, rows)).encode()).hexdigest()
