"""Packed batches: their trees, and that a packed training is the unpacked one."""

import copy
import itertools
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PrefixTuningConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Lfm2Config,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)
from trl.trainer import utils as trl_utils

from tests.helpers.chat_models import CHATML
from tests.helpers.training import make_pairs
from trainer.packing import SiblingSampler, extend_fused_head, pack_batch
from trainer.stepwise_dpo_trainer import StepwiseDPOConfig, StepwiseDPOTrainer

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
PROBLEM = "Mia has 12 apples. She finds 14 more. How many apples does Mia have now?"


def siblings(prompt: str, prefix: list[str], right: list[str], wrong: list[str]) -> list[dict]:
    """All pairs of a right and a wrong next step."""
    return [
        {
            **{"prompt": prompt, "prefix": prefix, "chosen": [good], "rejected": [bad]},
            **{"chosen_scores": [0.9], "rejected_scores": [0.1 * k]},
        }
        for k, (good, bad) in enumerate(itertools.product(right, wrong))
    ]


PAIRS = make_pairs(7)
STATE = siblings(
    PROBLEM,
    ["Step 1: 12 + 14 = 26"],
    ["Step 2: 26 * 2 = 52", "Step 2: 26 + 26 = 52"],
    ["Step 2: 26 * 2 = 54", "Step 2: 26 + 2 = 28", "Answer: 26"],
)
ROWS = [*PAIRS, *STATE]


