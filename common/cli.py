"""Shared by all scripts: arguments, errors, warnings, commands to copy, and checks of paths."""

import argparse
import inspect
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError
from common.files import ROOT, at_root, file_stem
from common.progress import loading_libraries


def fail(message: object) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def run(main: Callable[[], None]) -> None:
    """Call a script's main. A UserError becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        fail(error)
    except BrokenPipeError:  # the reader of the output has closed it (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


def warn(message: str, *lines: str) -> None:
    """Print a warning on stderr, as one block: the message, and indented lines below it."""
    print(f"warning: {message}", *(f"  {line}" for line in lines), sep="\n", file=sys.stderr)


# --- commands to copy ---


def here(command: str, *arguments: object) -> str:
    """A command of the repository as it can be pasted where the user is.

    command: as it is written in the root, `python SCRIPT ...` or `make TARGET`. arguments: more of
    them, each one word however many spaces it has; paths as the user gave them."""
    program, *words = shlex.split(command)
    if program == "make":
        start = ["make"] if Path.cwd() == ROOT else ["make", "-C", at_root(".")]
    else:
        start = [_python(), at_root(words.pop(0))]
    return shlex.join([*start, *words, *map(str, arguments)])


def unused(path: str | Path) -> str:
    """A path that does not exist, for a command's output: `x.jsonl`, else `x_2.jsonl` ..."""
    path = Path(path)
    stem, number = file_stem(path), 1
    ending, free = path.name.removeprefix(stem), path
    while free.exists():
        number += 1
        free = path.with_name(f"{stem}_{number}{ending}")
    return str(free)


def beside(path: str | Path, word: str) -> str:
    """A file that does not exist, in the folder of a file and named after it: `x_WORD.jsonl`."""
    return unused(Path(path).with_name(f"{file_stem(path)}_{word}.jsonl"))


def training_flags(model: str) -> tuple[str, ...]:
    """The arguments of train.py to train this model, into a new folder."""
    trained = unused(at_root(f"saved_model/{Path(model).name}_trained"))
    return ("--model_name_or_path", model, "--output_dir", trained)


def _python() -> str:
    """`python` if a shell finds this interpreter by that name, else the interpreter's path."""
    found = shutil.which("python")
    is_this = found and Path(found).absolute().parent == Path(sys.executable).absolute().parent
    return "python" if is_this else sys.executable


# --- arguments ---


