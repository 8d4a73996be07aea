"""`--push_to_hub`: the finished model, with its card, is pushed once, after it is written.

transformers would push after every checkpoint, before the model is whole, and with another card.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants

from common.errors import UserError, first_line


def check_hub(config: Any) -> None:
    """Raises UserError if the hub cannot be reached, or does not know the token."""
    if config.hub_always_push or config.hub_strategy not in ("end", "every_save"):
        name = "hub_always_push" if config.hub_always_push else "hub_strategy"
        raise UserError(f"argument --{name}: only the finished model is pushed, once: leave it out")
    api = HfApi(token=config.hub_token)
    _ask(api.whoami, "train without it, and push later: `hf upload USER/NAME FOLDER`")


def open_repo(config: Any, folder: Path) -> str:
    """The name on the hub of the model that `folder` will hold; it is made if there is none.

    Raises UserError."""
    name = config.hub_model_id or folder.resolve().name
    api = HfApi(token=config.hub_token)
    made = _ask(
        lambda: api.create_repo(name, private=config.hub_private_repo, exist_ok=True),
        f"cannot open {name}: name one that you may write, --hub_model_id USER/NAME",
    )
    return made.repo_id


def push(config: Any, folder: Path, repo: str, files: Sequence[str]) -> str:
    """Push the files of a finished model; returns the URL of the commit. Raises UserError.

    files: their names. Nothing else in the folder leaves the machine: it may be the user's."""
    api = HfApi(token=config.hub_token)
    commit = _ask(
        lambda: api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"{folder.resolve().name}, trained",
            revision=config.hub_revision,
            allow_patterns=[*files],
        ),
        f"the model is in {folder}; push it later: `hf upload {repo} {folder}`",
    )
    return str(commit.commit_url)


def _ask(request: Callable[[], Any], advice: str) -> Any:
    try:
        return request()
    except Exception as error:  # of the network, of the hub's client, of the hub
        hub = f"{constants.ENDPOINT} cannot be used ({first_line(error)})"
        raise UserError(f"argument --push_to_hub: {hub}; {advice}") from None
