"""Shared by all scripts: arguments, errors, warnings, commands to copy, and checks of paths."""

import argparse
import codecs
import difflib
import errno
import inspect
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from common.errors import UserError, first_line, short
from common.files import ROOT, at_root, file_stem
from common.identity import adapter_base, model_files
from common.outputs import hold, release, was_killed
from common.progress import loading_libraries
from common.terminal import printable
from common.threads import share_cores


def fail(message: object) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    line = printable(" ".join(str(message).split()))
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    raise SystemExit(2)


def run(main: Callable[[], None]) -> None:
    """Call a script's main, with torch's threads as in `share_cores`.

    A UserError, or a disk that is full or cannot be written, becomes one line and exit code 2.
    Ctrl-C is exit code 130, SIGTERM 143; both clean up. The outputs that main holds are freed."""
    share_cores()
    try:
        with _stopped_by_signals():
            main()
    except UserError as error:
        fail(error)
    except BrokenPipeError:  # the reader of the output has closed it (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except MemoryError:
        fail("there is not enough memory for this: use a smaller model, or smaller numbers")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if (problem := _disk_problem(error)) is None:
            raise
        fail(problem)
    finally:
        release()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise SystemExit, so that what is half-written goes."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # a signal that is ignored stays ignored (nohup)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# what the libraries say that write files without Python: safetensors, torch, sqlite, arrow
NO_ROOM = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|disk is full"
    r"|os error (28|122|27)\b|PytorchStreamWriter failed|basic_ios::clear: iostream error"
    r"|inline_container\.cc.*unexpected pos",
    re.DOTALL,
)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _disk_problem(error: BaseException) -> str | None:
    """One line on a file that could not be read or written; None for any other error."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        is_full = getattr(cause, "errno", None) in FULL or NO_ROOM.search(str(cause))
        if is_full and not isinstance(cause, UserError):
            named = getattr(cause, "filename", None)
            where = (
                f"{named} cannot be written whole" if named else "a file cannot be written whole"
            )
            return (
                f"{where}: the disk is full, or a limit is reached "
                f"({getattr(cause, 'strerror', None) or first_line(cause)}); "
                "make room and give the same command again, which goes on"
            )
    if isinstance(error, OSError) and error.errno is not None:
        if error.filename is not None:
            return f"{error.filename}: {error.strerror}"
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR):
            return f"a file cannot be read or written: {error.strerror}"
    return None


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


# the environment variable of `--dtype`: it also holds in processes that a script starts
DTYPE_VARIABLE = "SCORING_DTYPE"
DTYPES = ["auto", "float32", "bfloat16"]


@dataclass(kw_only=True)
class DtypeArgs:
    """Mixed into the arguments of a script that samples from local models or scores with them."""

    dtype: str = arg(
        "auto",
        "of local models that sample or score. auto: on a CPU bfloat16 for models of over 64 MB if "
        "the CPU has instructions for it, else float32; on a GPU that of the stored weights",
        choices=DTYPES,
    )


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
    `--config=x.yaml`, reads YAML values as it reads flags, reads no `SCRIPT.args` file, sets
    environment variables from the YAML key `env` with `--allow_env` only, refuses numbers that are
    not finite or too large, and prints a short usage. Raises SystemExit(2) for a user's mistake."""
    with loading_libraries():  # heavy: a script can report a mistake of its own without it
        from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            fail(f"{_cut(message)} (see --help)")

    parser = Parser(
        dataclasses, description=description, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    parser.set_defaults_with_config(**(defaults or {}))
    parser.usage = f"%(prog)s {command} ".replace("  ", " ")
    for action in parser._actions:
        parser.usage += f"--{action.dest} ... " if action.required else ""
    parser.usage += "[--config FILE.yaml] [arguments]"
    parser.epilog = (
        "Flags override the arguments in a --config file. With --allow_env its key `env` sets "
        "environment variables."
    )
    _group_inherited(parser, dataclasses, {"help", *(defaults or {})})
    front = Parser((), add_help=False, allow_abbrev=False)
    front.add_argument("--config")
    front.add_argument("--allow_env", nargs="?", const="true", choices=["true", "false"])
    given, flags = front.parse_known_args(sys.argv[1:] if args is None else args)
    try:
        if given.config is not None:
            kinds = {k: v for each in dataclasses for k, v in get_type_hints(each).items()}
            values = _config_values(parser, given.config, kinds, given.allow_env == "true")
            parser.set_defaults_with_config(**values)
        namespace, unknown = parser.parse_known_args(flags)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), "")
            meant = _meant(flag, [*front._option_string_actions, *parser._option_string_actions])
            fail(f"unknown argument {_cut(' '.join(unknown))} ({meant}see --help)")
        _check_numbers(vars(namespace))
        for each in dataclasses:
            if issubclass(each, DtypeArgs) and namespace.dtype != "auto":
                os.environ[DTYPE_VARIABLE] = namespace.dtype
        return tuple(
            each(**{f.name: getattr(namespace, f.name) for f in fields(each) if f.init})
            for each in dataclasses
        )
    except (
        *(ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError),
        *(TypeError, ValueError, UserError),
    ) as error:  # the libraries' classes of arguments raise any of these for a value
        fail(error)