@pytest.fixture
def make(tiny_model_dir, tmp_path):
    """make(pack, rows, ...) -> a trainer whose policy has left its reference."""

    def make(pack, rows=ROWS, *, model=tiny_model_dir, peft_config=None, tokenizer=None, **config):
        config = {
            "per_device_train_batch_size": len(rows),
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "report_to": "none",
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "max_steps": 1,
            **config,
        }
        trainer = StepwiseDPOTrainer(
            model,
            args=StepwiseDPOConfig(str(tmp_path / "out"), pack=pack, **config),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in sorted(trainer.model.named_parameters()):
                if weight.requires_grad and ".ref." not in name:
                    weight += 0.02 * torch.randn(weight.shape, generator=generator)
        return trainer

    return make


class Gradients(TrainerCallback):
    """Keeps the gradients of the last update."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        weights = model.named_parameters()
        self.kept = {name: w.grad.clone() for name, w in weights if w.grad is not None}


def update(trainer) -> tuple[dict, dict]:
    """(what one update logged, its gradients)."""
    trainer.add_callback(gradients := Gradients())
    trainer.train()
    timings = ("train_", "epoch")
    first = trainer.state.log_history[0].items()
    return {k: v for k, v in first if not k.startswith(timings)}, gradients.kept


def same_update(packed, plain) -> None:
    """Both trainers make the same update: loss, metrics and gradients."""
    (logged, gradients), (expected, expected_gradients) = update(packed), update(plain)
    same_numbers(logged, expected)
    assert gradients.keys() == expected_gradients.keys() and gradients
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    assert largest > 0.1
    for name, gradient in gradients.items():
        tolerance = 1e-5 * max(1, largest)
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=tolerance)


def same_numbers(logged: dict, expected: dict) -> None:
    assert logged.keys() == expected.keys()
    for name, value in expected.items():
        # log-probs of this model are sums near -100, where float32 has steps of 1e-5
        tolerance = 3e-5 if "logps/" in name else 1e-5
        assert logged[name] == pytest.approx(value, rel=1e-5, abs=tolerance), name


# --- the trees ---


def test_a_batch_written_out():
    """Two texts with a trunk 5 6, the second one twice; a text of another group, shorter."""
    texts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 9], [5, 6]]
    scored = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 1, 0], [1, 0, 0]]).bool()
    packed = pack_batch(texts, ["a", "a", "a", "b"], scored, pad_token_id=0)
    (block,) = packed["blocks"]
    assert block["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]
    assert block["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert block["attention_mask"][0, 0, 4].tolist() == [True, True, False, False, True]
    # 7 and 9 are both predicted at the place of 6; the last label is the 6 of the second row
    assert packed["labels"].tolist() == [7, 8, 9, 6]
    assert packed["predictors"].tolist() == [1, 2, 1, 5]
    assert packed["index"].tolist() == [0, 1, 2, 2, 3]


def test_blocks_have_rows_of_similar_length():
    texts = [[*range(1, length + 1)] for length in (4, 9, 5, 8)]
    scored = torch.zeros(4, 8, dtype=torch.bool)
    for row, text in enumerate(texts):
        scored[row, len(text) - 2] = True
    packed = pack_batch(texts, range(4), scored, pad_token_id=0, multiple=2, block_tokens=10)
    shapes = [tuple(block["input_ids"].shape) for block in packed["blocks"]]
    assert shapes == [(2, 10), (2, 6)]
    assert packed["labels"].tolist() == [4, 9, 5, 8]
    assert packed["predictors"].tolist() == [20 + 6 + 2, 7, 20 + 3, 10 + 6]


def test_a_head_that_all_texts_share_is_read_once_a_tree():
    """20 texts of 25 tokens, which differ in their last 5, in trees of at most 100 tokens."""
    texts = [[*range(20), *range(100 * k, 100 * k + 5)] for k in range(1, 21)]
    scored = torch.zeros(20, 24, dtype=torch.bool)
    scored[:, -1] = True
    packed = pack_batch(texts, range(20), scored, pad_token_id=0, block_tokens=100)
    read = torch.cat([block["input_ids"].flatten() for block in packed["blocks"]])
    assert len(read) == 100 + 40  # 16 texts, and 4
    assert [read[place] for place in packed["predictors"]] == [text[-2] for text in texts]
    assert packed["labels"][packed["index"]].tolist() == [text[-1] for text in texts]
    for less in ({"block_tokens": math.inf}, {}):
        (block,) = pack_batch(texts, range(20), scored, pad_token_id=0, **less)["blocks"]
        assert block["input_ids"].shape == (20, 25)


def test_a_text_is_read_once_however_many_pairs_have_it(make):
    trainer = make("pairs")
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert len(STATE) == 6 and trainer.data_collator.packs
    tokens = int(batch["attention_mask"].sum())
    read = sum(block["input_ids"].numel() for block in batch["packed"]["blocks"])
    assert read < 0.65 * tokens
    assert len(batch["packed"]["labels"]) < batch["completion_mask"][:, 1:].sum()


# --- the same training ---

LOSSES = [
    ["stepwise"],
    ["step_dpo"],
    ["full_step_dpo"],
    ["sigmoid"],
    ["sft"],
    ["ipo", "sft"],
    ["stepwise", "sigmoid", "sft"],
    ["stepwise", "step_sft"],
]


@pytest.mark.process
@pytest.mark.parametrize("loss_type", LOSSES, ids="+".join)
def test_every_loss_is_the_same(make, loss_type):
    same_update(make("pairs", loss_type=loss_type), make("none", loss_type=loss_type))


SETTINGS = {
    "accumulation": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5},
    "checkpointing": {"gradient_checkpointing": True},
    "reference in advance": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4},
    "truncated": {"max_length": 90},
    "truncated at the start": {"max_length": 90, "truncation_mode": "keep_end"},
    "multiples": {"pad_to_multiple_of": 8},
    "eager": {"model_init_kwargs": {"attn_implementation": "eager"}},
    "credit": {"credit": "score", "step_agg": "mean", "margin_gamma": 1.0},
    "fork": {"credit": "fork"},
    "fork, reference in advance, truncated": {
        "credit": "fork",
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 4,
        "max_length": 90,
        "pad_to_multiple_of": 8,
    },
}


@pytest.mark.process
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_mode_is_the_same(make, settings):
    packed, plain = make("pairs", **settings), make("none", **settings)
    same_update(packed, plain)
    assert packed.data_collator.packs and not plain.data_collator.packs


@pytest.mark.process
def test_bf16_is_the_same_but_for_rounding(make):
    logged, expected = (update(make(pack, bf16=True))[0] for pack in ("pairs", "none"))
    assert logged["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert logged["logps/chosen"] == pytest.approx(expected["logps/chosen"], rel=0.01)


ADAPTER_MODES = ["reference in advance", "checkpointing", "accumulation"]


@pytest.mark.process
@pytest.mark.parametrize("settings", [{}, *map(SETTINGS.get, ADAPTER_MODES)])
def test_an_adapter_is_the_same(make, settings):
    lora = {"peft_config": LoraConfig(**LORA)}
    same_update(make("pairs", **lora, **settings), make("none", **lora, **settings))


@pytest.mark.process
def test_prompts_alone_and_a_chat_template_are_the_same(make, tiny_model_dir):
    """The template has control tokens that the tokenizer does not know: they are added."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = CHATML
    rows = [{**row, "prefix": []} for row in ROWS]
    chat = {"rows": rows, "tokenizer": tokenizer}
    packed = make("pairs", **chat)
    batch = packed.data_collator(list(packed.train_dataset))["packed"]
    trees = sum(len(block["input_ids"]) for block in batch["blocks"])
    assert trees < len({row["prompt"] for row in rows})  # they share the head of the template
    same_update(packed, make("none", **chat))


@pytest.mark.process
def test_evaluation_is_the_same(make):
    rows = Dataset.from_list(ROWS)
    results = [make(pack).evaluate(rows) for pack in ("pairs", "none")]
    packed, plain = (
        {name: value for name, value in result.items() if not name.endswith(("second", "runtime"))}
        for result in results
    )
    same_numbers(packed, plain)


# --- rows as they are ---


@pytest.mark.parametrize("labelled", [5, 0])
def test_on_a_cpu_only_tokens_with_a_label_get_logits(tiny_model_dir, monkeypatch, labelled):
    """The numbers and the gradients are those of TRL's own head, which reads all tokens."""
    torch.manual_seed(0)
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    models = [AutoModelForCausalLM.from_pretrained(tiny_model_dir) for _ in range(2)]
    for model in models:
        trl_utils.add_fused_lm_head(model, outputs=outputs)
    extend_fused_head(models[1])
    read: list[int] = []  # how many tokens the head of each model computes logits for
    head = trl_utils._ChunkedLogProbFunction
    original = head.apply
    spy = staticmethod(lambda hidden, *args: (read.append(len(hidden)), original(hidden, *args))[1])
    monkeypatch.setattr(head, "apply", spy)
    ids = torch.randint(3, 300, (3, 9))
    labels = ids.clone()
    labels[:, : 9 - labelled] = -100
    labels[0, 6:] = -100  # padding
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    found = []
    for model in models:
        given = {"labels": labels, "fused_lm_head": True, "num_items_in_batch": 7}
        found.append(model(input_ids=ids, attention_mask=mask, **given))
        found[-1].loss.backward()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-5)
    assert read == [24, found[0].label_mask.sum()]
    assert read[1] == (12 if labelled else 0)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