def arg(default: Any = MISSING, help: str = "", **more: Any) -> Any:
    """A field of a dataclass of arguments; required if it has no default.

    more: `choices` and `aliases`, as TrlParser reads them."""
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_args(
    *dataclasses: type,
    description: str,
    args: list[str] | None = None,
    defaults: dict[str, Any] | None = None,
    command: str = "",
) -> tuple[Any, ...]:
    """Fill dataclasses from flags and `--config file.yaml` with TRL's TrlParser.

    Flags override the YAML file, and an unknown key is an error. `defaults` replace defaults of the
    dataclasses that depend on the machine or on the current directory. `command` is the word
    between the script and its flags (`dpo` of `train.py dpo`).

    Unlike TrlParser itself, this reports an unknown flag or a wrong value in one line, accepts
    `--config=x.yaml`, checks the types of YAML values, and prints a short usage. Raises
    SystemExit(2) for a user's mistake."""
    # heavy libraries: a script can report a mistake of its own without them
    with loading_libraries():
        import yaml
        from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            fail(f"{message} (see --help)")

    parser = Parser(
        dataclasses, description=description, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    parser.set_defaults_with_config(**(defaults or {}))
    parser.usage = f"%(prog)s {command} ".replace("  ", " ")
    for action in parser._actions:
        parser.usage += f"--{action.dest} ... " if action.required else ""
    parser.usage += "[--config FILE.yaml] [arguments]"
    parser.epilog = "Flags override the arguments in a --config file."
    _group_inherited(parser, dataclasses, {"help", *(defaults or {})})
    flags: list[str] = []
    for flag in sys.argv[1:] if args is None else args:
        flags += flag.split("=", 1) if flag.startswith("--config=") else [flag]
    checked = flags
    try:
        if "--config" in flags:
            place = flags.index("--config")
            if place + 1 == len(flags) or flags[place + 1].startswith("--"):
                fail("argument --config: expected a YAML file")
            from_file = _config_flags(parser, flags[place + 1], yaml)
            checked = [*from_file, *flags[:place], *flags[place + 2 :]]
        _, unknown = parser.parse_known_args(checked)
        if unknown:
            fail(f"unknown argument {' '.join(unknown)} (see --help)")
        return parser.parse_args_and_config(flags)
    except (ValueError, TypeError, OSError, yaml.YAMLError, UserError) as error:
        fail(error)


class _HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of each argument, its default, and long lists of choices as text."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = ", ".join(flag for flag in action.option_strings if "-" not in flag[2:])
        if action.nargs == 0:
            return flags
        values = "[true|false]" if action.const is True else _choices(action, "|")
        return f"{flags} {values if 0 < len(values) < 30 else action.dest.upper()}"

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.const is False:
            return f"the same as --{action.dest} false"
        notes = []
        if len(_choices(action, "|")) >= 30:
            notes.append(f"one of {_choices(action, ', ')}")
        if action.default not in (None, "", argparse.SUPPRESS):
            notes.append("default: %(default)s")
        return f"{action.help or ''}" + (f" ({'; '.join(notes)})" if notes else "")


def _choices(action: argparse.Action, separator: str) -> str:
    return separator.join(map(str, action.choices or ()))


def _group_inherited(parser: Any, dataclasses: Sequence[type], own: set[str]) -> None:
    """Show the arguments that only TRL and transformers define in a group after all others."""
    for base in (base for kind in dataclasses for base in kind.__mro__):
        if base.__module__.split(".")[0] not in ("trl", "transformers"):
            own |= inspect.get_annotations(base).keys()
    options = parser._optionals._group_actions
    inherited = [action for action in options if action.dest not in own]
    if inherited:
        group = parser.add_argument_group("arguments of TRL and transformers")
        group._group_actions += inherited
        options[:] = [action for action in options if action not in inherited]


def _config_flags(parser: Any, path: str, yaml: Any) -> list[str]:
    """The keys of the file as flags, so that argparse checks their values too."""
    if not Path(path).is_file():
        fail(f"config file {path} not found")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"config file {path} is not YAML: {error}")
    if not isinstance(config, dict):
        fail(f"config file {path} must hold `key: value` lines")
    actions, flags = {action.dest: action for action in parser._actions}, list[str]()
    for key, value in config.items():
        if key == "env" or value is None:
            continue
        if key not in actions or key == "help":
            fail(f"config file {path}: unknown key '{key}' (see --help)")
        if isinstance(value, list) and actions[key].nargs in (None, "?"):
            fail(f"config file {path}: key '{key}' takes one value, got a list")
        if isinstance(value, dict):
            value = json.dumps(value)
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *map(str, values)]
    return flags


def check_least(args: Any, **least: int) -> None:
    """Raises UserError if an argument is below its least value; None passes."""
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UserError(f"argument --{name}: expected {lowest} or more, got {value}")


# --- paths ---


def check_input(path: str, made_by: str | None = None) -> None:
    """Raises UserError if an input file does not exist; `made_by` is the command that makes it."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, expected a file")
    if not Path(path).is_file():
        raise UserError(f"{path} not found" + _run_first(made_by))


def check_output(path: str, overwrite: bool = False) -> None:
    """Raises UserError if an output exists and `overwrite` is false, or if it cannot be written."""
    target = Path(path)
    holds_something = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if holds_something and not overwrite:
        raise UserError(f"{path} exists: give --overwrite to replace it, or another output")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {parent} is not a writable folder")


def check_model(path: str, made_by: str | None = None) -> None:
    """Raises UserError if a local path is not a model directory.

    A name like `org/model` that is not a local path is looked up on the hub later."""
    folder = Path(path)
    if folder.is_dir():
        if not is_model_directory(folder):
            raise UserError(f"{path} is no model directory: it has no config.json")
    elif folder.exists():
        raise UserError(f"{path} is a file, expected a model directory")
    elif made_by or path.count("/") != 1 or path.startswith((".", "models/", "saved_model/")):
        raise UserError(f"model directory {path} not found" + _run_first(made_by))


def _run_first(made_by: str | None) -> str:
    return f": run `{here(made_by)}` first" if made_by else ""


def is_model_directory(folder: str | Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    return any((Path(folder) / name).is_file() for name in ("config.json", "adapter_config.json"))