def _cut(text: str) -> str:
    """A message that quotes what a user wrote, at most 400 characters."""
    return text if len(text) <= 400 else f"{text[:300]} ... {text[-80:]}"


def _meant(given: str, names: Iterable[str]) -> str:
    """`did you mean --x? ` for what is nearly one of the names, else an empty text."""
    word = given.partition("=")[0].replace("-", "_").strip("_").lower()
    alike: dict[str, str] = {}
    for name in names:  # --no_x stands before --no-x
        alike.setdefault(name.replace("-", "_").strip("_"), name)
    found = difflib.get_close_matches(word, alike, n=1, cutoff=0.7)
    return f"did you mean {alike[found[0]]}? " if found else ""


def _check_numbers(values: dict[str, Any]) -> None:
    """Raises UserError for a number that is not finite, or too large for the libraries."""
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"argument --{name}: expected a finite number, got {number}")
            if isinstance(number, bool) or not isinstance(number, int):
                continue
            is_seed = name == "seed" or name.endswith("_seed")
            least, most = (0, 2**32 - 1) if is_seed else (-(2**31), 2**31 - 1)
            if not least <= number <= most:
                raise UserError(
                    f"argument --{name}: expected {least} to {most}, got {_cut(str(number))}"
                )


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


def _config_values(
    parser: Any, path: str, kinds: dict[str, Any], may_set_env: bool
) -> dict[str, Any]:
    """The values of a YAML file, each converted and checked as if it were given as a flag.

    Values count as they are written: `no` and `1e-4` mean the same as after a flag, where YAML has
    a boolean and a text. kinds: argument -> type. may_set_env: set the variables of the key
    `env`."""
    import yaml  # heavy, as above

    where = f"config file {path}"
    if not Path(path).is_file():
        fail(f"{where} not found")
    if Path(path).stat().st_size > 2**20:
        fail(f"{where} has more than 1 MB, expected `key: value` lines")
    content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        depth = 0
        for event in yaml.parse(content):  # one by one: deep nesting would take minutes
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > 20:
                fail(f"{where} is nested too deeply, expected `key: value` lines")
            if isinstance(event, yaml.AliasEvent):
                fail(f"{where}: aliases (*name) are not read; write the value out")
        loader = yaml.SafeLoader(content)
        root = loader.get_single_node()
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"{where} is not YAML: {_cut(str(error))}")
    if not isinstance(root, yaml.MappingNode):
        fail(f"{where} must hold `key: value` lines")
    actions = {action.dest: action for action in reversed(parser._actions)}  # --x, not --no_x
    del actions["help"]
    values: dict[str, Any] = {}
    for key_node, node in root.value:
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "[...]"
        if key in values:
            fail(f"{where}: key '{key}' is there twice")
        if key == "env":
            values[key] = None
            _set_env(where, _construct(loader, node, f"{where}: key 'env'"), may_set_env)
        elif key not in actions:
            fail(f"{where}: unknown key {short(key)} ({_meant(key, actions)}see --help)")
        else:
            values[key] = _config_value(parser, loader, where, actions[key], node, kinds[key])
    values.pop("env", None)
    return values


def _config_value(parser: Any, loader: Any, where: str, action: Any, node: Any, kind: Any) -> Any:
    """The value of one YAML node for an argument of the type `kind`."""
    types = {*get_args(kind), kind}
    if node.tag == "tag:yaml.org,2002:null":
        if type(None) not in types:
            fail(f"{where}: key '{action.dest}' has no value")
        return None
    if node.id == "mapping":
        if not any(each is dict or get_origin(each) is dict for each in types):
            fail(f"{where}: key '{action.dest}' takes one value, got a mapping")
        return _construct(loader, node, f"{where}: key '{action.dest}'")
    if node.id == "sequence" and action.nargs in (None, "?"):
        fail(f"{where}: key '{action.dest}' takes one value, got a list")
    items = node.value if node.id == "sequence" else [node]
    if any(item.id != "scalar" or item.tag not in loader.yaml_constructors for item in items):
        fail(f"{where}: key '{action.dest}': expected plain values")
    texts = [item.value for item in items]
    if bool in types and node.tag == "tag:yaml.org,2002:bool":
        texts = [str(loader.construct_object(node)).lower()]
    try:
        return parser._get_values(action, texts)
    except argparse.ArgumentError as error:
        fail(f"{where}: {_cut(str(error))}")


