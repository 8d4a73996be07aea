"""What a user can mend: every error here is one line that says what is wrong, where, and what to do.

A script turns a UserError into that line on stderr and exit code 2; all other exceptions are faults of this project.
"""


class UserError(Exception):
    """The base class; raised itself for a mistake in the arguments or in the files they name."""


class RecordError(UserError, ValueError):
    """A file or a row that is not what it should be: file, line, field, and what was expected."""


class ModelError(UserError, RuntimeError):
    """A model, tokenizer, adapter or checkpoint that cannot be loaded or used."""


class PromptTooLong(ModelError):
    """A prompt that leaves no room in a model's context."""


class ServerError(ModelError):
    """A server that cannot be reached, or that does not answer as it should."""


class JudgeError(ModelError):
    """A judge that cannot score. Scores that it gave before stay valid."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the name of its class if it says nothing."""
    message = str(error).strip().replace(":\n", ": ") or type(error).__name__
    return message.splitlines()[0]


def short(text: str) -> str:
    """A text as an error message shows it: quoted, at most 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
