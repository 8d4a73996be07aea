"""--push_to_hub: the finished model is pushed once; what cannot work ends in one line."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common.cli import run
from common.files import TRAINING_JOB, write_records
from tests.helpers.training import flags, make_pairs, refused, train_here

TOKEN = "hf_" + "a" * 30


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub's API: it takes files in commits, and keeps them."""

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        found = known and self.path == "/api/whoami-v2"
        self.answer(200 if found else 401, {"name": "me", "type": "user"} if found else {})

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        hub.asked.append(self.path)
        if self.path in hub.refuses:
            self.answer(403, {"error": "this token may only read"})
        elif self.path == "/api/repos/create":
            self.answer(200, {"url": f"{hub.url}/me/{json.loads(body)['name']}"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.answer(200, {"files": [{"path": path, **modes} for path in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            made = {"commitUrl": f"{hub.url}/me/out/commit/abc", "commitOid": "abc"}
            self.answer(200, made | {"pullRequestUrl": None})
        else:
            self.answer(200, {"warnings": [], "errors": []})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.asked, server.refuses = {}, [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # of the tests
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def given(tmp_path, tiny_model_dir) -> list[str]:
    write_records(tmp_path / "pairs.jsonl", make_pairs(12))
    return flags(
        dataset_name="pairs.jsonl", model_name_or_path=tiny_model_dir, output_dir="out",
        logs_dir="logs", max_steps=2, save_steps=1, bf16="false", push_to_hub="true",
        hub_token=TOKEN,
    )  # fmt: skip


@pytest.mark.process
def test_the_finished_model_is_pushed_with_its_card(tmp_path, given, hub, monkeypatch, capsys):
    (tmp_path / "out/notes").mkdir(parents=True)
    (tmp_path / "out/notes/config.json").write_text("mine")
    (tmp_path / "out/notes.txt").write_text("mine")
    train_here(tmp_path, monkeypatch, *given, "--overwrite")
    kept = {path.name: path for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.files.keys()
    for name, content in hub.files.items():
        assert content == kept[name].read_bytes()
    assert not {"notes.txt", "notes/config.json", TRAINING_JOB} & hub.files.keys()
    assert not any("/" in name for name in hub.files), "only the finished model is pushed"
    assert (tmp_path / "out/checkpoint-2").is_dir()
    assert sum("/commit/" in path for path in hub.asked) == 1
    assert f"pushed it: {hub.url}/me/out/commit/abc" in capsys.readouterr().out
    assert TOKEN not in "".join(path.read_text("utf-8", "ignore") for path in kept.values())


@pytest.mark.process
def test_a_push_that_fails_leaves_the_model_and_says_how_to_push_it(
    tmp_path, given, hub, monkeypatch, capsys
):
    hub.refuses.add("/api/models/me/out/commit/main")
    with pytest.raises(SystemExit) as stopped:
        run(lambda: train_here(tmp_path, monkeypatch, *given))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert stopped.value.code == 2 and "argument --push_to_hub: " in line
    assert "the model is in out; push it later: `hf upload me/out out`" in line
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.process
def test_a_repository_that_cannot_be_written_is_found_before_training(
    tmp_path, given, hub, monkeypatch, capsys
):
    hub.refuses.add("/api/repos/create")
    with pytest.raises(SystemExit) as stopped:
        run(lambda: train_here(tmp_path, monkeypatch, *given))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert stopped.value.code == 2 and "--hub_model_id USER/NAME" in line
    assert not (tmp_path / "out/model.safetensors").exists()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_wrong_token_is_refused_before_any_work(tmp_path, given, hub, monkeypatch, capsys):
    line = refused(tmp_path, monkeypatch, capsys, *given, "--hub_token", "hf_wrong")
    assert f"argument --push_to_hub: {hub.url} cannot be used (" in line


@pytest.mark.parametrize("is_off", [False, True])
def test_without_a_network_it_is_refused_before_any_work(
    tmp_path, given, monkeypatch, capsys, is_off
):
    """The hub's address does not answer, or the hub is turned off."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_off)
    line = refused(tmp_path, monkeypatch, capsys, *given)
    assert "argument --push_to_hub: http://127.0.0.1:9 cannot be used (" in line
    assert "push later: `hf upload USER/NAME FOLDER`" in line


@pytest.mark.parametrize(
    ("name", "value"), [("hub_strategy", "checkpoint"), ("hub_always_push", "true")]
)
def test_checkpoints_are_not_pushed(tmp_path, given, hub, monkeypatch, capsys, name, value):
    line = refused(tmp_path, monkeypatch, capsys, *given, f"--{name}", value)
    assert f"argument --{name}: only the finished model is pushed" in line and not hub.asked
