"""Errors that a user can fix. The message is one line: what is wrong, where, and what to do.

A script prints a UserError on stderr and exits with code 2. Any other exception is a bug.
"""


class UserError(Exception):
    """The base class. Raised itself for a mistake in the arguments or in the files they name."""


class RecordError(UserError, ValueError):
    """A wrong file or row: the message names file, line and field, and what was expected."""


class ModelError(UserError, RuntimeError):
    """A model, tokenizer, adapter or checkpoint that cannot be loaded or used."""


class PromptTooLong(ModelError):
    """A prompt that leaves no room in a model's context."""


class ServerError(ModelError):
    """A server that cannot be reached or gives a wrong answer."""


class JudgeError(ModelError):
    """A judge that cannot score. The scores that it returned before stay valid."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the name of its class if the message is empty."""
    message = str(error).strip().replace(":\n", ": ") or type(error).__name__
    return message.splitlines()[0]


def short(text: str) -> str:
    """A text in the form that error messages use: quoted, at most 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