def _construct(loader: Any, node: Any, where: str) -> Any:
    """The Python value of a YAML node."""
    import yaml

    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, yaml.YAMLError) as error:
        fail(f"{where}: {_cut(str(error))}")


def _set_env(where: str, variables: Any, may_set_env: bool) -> None:
    if not may_set_env:
        fail(
            f"{where}: its key 'env' sets environment variables, which can change what other "
            "programs run: give --allow_env if you have read it, or set them in the shell"
        )
    if not isinstance(variables, dict):
        fail(f"{where}: key 'env': expected `NAME: value` lines")
    os.environ.update({str(name): str(value) for name, value in variables.items()})


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


def check_output(
    path: str | Path,
    overwrite: bool = False,
    inputs: Sequence[str | Path | None] = (),
    folder: bool = False,
) -> None:
    """`check_outputs` of one output, a file or a folder."""
    check_outputs([] if folder else [path], inputs, overwrite, [path] if folder else [])


def check_outputs(
    files: Sequence[str | Path],
    inputs: Sequence[str | Path | None] = (),
    overwrite: bool = False,
    folders: Sequence[str | Path] = (),
) -> None:
    """Check everything that a run writes before it begins, and hold it until `run` ends.

    files, folders: the outputs; a folder is a model directory, which is replaced as a whole.
    inputs: the files and folders that the run reads; None and names that are no paths pass. An
    output that exists needs `overwrite`, unless the same command was killed while it wrote it.

    Raises UserError for an output that exists, that cannot be written, that another process writes,
    or that is the same file as an input or another output, be it through links or another
    spelling."""
    outputs = [*files, *folders]
    for path in outputs:
        _check_kind(Path(path), path in folders)
    check_different(outputs, inputs)
    killed = [was_killed(path) for path in outputs]  # the command held all of them
    for path in outputs:
        is_folder = path in folders
        target = Path(path)
        exists = holds_something(target) if is_folder else target.exists()
        if exists and not overwrite and not any(killed):
            raise UserError(f"{path} exists: give --overwrite to replace it, or another output")
        if is_folder and exists and not is_model_directory(target):
            raise UserError(
                f"{path} is no model directory: it is not replaced, give another output"
            )
    for path in outputs:
        hold_output(path)


def check_different(
    outputs: Sequence[str | Path], inputs: Sequence[str | Path | None] = ()
) -> None:
    """Raises UserError if an output, or its rows of a killed run, is an input or another output."""
    paths = [path for path in inputs if path is not None]
    paths += [base for base, _ in map(adapter_base, paths) if base]
    read = [Path(path) for path in paths if Path(path).exists()]
    read += [file for folder in read if folder.is_dir() for file in model_files(folder)]
    for place, output in enumerate(map(Path, outputs)):
        for path in read:
            partial = Path(f"{output}.partial")
            if any(target.exists() and path.samefile(target) for target in (output, partial)):
                raise UserError(
                    f"{output} would replace {path}, which this run reads: give another output"
                )
            if output.is_dir() and output.resolve() in path.resolve().parents:
                raise UserError(f"{path} lies in the output {output}: give another output")
        for other in map(Path, outputs[:place]):
            if _spelling(output) == _spelling(other) or (
                output.exists() and other.exists() and output.samefile(other)
            ):
                raise UserError(f"{output} and {other} are the same file: give different outputs")


def _spelling(path: Path) -> str:
    """Equal for paths that some file systems take for the same: case, composed letters, links."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def _check_kind(target: Path, is_folder: bool) -> None:
    """Raises UserError for an output of the wrong kind, or with a name that no file can have."""
    expected = "a folder" if is_folder else "a file"
    if target.name in ("", "..") or "\0" in str(target):
        raise UserError(f"output {str(target)!r}: expected the name of {expected}")
    try:
        if target.exists() and not (target.is_dir() if is_folder else target.is_file()):
            found = "a file" if target.is_file() else "a folder" if target.is_dir() else "no file"
            raise UserError(f"{target} is {found}, expected {expected} to write to")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None


def hold_output(path: str | Path) -> None:
    """As `hold`. Raises UserError if it cannot be written there, or another process does."""
    target = Path(path)
    try:
        parent = target.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"{target} cannot be written: {parent} is not a writable folder")
        longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        if len(os.fsencode(target.name)) > longest - 14:  # of a temporary name: .NAME.xxxxxxxx.tmp
            raise UserError(f"{target} cannot be written: its name is too long")
        hold(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None


def holds_something(folder: Path) -> bool:
    """Whether a folder holds more than what a killed run left: hidden temporary files."""
    return folder.is_dir() and any(
        not (path.name.startswith(".") and path.name.endswith((".tmp", ".lock")))
        for path in folder.iterdir()
    )


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
