"""common/cli.py: the arguments of a script, from flags and a YAML file, and its --help."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cli import parse_args, run
from common.files import ROOT
from common.threads import FEW_SPINS, WAIT_VARIABLES, _cores_are_busy


@dataclass
class Arguments:
    name: str = field(metadata={"help": "a required argument"})
    count: int = field(default=3, metadata={"help": "a number"})
    strategy: str = field(
        default="majority_vote",
        metadata={"help": "a name", "choices": ["greedy", "majority_vote", "weighted_vote"]},
    )
    limit: int | None = field(default=None, metadata={"help": "all if not given"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output"})
    shuffle: bool = field(default=True, metadata={"help": "shuffle the rows"})


@dataclass
class Inherited:
    learning_rate: float = field(default=0.1, metadata={"help": "of a library"})
    seed: int = field(default=0, metadata={"help": "of a library"})


Inherited.__module__ = "transformers.training_args"


@dataclass
class Trained(Inherited):
    learning_rate: float = field(default=0.2, metadata={"help": "of this project"})


HELP = """\
usage: train.py dpo --name ... [--config FILE.yaml] [arguments]

A test.

options:
  -h, --help            show this help message and exit
  --name NAME           a required argument
  --count COUNT         a number (default: 3)
  --strategy STRATEGY   a name (one of greedy, majority_vote, weighted_vote;
                        default: majority_vote)
  --limit LIMIT         all if not given
  --overwrite [true|false]
                        replace the output (default: False)
  --shuffle [true|false]
                        shuffle the rows (default: True)
  --no_shuffle          the same as --shuffle false
  --learning_rate LEARNING_RATE
                        of this project (default: 0.2)

arguments of TRL and transformers:
  --seed SEED           of a library (default: 0)

