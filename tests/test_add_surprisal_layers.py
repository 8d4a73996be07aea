"""Two more layers that know how surprising tokens are: how they are put on, and the script."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.helpers.mains import call_main
from utils.add_surprisal_layers import aligned, main, put_on


def test_layers_that_learned_at_another_scale_give_the_same_on_the_model(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    torch.manual_seed(0)
    ids = torch.randint(5, 600, (2, 30))
    written = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, given: written.append(given[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    layers = torch.nn.ModuleList(LlamaDecoderLayer(model.config, 2 + k) for k in range(2)).eval()
    norm = copy.deepcopy(model.model.norm)
    with torch.no_grad():
        hidden = written[0] / 7
        positions = model.model.rotary_emb(hidden, torch.arange(30)[None])
        for layer in layers:
            hidden = layer(hidden, position_embeddings=positions)
        put_on(model, layers, norm, 7)
        top = model.model(ids).last_hidden_state
        torch.testing.assert_close(top, norm(hidden), atol=1e-4, rtol=1e-4)


def test_tokens_that_are_added_belong_to_the_step_that_follows():
    text = aligned(
        [7, 8, 1, 2, 9, 3, 4, 9],
        [-1, -1, 0, 0, 0, 1, 1, 1],
        [7, 8, 50, 60, 1, 2, 9, 50, 60, 3, 4, 9],
    )
    assert text.source == [0, 1, 1, 1, 2, 3, 4, 4, 4, 5, 6, 7]
    assert text.step_of == [-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="tokens added"):
        aligned([7, 8, 9], [-1, 0, 0], [7, 9, 8])


@pytest.mark.process
def test_the_script_leaves_the_model_below_as_it_is(run_script, tiny_model_dir, tmp_path):
    folder = tmp_path / "deeper"
    command = ["--model_name_or_path", tiny_model_dir, "--output", folder]
    command += ["--updates", 3, "--batch_size", 4]
    done = run_script("utils/add_surprisal_layers.py", *command)
    assert done.returncode == 0, done.stderr
    assert all(part in done.stdout for part in ("AUROC", "KL divergence", f"wrote {folder}"))
    before, after = (load_file(f"{path}/model.safetensors") for path in (tiny_model_dir, folder))
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4
    for name in before.keys() - {"model.norm.weight"}:  # the step token has a row of its own
        assert torch.equal(before[name], after[name][: len(before[name])])
    assert len(after["lm_head.weight"]) == len(before["lm_head.weight"]) + 1
    assert {name.split(".")[2] for name in after.keys() - before.keys()} == {"2", "3"}
    assert all(weight.isfinite().all() for weight in after.values())
    assert [path.name for path in tmp_path.iterdir()] == ["deeper"]  # nothing beside it

    again = run_script("utils/add_surprisal_layers.py", *command)
    assert again.returncode == 2 and "--overwrite" in again.stderr and again.stderr.count("\n") == 1


@pytest.mark.parametrize(("flag", "value"), [("--updates", 0), ("--learning_rate", -1)])
def test_numbers_that_make_no_sense_are_refused(flag, value, monkeypatch, capsys):
    code, _, err = call_main(main, flag, value, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and flag in err and err.count("\n") == 1


def test_another_architecture_is_refused(tokenizer, tmp_path, monkeypatch, capsys):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    command = ["--model_name_or_path", tmp_path / "gpt2", "--output", tmp_path / "out"]
    code, _, err = call_main(main, *command, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "LLaMA" in err.splitlines()[-1] and not (tmp_path / "out").exists()
