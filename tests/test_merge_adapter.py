"""utils/merge_adapter.py: the merged model is the adapter's, whole or not at all."""

import errno
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lm.loading import load_model
from tests.helpers.mains import call_main
from utils import merge_adapter

pytestmark = pytest.mark.process
IDS = torch.tensor([[5, 6, 7, 8]])
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def adapter(tiny_model_dir, tmp_path) -> Path:
    """A LoRA that is not zero, with a tokenizer and a chat template of its own."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        load_model(tiny_model_dir, torch.float32)[0],
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.15)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = CHAT
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def merge(adapter: object, *more: object, monkeypatch, capsys) -> tuple[int, str, str]:
    capsys.readouterr()  # the test's own loading
    flags = ("--model_name_or_path", adapter, *more)
    return call_main(merge_adapter.main, *flags, monkeypatch=monkeypatch, capsys=capsys)


def test_the_merged_model_is_the_adapters(adapter, tiny_model_dir, monkeypatch, capsys):
    code, out, err = merge(adapter, monkeypatch=monkeypatch, capsys=capsys)
    folder = adapter.with_name("mine_merged")
    assert code == 0 and str(folder) in out, err
    assert not list(folder.glob("adapter*")) and list(folder.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder)  # a plain model, without PEFT
    with torch.inference_mode():
        logits = model(IDS).logits
        expected = load_model(str(adapter), torch.float32)[0](IDS).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (logits - base).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT
    assert {path.name for path in adapter.parent.iterdir()} == {"mine", "mine_merged"}

    code, _, err = merge(adapter, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "--overwrite" in err and err.count("\n") == 1
    more = ("--merged_dtype", "bfloat16", "--overwrite")
    assert merge(adapter, *more, monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_merged_is_one_line(adapter, tiny_model_dir, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    for flags, message in (
        ((tiny_model_dir, "--output", adapter.with_name("x")), "is a whole model, not an adapter"),
        ((adapter, "--output", adapter, "--overwrite"), "which this run reads"),
        ((adapter, "--output", tiny_model_dir, "--overwrite"), "which this run reads"),
        ((adapter.with_name("none"),), "none"),
    ):
        code, _, err = merge(*flags, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and message in err and err.count("\n") == 1, err
    config = adapter / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"base_model_name_or_path": str(adapter / "gone")}))
    code, _, err = merge(adapter, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and err.count("\n") == 1 and "gone" in err
    config.write_bytes(before[config])
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
    assert [path.name for path in adapter.parent.iterdir()] == ["mine"]


def test_a_full_disk_leaves_nothing(adapter, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    code, _, err = merge(adapter, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "the disk is full" in err
    assert [path.name for path in adapter.parent.iterdir()] == ["mine"]