Flags override the arguments in a --config file. With --allow_env its key
`env` sets environment variables.
"""


def parse(*args: str):
    (parsed,) = parse_args(Arguments, description="A test.", args=list(args))
    return parsed


def test_help_is_short_and_shows_the_arguments_of_this_project_first(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        parse_args(Arguments, Trained, description="A test.", args=["--help"], command="dpo")
    assert stopped.value.code == 0 and capsys.readouterr().out == HELP


def test_a_file_gives_arguments_and_flags_override_it(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("name: from file\ncount: 5\noverwrite: true\nlimit:\n")
    expected = Arguments("from file", 5, overwrite=True)
    assert parse("--config", str(path)) == parse(f"--config={path}") == expected
    assert parse("--count", "7", "--config", str(path)).count == 7
    path.write_text("count: 5\n")
    assert parse("--config", str(path), "--name", "flag") == Arguments("flag", 5)


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        ("count: 5", [], "the following arguments are required: --name"),
        ("name: a\ncount: many", [], "argument --count: invalid int value: 'many'"),
        ("name: a\ncounts: 5", [], "unknown key 'counts'"),
        ("name: a\ncount: [1, 2]", [], "key 'count' takes one value, got a list"),
        ("name: a\nstrategy: beam", [], "argument --strategy: invalid choice: 'beam'"),
        ("name: a", ["--counts", "5"], "unknown argument --counts 5"),
        ("just words", [], "must hold `key: value` lines"),
        ("a: b: c", [], "is not YAML"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, content, args, message):
    (tmp_path / "my.yaml").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        parse("--config", str(tmp_path / "my.yaml"), *args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--stratgy", "--strategy"),
        ("--over-write", "--overwrite"),
        ("-limit", "--limit"),
        ("--no_shufle", "--no_shuffle"),
        ("--LIMT=3", "--limit"),
        ("--confg", "--config"),
        ("--model_name_or_path", None),
        ("3", None),
        ("--", None),
    ],
)
def test_a_mistyped_argument_is_guessed(tmp_path, capsys, given, meant):
    with pytest.raises(SystemExit):
        parse("--name", "a", "astray", given, "3")
    error = capsys.readouterr().err
    hint = f"did you mean {meant}? " if meant else ""
    assert error.endswith(f" ({hint}see --help)\n"), error


def test_a_mistyped_key_of_a_file_is_guessed(tmp_path, capsys):
    for key, meant in (("stratgy", "strategy"), ("over-write", "overwrite"), ("hlep", None)):
        (tmp_path / "my.yaml").write_text(f"name: a\n{key}: 3\n")
        hint = f"did you mean {meant}? " if meant else ""
        error = refused(capsys, "--config", str(tmp_path / "my.yaml"))
        assert error.endswith(f"unknown key '{key}' ({hint}see --help)\n"), error


def test_a_missing_file_is_one_line(capsys):
    for args, message in (
        (["--config"], "argument --config: expected one argument"),
        (["--config", "no"], "not found"),
    ):
        with pytest.raises(SystemExit):
            parse("--name", "a", *args)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def refused(capsys, *args: str) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as stopped:
        parse(*args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and len(error) < 700, error
    return error


@dataclass
class Numbers:
    limit: int | None = 3
    seed: int = 0
    data_seed: int | None = None
    rate: float = 0.5
    rates: list[float] = field(default_factory=lambda: [0.5])


@pytest.mark.parametrize("source", ["flag", "file"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("limit", "1" * 22, "--limit: expected -2147483648 to 2147483647"),
        ("limit", str(-(2**31) - 1), "--limit: expected -2147483648 to 2147483647"),
        ("limit", "9" * 4299, "--limit: expected -2147483648 to 2147483647"),
        ("limit", "9" * 5000, "argument --limit"),
        ("limit", "1.5", "argument --limit"),
        ("limit", "many", "argument --limit"),
        ("limit", "x" * 5000, "argument --limit"),
        ("seed", "-1", "--seed: expected 0 to 4294967295, got -1"),
        ("seed", str(2**32), "--seed: expected 0 to 4294967295"),
        ("data_seed", "-1", "--data_seed: expected 0 to 4294967295"),
        ("rate", "nan", "--rate: expected a finite number, got nan"),
        ("rate", "-inf", "--rate: expected a finite number, got -inf"),
        ("rate", "Infinity", "--rate: expected a finite number, got inf"),
        ("rate", "1e400", "--rate: expected a finite number, got inf"),
        ("rate", "9" * 5000, "--rate: expected a finite number, got inf"),
        ("rates", "nan", "--rates: expected a finite number, got nan"),
    ],
)
def test_numbers_are_finite_and_fit(tmp_path, capsys, source, name, value, message):
    path = tmp_path / "my.yaml"
    path.write_text(f"{name}: {value}\n")
    args = ["--config", str(path)] if source == "file" else [f"--{name}={value}"]
    with pytest.raises(SystemExit) as stopped:
        parse_args(Numbers, description="A test.", args=args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and len(error) < 700, error
    assert message in error


def test_large_numbers_that_fit(tmp_path):
    args = ["--limit", "2147483647", "--seed", str(2**32 - 1), "--rate=-1e300", "--rates", "0"]
    (numbers,) = parse_args(Numbers, description="A test.", args=args)
    assert numbers == Numbers(2**31 - 1, 2**32 - 1, None, -1e300, [0.0])


@dataclass
class Kinds:
    text: str = "a"
    maybe: str | None = "b"
    count: int = 1
    limit: int | None = 2
    rate: float = 0.1
    switch: bool = False
    on: bool = True
    third: bool | None = None
    choice: str = field(default="no", metadata={"choices": ["no", "steps"]})
    texts: list[str] = field(default_factory=lambda: ["c"])
    mapping: dict | str | None = None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text: no", Kinds(text="no")),
        ("text: 2026-01-01", Kinds(text="2026-01-01")),
        ("text: 0x10", Kinds(text="0x10")),
        ("text: '~'", Kinds(text="~")),
        ("text: ''", Kinds(text="")),
        ("text: --count", Kinds(text="--count")),
        ("choice: no", Kinds(choice="no")),
        ("choice: steps", Kinds(choice="steps")),
        ("rate: 1e-4", Kinds(rate=1e-4)),
        ("count: -5", Kinds(count=-5)),
        ("limit:", Kinds(limit=None)),
        ("limit: ~", Kinds(limit=None)),
        ("maybe: null", Kinds(maybe=None)),
        ("maybe: 'null'", Kinds(maybe="null")),
        ("switch: yes\non: off", Kinds(switch=True, on=False)),
        ("switch: ON\non: No", Kinds(switch=True, on=False)),
        ("switch: 'true'\nthird: on", Kinds(switch=True, third=True)),
        ("texts: [no, 1, 1.50]", Kinds(texts=["no", "1", "1.50"])),
        ("texts: one", Kinds(texts=["one"])),
        ("mapping: {a: 1, b: [x]}", Kinds(mapping={"a": 1, "b": ["x"]})),
        ("mapping: '{\"a\": 1}'", Kinds(mapping='{"a": 1}')),
        ("\ufeffcount: 5\r\nrate: 2\r\n", Kinds(count=5, rate=2)),
        ("# comment\n---\ncount: 5\n...\n", Kinds(count=5)),
    ],
)
def test_values_of_a_file_count_as_they_are_written(tmp_path, content, expected):
    """`no` is a text where a text is expected, and `1e-4` is a number where one is expected."""
    for encoded in (content.encode(), content.removeprefix("\ufeff").encode("utf-16")):
        (tmp_path / "my.yaml").write_bytes(encoded)
        args = ["--config", str(tmp_path / "my.yaml")]
        (found,) = parse_args(Kinds, description="A test.", args=args)
        assert found == expected


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\nname: b", "key 'name' is there twice"),
        ("name: a\nname:", "key 'name' is there twice"),
        ("name: &x a\nstrategy: *x", "aliases (*name) are not read"),
        (BOMB, "aliases (*name) are not read"),
        ("<<: {name: a}", "unknown key '<<'"),
        ("name: {a: 1}", "key 'name' takes one value, got a mapping"),
        ("name: [a]", "key 'name' takes one value, got a list"),
        ("name: !!python/object/apply:os.system [ls]", "takes one value, got a list"),
        ("name: !!python/name:os.system x", "key 'name': expected plain values"),
        ("name: !mine a", "key 'name': expected plain values"),
        ("name: a\ncount:", "key 'count' has no value"),
        ("name: ~", "key 'name' has no value"),
        ("name: a\n\tcount: 1", "is not YAML"),
        ("name: 'a", "is not YAML"),
        ("name: a\n---\nname: b", "is not YAML"),
        ("name: \x07", "is not YAML"),
        ("1: a", "unknown key '1'"),
        ("yes: a", "unknown key 'yes'"),
        ("? [a]\n: b", "unknown key '[...]'"),
        ("help: a", "unknown key 'help'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("allow_env: true\nenv: {A: 1}", "unknown key 'allow_env'"),
        ("- name", "must hold `key: value` lines"),
        ("", "must hold `key: value` lines"),
        ("name: " + "[" * 5000, "nested too deeply"),
        ("name: a\n# " + "x" * 2**20, "more than 1 MB"),
        ("name: a\ncount: " + "9" * 5000, "argument --count"),
        ("name: a\ncount: 2026-01-01", "argument --count"),
    ],
)
def test_odd_files_are_one_line(tmp_path, capsys, content, message):
    (tmp_path / "my.yaml").write_bytes(content.encode())
    assert message in refused(capsys, "--config", str(tmp_path / "my.yaml"))


def test_what_is_no_text_file_is_one_line(tmp_path, capsys):
    for content in (b"\x89PNG\r\n\x1a\n\xff", b"\xff\xfe\x00", b"name: \xe4", b"\x00" * 9):
        (tmp_path / "my.yaml").write_bytes(content)
        assert "is not YAML" in refused(capsys, "--config", str(tmp_path / "my.yaml"))
    for path in (str(tmp_path), "/dev/null", "a\x00b"):
        assert "my" not in refused(capsys, "--config", path)


def test_a_file_sets_environment_variables_only_if_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SET_BY_FILE", "before")
    path = tmp_path / "my.yaml"
    path.write_text("name: a\nenv: {SET_BY_FILE: 1, OTHER_ONE: no}\n")
    for more in ([], ["--allow_env", "false"]):
        assert "--allow_env" in refused(capsys, "--config", str(path), *more)
        assert os.environ["SET_BY_FILE"] == "before"
    monkeypatch.delenv("OTHER_ONE", raising=False)
    for more in (["--allow_env"], ["--allow_env", "true"], ["--allow_env=true"]):
        assert parse(*more, "--config", str(path)) == Arguments("a")
        assert os.environ["SET_BY_FILE"] == "1"
        monkeypatch.setenv("SET_BY_FILE", "before")
    path.write_text("name: a\nenv: [SET_BY_FILE]\n")
    assert "expected `NAME: value` lines" in refused(capsys, "--config", str(path), "--allow_env")
    path.write_text("name: a\nenv: {'': x}\n")
    refused(capsys, "--config", str(path), "--allow_env")


def test_no_file_beside_the_script_gives_arguments(tmp_path, monkeypatch):
    """transformers' parser would read SCRIPT.args."""
    (tmp_path / "train.args").write_text("--count 7")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py")])
    assert parse("--name", "a").count == 3