# --- models that cannot read trees ---


def fallback(trainer, caplog) -> str:
    """The one line that a trainer says when it does not pack; its training goes on."""
    (record,) = [one for one in caplog.records if "--pack none" in one.message]
    assert not trainer.data_collator.packs and trainer.args.pack == "none"
    trainer.train()
    return record.message


@pytest.mark.process
def test_a_prompt_learning_adapter_falls_back(make, caplog):
    peft = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert "virtual tokens" in fallback(make("pairs", peft_config=peft), caplog)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["a window", "convolutions", "experts"])
def test_a_model_that_cannot_read_trees_falls_back(make, tiny_model_dir, tmp_path, caplog, kind):
    small = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = copy.deepcopy(small.config)
    sizes = {
        name: getattr(config, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        )
    }
    if kind == "a window":
        from transformers import MistralConfig, MistralForCausalLM

        model, reason = MistralForCausalLM(MistralConfig(**sizes, sliding_window=100)), "mask"
    elif kind == "convolutions":
        layers = ["conv", *["full_attention"] * (config.num_hidden_layers - 1)]
        lfm = Lfm2Config(**sizes, layer_types=layers)
        model, reason = AutoModelForCausalLM.from_config(lfm), "mask"
    else:
        mixtral = MixtralConfig(**sizes, num_local_experts=2, output_router_logits=True)
        model, reason = MixtralForCausalLM(mixtral), "auxiliary loss"
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "model")
    trainer = make("pairs", PAIRS, model=str(tmp_path / "model"))
    assert reason in fallback(trainer, caplog)


# --- siblings together ---


def test_siblings_follow_one_another_in_an_order_of_every_epoch():
    epoch = 0
    groups = ["a", "b", "a", "c", "b", "a", *"defgh"]
    sampler = SiblingSampler(groups, seed=0, epoch=lambda: epoch)
    first = list(sampler)
    assert sorted(first) == list(range(len(groups))) == list(range(len(sampler)))
    for name in "ab":
        places = [place for place, row in enumerate(first) if groups[row] == name]
        assert places == list(range(places[0], places[0] + len(places)))
    assert list(sampler) == first
    epoch = 1
    assert list(sampler) != first and sorted(sampler) == sorted(first)


@pytest.mark.process
def test_batches_of_siblings_train_and_resume_alike(make, tmp_path):
    """Each epoch has its own order, a resumed training the order of the one that went on."""
    rows = [
        pair
        for k in range(4)
        for pair in siblings(f"{PROBLEM} {k}", [], ["Answer: 26"], ["Answer: 2", "Answer: 6"])
    ]
    settings = {"per_device_train_batch_size": 2, "max_steps": 7, "save_strategy": "steps"}
    seen: list[list[int]] = []

    def watched(**more):
        trainer = make("siblings", rows, **settings, save_steps=6, save_total_limit=2, **more)
        collate = trainer.data_collator.torch_call

        def watch(examples):
            prompts = [example["prompt_ids"] for example in examples]
            assert prompts[0] == prompts[1]
            seen.append(prompts[0])
            return collate(examples)

        trainer.data_collator.torch_call = watch
        return trainer

    whole = watched()
    whole.train()
    order = seen[:7]
    assert order[:3] != order[4:7]
    seen.clear()
    resumed = watched()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert seen[0] == order[6]
    for (name, weight), other in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-6, msg=name)


def test_siblings_of_a_stream_are_refused(tiny_model_dir, tmp_path):
    rows = IterableDataset.from_generator(lambda: iter(ROWS))
    config = StepwiseDPOConfig(str(tmp_path), use_cpu=True, max_steps=1, pack="siblings")
    with pytest.raises(ValueError, match="pack: siblings needs all rows at once"):
        StepwiseDPOTrainer(tiny_model_dir, args=config, train_dataset=rows)