def raises(error: Exception) -> type:
    @dataclass
    class Raises:
        count: int = 0

        def __post_init__(self):
            raise error

    return Raises


def test_what_the_libraries_raise_for_a_value_is_one_line(capsys):
    for error in (ImportError("no package"), KeyError("x"), OverflowError("large")):
        with pytest.raises(SystemExit) as stopped:
            parse_args(raises(error), description="A test.", args=[])
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_too_little_memory_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(lambda: bytearray(2**62))
    assert stopped.value.code == 2 and "not enough memory" in capsys.readouterr().err


yaml_text = st.text(st.sampled_from(":-[]{}#&*!|>'\"%@`,?~ \n\tan0159.e\ufeff\x00é"), max_size=60)


@pytest.mark.property
@given(content=st.binary(max_size=60) | yaml_text.map(str.encode))
def test_any_file_gives_arguments_or_one_line(content):
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        error = io.StringIO()
        with contextlib.redirect_stderr(error):
            try:
                parse_args(Kinds, description="A test.", args=["--config", file.name])
            except SystemExit as stopped:
                assert stopped.code == 2
                assert error.getvalue().count("\n") == 1


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
@pytest.mark.parametrize("busy", [False, True])
def test_threads_spin_shortly_beside_other_jobs_unless_the_user_chose(monkeypatch, given, busy):
    for name in WAIT_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("common.threads._cores_are_busy", lambda: busy)
    run(lambda: None)
    found = {name: os.environ[name] for name in WAIT_VARIABLES if name in os.environ}
    assert found == (given or ({"GOMP_SPINCOUNT": FEW_SPINS} if busy else {}))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_busy_core_is_seen(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count()))
    endless = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(endless, stdout=subprocess.PIPE) as job:
        job.stdout.readline()
        assert _cores_are_busy()
        job.kill()


@pytest.mark.process
def test_no_script_loads_torch_before_that():
    """OpenMP reads its variables when torch is loaded: OMP_DISPLAY_ENV prints what it read."""
    scripts = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in (".", "benchmarks", "evaluation", "reward_model", "utils")
        for path in (ROOT / folder).glob("*.py")
        if "__main__" in path.read_text()
    ]
    assert len(scripts) > 25 and {"train", "inference", "benchmarks.threads"} <= {*scripts}
    code = (
        f"import sys; from importlib import import_module; from common.cli import run\n"
        f"for script in {scripts}: import_module(script)\n"
        "assert 'torch' not in sys.modules\n"
        "import common.threads; common.threads._cores_are_busy = lambda: True\n"
        "run(lambda: import_module('torch'))"
    )
    variables = {key: os.environ[key] for key in os.environ if key not in WAIT_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**variables, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{FEW_SPINS}'" in done.stderr
