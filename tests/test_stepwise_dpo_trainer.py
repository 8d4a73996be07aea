"""StepwiseDPOTrainer against TRL's DPOTrainer and in every mode, on a tiny random model."""

import copy
import itertools
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer
from trl import DPOConfig, DPOTrainer

from common.errors import ModelError, RecordError
from common.files import ROOT
from lm.text_encoding import format_prompt, response_pieces
from tests.helpers.training import make_pairs
from trainer.stepwise_dpo_trainer import (
    STEP_LOSSES,
    DataCollatorForSteps,
    StepwiseDPOConfig,
    StepwiseDPOTrainer,
    encode_pair,
    fork_candidates,
)

PLAIN_DPO = {"credit": "uniform", "step_agg": "sum", "margin_gamma": 0.0, "anchor_lambda": 0.0}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


ROWS = make_pairs(8)
ROW = {
    "prompt": "How many?",
    "prefix": ["Step 1: 1 + 2 = 3"],
    "chosen": ["Step 2: 3 * 4 = 12", "Answer: 12"],
    "rejected": ["Step 2: 3 + 4 = 7"],
    "chosen_scores": [0.9, 0.8],
    "rejected_scores": [0.1],
}
PROMPT_IDS = [
    *(1, 419, 284, 410, 380, 289, 13, 421, 284, 13),  # <s> Problem: How many?\n Solution:\n
    *(358, 353, 275, 284, 353, 275, 371, 353, 276, 355, 353, 277, 13),  # Step 1: 1 + 2 = 3\n
]
STEP = [358, 353, 276, 284, 353, 277]  # Step 2: 3
# * 4 = 12\n Answer: 12</s>
CHOSEN_IDS = [*STEP, 375, 353, 278, 355, 353, 275, 276, 13, 420, 284, 353, 275, 276, 2]
# + 4 = 7\n, and no </s>: the solution continues
REJECTED_IDS = [*STEP, 371, 353, 278, 355, 353, 281, 13]


@pytest.fixture
def make(tiny_model_dir, tmp_path):
    """make(rows, peft=..., trl=..., **config) -> a trainer with small, exact defaults."""

    def make(
        rows=ROWS,
        *,
        model=tiny_model_dir,
        ref_model=None,
        peft=False,
        trl=False,
        eval_rows=None,
        tokenizer=None,
        **config,
    ):
        config = {
            "per_device_train_batch_size": len(rows),
            "save_strategy": "no",
            "logging_steps": 1,
            # a loss whose value at the start is known
            **({} if trl else {"loss_type": ["stepwise"]}),
            **config,
        }
        config = {
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "report_to": "none",
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            **config,
        }
        trainer, config_class = (
            (DPOTrainer, DPOConfig) if trl else (StepwiseDPOTrainer, StepwiseDPOConfig)
        )
        return trainer(
            model=model,
            ref_model=ref_model,
            args=config_class(str(tmp_path / "out"), **config),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA) if peft else None,
        )

    return make


def as_text(row: dict, tokenizer) -> dict:
    """The row as TRL's DPOTrainer wants it: texts. TRL adds EOS itself."""
    prompt = format_prompt(row["prompt"], tokenizer) + "".join(
        response_pieces(row["prefix"], finished=False)
    )
    return {"prompt": prompt} | {
        side: "".join(response_pieces(row[side], finished=True)) for side in ("chosen", "rejected")
    }


def batch_of(trainer) -> dict:
    return trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))


def perturb(model) -> None:
    """Change every trainable weight a little, each time alike: the policy leaves its reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and ".ref." not in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def loss_of(trainer, moved=True) -> float:
    if moved:
        perturb(trainer.model)
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch_of(trainer)).item()


def token_log_ratios(trainer, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob of every token but the first under policy and under reference, and the difference,
    without anything of the trainer: (2B, L - 1) each."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"][:, 1:, None]
    with torch.no_grad():
        policy, reference = (
            model(**inputs).logits[:, :-1].log_softmax(-1).gather(2, labels)[:, :, 0]
            for model in (trainer.model, trainer.ref_model)
        )
    return policy, reference, policy - reference


def weights(trainer) -> dict:
    return {
        name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()
    }


# --- rows to ids ---


def test_ids_and_steps_by_hand(tokenizer):
    got = encode_pair(ROW, tokenizer, max_length=None, truncation_mode="keep_start")
    assert got == {
        "prompt_ids": PROMPT_IDS,
        "chosen_ids": CHOSEN_IDS,
        "rejected_ids": REJECTED_IDS,
        "chosen_steps": [0] * 14 + [1] * 6,  # the newline closes step 0, EOS step 1
        "rejected_steps": [0] * 13,
        "chosen_scores": [0.9, 0.8],
        "rejected_scores": [0.1],
        "truncated_steps": 0,
    }


def test_collator_by_hand(tokenizer):
    short = {
        **ROW,
        "prefix": [],
        "chosen": ["Answer: 1"],
        "rejected": ["Answer: 2"],
        "chosen_scores": [1],
        "rejected_scores": [0],
    }
    rows = [encode_pair(row, tokenizer, 40, "keep_start") for row in (ROW, short)]
    batch = DataCollatorForSteps(pad_token_id=0, max_length=40)(rows)
    answer = [420, 284, 353, 275, 2], [420, 284, 353, 276, 2]
    assert (
        batch["input_ids"].tolist()
        == [
            [*PROMPT_IDS, *CHOSEN_IDS[:17]],  # 23 + 17 = 40: the answer and EOS are cut
            [*PROMPT_IDS[:10], *answer[0], *[0] * 25],
            [*PROMPT_IDS, *REJECTED_IDS, *[0] * 4],
            [*PROMPT_IDS[:10], *answer[1], *[0] * 25],
        ]
    )
    assert batch["step_ids"].tolist() == [
        [-1] * 23 + [0] * 14 + [1] * 3,
        [-1] * 10 + [0] * 5 + [-1] * 25,
        [-1] * 23 + [0] * 13 + [-1] * 4,
        [-1] * 10 + [0] * 5 + [-1] * 25,
    ]
    assert torch.equal(batch["completion_mask"], (batch["step_ids"] >= 0).long())
    assert batch["step_mask"].tolist() == [
        [True, True],
        [True, False],
        [True, False],
        [True, False],
    ]
    torch.testing.assert_close(
        batch["step_scores"], torch.tensor([[0.9, 0.8], [1.0, 0.0], [0.1, 0.0], [0.0, 0.0]])
    )
    assert batch["truncated_steps"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("max_length", "mode", "left", "truncated"),
    [
        # both steps of chosen lose tokens, one all of them
        (36, "keep_start", [[True, False], [True, False]], 2),
        (24, "keep_start", [[True, False], [True, False]], 3),
        (6, "keep_end", [[False, True], [True, False]], 2),
    ],
)
def test_truncation_keeps_steps_and_ids_together(tokenizer, max_length, mode, left, truncated):
    row = encode_pair(ROW, tokenizer, max_length, mode)
    batch = DataCollatorForSteps(pad_token_id=0, max_length=max_length, truncation_mode=mode)([row])
    assert batch["step_ids"].shape == batch["input_ids"].shape == (2, max_length)
    assert batch["step_mask"].tolist() == left and batch["truncated_steps"].tolist() == [truncated]


CHOSEN, WRONG = [7, 1, 2, 3, 8, 9], [0, 0, 0, 0, 1, 1]  # ids; steps of a rejected side


@pytest.mark.parametrize(
    ("rejected", "steps", "expected"),
    [
        # the sides part in step 0, and step 1 has no sibling
        ([7, 1, 5, 3, 8, 9], WRONG, [False, False, True, False, True, True]),
        # step 0 is in both
        ([7, 1, 2, 3, 6, 9], WRONG, [True, True, True, True, True, False]),
        # rejected goes on where chosen ends, or ends where chosen goes on
        ([*CHOSEN, 4], [*WRONG, 2], [True] * 7),
        (CHOSEN[:4], WRONG[:4], [True] * 4),
    ],
)
def test_where_a_fork_may_be(rejected, steps, expected):
    assert fork_candidates(CHOSEN, rejected, steps) == expected


@pytest.mark.parametrize(
    ("max_length", "mode", "left"),
    [
        (None, "keep_start", [29]),  # `+`, where chosen has `*`
        (29, "keep_start", []),
        (8, "keep_end", [1]),
        (6, "keep_end", []),
    ],
)
def test_the_fork_is_found_before_the_texts_are_cut(tokenizer, max_length, mode, left):
    row = encode_pair(ROW, tokenizer, max_length, mode)
    batch = DataCollatorForSteps(pad_token_id=0, max_length=max_length, truncation_mode=mode)([row])
    candidates = batch["fork_candidates"]
    assert candidates.shape == (1, batch["input_ids"].size(1))
    assert candidates[0].nonzero().flatten().tolist() == left
    assert batch["input_ids"][1, left].tolist() == [371] * len(left)


def test_a_straddling_token_belongs_to_the_earlier_step(tokenizer):
    """A token with the end of the prompt and the start of a response belongs to no step.

    It has no loss, and each side keeps its own such token."""
    straddling = copy.deepcopy(tokenizer)
    straddling.add_tokens([AddedToken(text, normalized=False) for text in ("\nStep 2", "\nAns")])
    pair = encode_pair({**ROW, "rejected": ["Answer: 7"]}, straddling, None, "keep_start")
    assert straddling.convert_ids_to_tokens(pair["prompt_ids"])[-1] == "3"
    assert straddling.convert_ids_to_tokens(pair["chosen_ids"])[:2] == ["\nStep 2", "▁"] and pair[
        "chosen_steps"
    ][:2] == [-1, 0]
    assert straddling.convert_ids_to_tokens(pair["rejected_ids"])[0] == "\nAns" and pair[
        "rejected_steps"
    ][:2] == [-1, 0]
    ids = straddling.convert_tokens_to_ids(["\nAns"])[0]
    # between two steps: the earlier one's
    assert pair["chosen_steps"][pair["chosen_ids"].index(ids)] == 0
    mask = DataCollatorForSteps(pad_token_id=0)([pair])["completion_mask"]
    assert mask.sum(1).tolist() == [len(pair["chosen_ids"]) - 1, len(pair["rejected_ids"]) - 1]


def test_offsets_that_leave_white_space_out():
    """With trim_offsets a newline has empty offsets, and still ends its step (byte-level)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE({"<e>": 0} | {char: 1 + k for k, char in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    pair = encode_pair(ROW, tokenizer, None, "keep_start")
    assert tokenizer.decode(pair["prompt_ids"]).endswith("= 3\n")
    assert pair["chosen_steps"] == [0] * len("Step 2: 3 * 4 = 12\n") + [1] * (len("Answer: 12") + 1)


def test_chat_template_gets_no_second_bos(tokenizer, make):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
        "<|assistant|>"
    )
    pair = encode_pair(ROW, chat, None, "keep_start")
    assert (
        pair["prompt_ids"].count(chat.bos_token_id) == 1
        and pair["prompt_ids"][0] == chat.bos_token_id
    )
    assert chat.decode(pair["prompt_ids"]).endswith("<|assistant|>Step 1: 1 + 2 = 3\n")
    assert (
        pair["chosen_ids"][-1] == chat.eos_token_id
        and pair["rejected_ids"][-1] != chat.eos_token_id
    )
    trainer = make(tokenizer=chat)
    assert loss_of(trainer, moved=False) == pytest.approx(0.693147, abs=1e-5)


def test_rows_without_room_are_dropped_and_counted(make, caplog):
    long = {**ROWS[0], "prompt": "Mia has 2 apples. " * 40}
    with caplog.at_level("WARNING"):
        trainer = make([*ROWS, long], max_length=100)
    truncated = sum(trainer.train_dataset["truncated_steps"])
    assert len(trainer.train_dataset) == len(ROWS) and truncated > 0
    assert (
        f"1 of {len(ROWS) + 1} pairs dropped" in caplog.text and f"{truncated} steps" in caplog.text
    )
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "steps/truncated" in log)
    assert logged["steps/truncated"] == pytest.approx(truncated / len(ROWS))
    with pytest.raises(ValueError, match="none of 1 pairs fits into max_length 100"):
        make([long], max_length=100)


def test_bad_rows_and_tokenizers_are_one_line_errors(make):
    with pytest.raises(
        RecordError, match="'chosen_scores': expected one score for each of 2 steps"
    ):
        encode_pair({**ROW, "chosen_scores": [0.5]}, None, None, "keep_start")
    with pytest.raises(ModelError, match="no character offsets"):
        make(tokenizer=ByT5Tokenizer())


# --- the loss against TRL's ---


@pytest.mark.parametrize("peft", [False, True])
def test_uniform_sum_equals_trl(make, tiny_model_dir, peft):
    """Without credit, margin and anchor, loss and metrics are TRL's, EOS included."""
    ours = make(peft=peft, **PLAIN_DPO)
    texts = [as_text(row, ours.processing_class) for row in ROWS]
    theirs = make(texts, peft=peft, trl=True, gradient_checkpointing=False)
    for side in ("chosen_ids", "rejected_ids"):
        assert ours.train_dataset[side] == theirs.train_dataset[side]
    loss = loss_of(ours)
    assert loss == pytest.approx(loss_of(theirs), abs=1e-5) and abs(loss - 0.6931) > 1e-3
    mine, trls = ours._metrics["train"], theirs._metrics["train"]
    for name in trls:
        assert mine[name] == pytest.approx(trls[name], rel=1e-4, abs=1e-4), name
    assert mine["logps/chosen_vs_ref"][0] == pytest.approx(
        trls["rewards/chosen"][0] / 0.1, abs=1e-4
    )
    first = [sum(row["chosen_scores"]) / len(row["chosen_scores"]) for row in ROWS]
    assert mine["scores/chosen"] == [pytest.approx(sum(first) / len(first))]


def test_equal_under_truncation(make):
    ours = make(max_length=90, **PLAIN_DPO)
    theirs = make(
        [as_text(row, ours.processing_class) for row in ROWS],
        trl=True,
        max_length=90,
        gradient_checkpointing=False,
    )
    assert sum(ours.train_dataset["truncated_steps"]) and loss_of(ours) == pytest.approx(
        loss_of(theirs), abs=1e-5
    )


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo", "sft"], ["apo_zero"]])
def test_trl_lists_are_trl(make, loss_type):
    ours = make(loss_type=loss_type, precompute_ref_log_probs=loss_type == ["sigmoid"])
    theirs = make(
        [as_text(row, ours.processing_class) for row in ROWS],
        trl=True,
        loss_type=loss_type,
        gradient_checkpointing=False,
    )
    assert loss_of(ours) == pytest.approx(loss_of(theirs), abs=1e-5)
    assert {"scores/chosen", "steps/truncated"} <= set(ours._metrics["train"])


@pytest.mark.parametrize("name", STEP_LOSSES)
def test_mixed_losses_are_the_weighted_sum(make, name):
    mixed = loss_of(make(loss_type=[name, "sigmoid", "sft"], loss_weights=[0.5, 2.0, 0.25]))
    parts = [loss_of(make(loss_type=[one])) for one in (name, "sigmoid", "sft")]
    assert mixed == pytest.approx(0.5 * parts[0] + 2 * parts[1] + 0.25 * parts[2], abs=1e-5)


def hand_computed(trainer) -> float:
    """The mean of `stepwise` with credit fork and the anchor, plus `step_sft`, token by token."""
    policy, reference, ratio = token_log_ratios(trainer, batch_of(trainer))
    total, count, siblings = 0.0, len(trainer.train_dataset), 0
    for row, example in enumerate(trainer.train_dataset):
        start = len(example["prompt_ids"]) - 1  # the first log-prob is that of the second token
        right, first_error, anchor, praise, blame = 1.0, 1.0, 0.0, 0.0, 0.0
        log_prob = 0.0
        places = [start + t for t in range(len(example["chosen_ids"]))]
        for k, score in enumerate(example["chosen_scores"]):
            mine = [t for t in places if example["chosen_steps"][t - start] == k]
            right *= score
            praise += right * ratio[row, mine].sum().item()
            anchor += score * max(0.0, -ratio[row, mine].sum().item())
            log_prob += right * policy[row, mine].sum().item()
        for k, score in enumerate(example["rejected_scores"]):
            steps = example["rejected_steps"]
            mine = [t for t, step in enumerate(steps) if step == k]
            both = zip(example["chosen_ids"], example["rejected_ids"], strict=False)
            (fork,) = [t for t, (one, other) in enumerate(both) if one != other][:1]
            siblings += fork in mine
            if fork not in mine:
                fork = min(mine, key=lambda t: reference[count + row, start + t].item())
            blame += (1 - score) * first_error * ratio[count + row, start + fork].item()
            first_error *= score
        total += math.log1p(math.exp(-0.1 * (praise - 5.0 * anchor - blame)))
        total -= 0.05 * log_prob
    assert siblings == count
    return total / count


@pytest.mark.process
def test_fork_and_step_sft_on_the_miniature_token_by_token(make):
    trainer = make(
        [*ROWS[:4], ROW], model=str(ROOT / "models/policy-mini"), max_steps=2,
        credit="fork", loss_type=["stepwise", "step_sft"], loss_weights=[1, 1],
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    assert all(not torch.equal(before[name], now) for name, now in weights(trainer).items())
    loss = loss_of(trainer, moved=False)
    assert loss == pytest.approx(hand_computed(trainer), rel=1e-4)
    whole = make(
        [*ROWS[:4], ROW], model=str(ROOT / "models/policy-mini"),
        credit="first_error", loss_type=["stepwise", "step_sft"], loss_weights=[1, 1],
    )  # fmt: skip
    whole.model.load_state_dict(trainer.model.state_dict())
    assert abs(loss - loss_of(whole, moved=False)) > 1e-3


def test_uniform_step_sft_is_sft_on_chosen(make):
    """Its gradient is that of TRL's sft times beta/2 tokens / pairs."""
    ours = make(loss_type=["step_sft"], credit="uniform", beta=0.3)
    texts = [as_text(row, ours.processing_class) for row in ROWS]
    theirs = make(texts, trl=True, loss_type=["sft"], gradient_checkpointing=False)
    gradients = []
    for trainer in (ours, theirs):
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters()})
    tokens = sum(len(ids) for ids in ours.train_dataset["chosen_ids"])
    for name, gradient in gradients[0].items():
        expected = gradients[1][name] * (0.15 * tokens / len(ROWS))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 0.1


def test_responses_as_single_steps_are_dpo_positive(make):
    """The ids are the same, and the anchor holds the response as a whole."""
    rows = [
        {
            **row,
            **{side: ["\n".join(row[side])] for side in ("chosen", "rejected")},
            **{"chosen_scores": [1.0], "rejected_scores": [0.0]},
        }
        for row in ROWS
    ]
    trainer = make(rows, credit="uniform", anchor_lambda=50.0)
    assert trainer.train_dataset["chosen_ids"] == make().train_dataset["chosen_ids"]
    loss = loss_of(trainer)
    batch = batch_of(trainer)
    _, _, ratio = token_log_ratios(trainer, batch)
    better, worse = (ratio * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    want = -torch.nn.functional.logsigmoid(0.1 * (better - worse - 50 * (-better).clamp(min=0)))
    assert (better < 0).any() and loss == pytest.approx(want.mean().item(), rel=1e-4)


def test_the_loss_uses_scores_credit_margin_and_anchor(make):
    """Each setting changes the loss of the same batch; at the reference only the margin is left."""
    losses = [
        loss_of(make(**settings))
        for settings in (
            {"credit": "first_error"},
            {"anchor_lambda": 5.0},
            {"credit": "score"},
            {"credit": "fork"},
            {"step_agg": "mean"},
            {"margin_gamma": 1.0},
        )
    ]
    assert all(abs(a - b) > 1e-4 for a, b in itertools.combinations(losses, 2))
    assert loss_of(make(), moved=False) == pytest.approx(0.693147, abs=1e-5)


def test_step_dpo_is_dpo_on_the_first_step(make, tiny_model_dir):
    """It is TRL's loss on pairs of one step each: later steps change nothing."""
    ours = make(loss_type=["step_dpo"], anchor_lambda=0.0)
    first = [{**row, **{side: row[side][:1] for side in ("chosen", "rejected")}} for row in ROWS]
    cut = [
        {**row, **{f"{side}_scores": row[f"{side}_scores"][:1] for side in ("chosen", "rejected")}}
        for row in first
    ]
    assert loss_of(ours) == pytest.approx(loss_of(make(cut, **PLAIN_DPO)), abs=1e-5)


def test_what_is_logged_per_position(make):
    """The means over the pairs that have the step, of a moved policy, computed again here."""
    trainer = make()
    perturb(trainer.model)
    batch = batch_of(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}

    _, _, log_ratio = token_log_ratios(trainer, batch)
    of_step = {
        (row, k): log_ratio[row][batch["step_ids"][row, 1:] == k].sum().item()
        for row in range(len(batch["step_ids"]))
        for k in range(int(batch["step_ids"][row].max()) + 1)
    }
    pairs = len(ROWS)
    for side, rows in (("chosen", range(pairs)), ("rejected", range(pairs, 2 * pairs))):
        for k in range(max(k for _, k in of_step) + 1):
            values = [of_step[row, k] for row in rows if (row, k) in of_step]
            name = f"logps/{side}_vs_ref/step_{k + 1}"
            assert (
                logged[name] == pytest.approx(sum(values) / len(values), abs=1e-4)
                if values
                else name not in logged
            )
    good = [
        of_step[row, k] < 0
        for row in range(pairs)
        for k, score in enumerate(ROWS[row]["chosen_scores"])
        if score >= 0.5
    ]
    assert logged["drift/good_steps_less_likely"] == pytest.approx(sum(good) / len(good))
    weights = [
        math.prod(row["chosen_scores"][: k + 1])
        for row in ROWS
        for k in range(len(row["chosen_scores"]))
    ]
    assert logged["weights/chosen"] == pytest.approx(sum(weights) / pairs, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss_type": ["stepwize"]},
            "stepwize is no loss; known are stepwise, step_dpo, full_step_dpo, step_sft, sigmoid",
        ),
        ({"loss_type": []}, "an empty list is no loss"),
        ({"loss_type": ["stepwise", "ipo"]}, "mix with sigmoid and sft only, not with ipo"),
        ({"loss_type": ["stepwise", "sft"], "loss_weights": [1.0]}, "same length"),
        ({"label_smoothing": 0.1}, "label_smoothing: not defined"),
        ({"credit": "all"}, "credit: expected one of first_error"),
        ({"step_agg": "max"}, "step_agg: expected one of"),
        ({"pack": "all"}, "pack: expected one of pairs, siblings, none"),
        (
            {"pack": "siblings", "train_sampling_strategy": "sequential"},
            "train_sampling_strategy: pack siblings orders the rows itself",
        ),
        ({"anchor_lambda": -1.0}, "anchor_lambda: expected a number of 0 or more"),
        ({"beta": 0.0}, "beta: expected a number above 0"),
        ({"beta": float("nan")}, "beta: expected a number above 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        StepwiseDPOConfig(use_cpu=True, **settings)
    assert "\n" not in str(error.value)


# --- every mode ---


@pytest.mark.process
@pytest.mark.parametrize("name", STEP_LOSSES)
def test_training_moves_the_policy_and_not_the_reference(make, name):
    trainer = make(max_steps=3, loss_type=[name])
    policy, reference = (
        weights(trainer),
        {n: p.clone() for n, p in trainer.ref_model.named_parameters()},
    )
    trainer.train()
    assert all(not torch.equal(policy[name], now) for name, now in weights(trainer).items())
    assert all(
        torch.equal(reference[name], now) for name, now in trainer.ref_model.named_parameters()
    )
    first = trainer.state.log_history[0]
    assert first["grad_norm"] > 0 and {
        "rewards/margins",
        "rewards/anchor",
        "logps/rejected_vs_ref",
        "scores/rejected",
    } <= set(first)


@pytest.mark.process
def test_peft_moves_the_adapter_alone(make):
    """The loss starts as in full training; the reference is the model without adapter."""
    trainer = make(peft=True, max_steps=2, learning_rate=1e-2)
    assert trainer.ref_model is None and loss_of(trainer, moved=False) == pytest.approx(
        0.693147, abs=1e-5
    )
    before = weights(trainer)
    trainer.train()
    moved = {name for name, now in weights(trainer).items() if not torch.equal(before[name], now)}
    assert moved and all("lora_" in name for name in moved)
    assert loss_of(trainer, moved=False) != pytest.approx(0.693147, abs=1e-4)


@pytest.mark.process
@pytest.mark.parametrize("credit", ["first_error", "fork"])
@pytest.mark.parametrize("peft", [False, True])
def test_precomputed_reference_is_the_same(make, peft, credit, capsys):
    live = make(peft=peft, credit=credit)
    stored = make(
        peft=peft, credit=credit, precompute_ref_log_probs=True, precompute_ref_batch_size=3
    )
    assert "Computing" not in capsys.readouterr().err, "no bar off a terminal"
    assert stored.ref_model is None
    assert loss_of(stored) == pytest.approx(loss_of(live), abs=1e-5)
    stored.train()


@pytest.mark.process
def test_precomputed_reference_is_not_mixed_up_between_losses(make):
    """The caches differ: per response for TRL's losses, per step for ours."""
    for loss_type in (["sigmoid"], ["stepwise"], ["sigmoid"]):
        trainer = make(loss_type=loss_type, precompute_ref_log_probs=True)
        assert loss_of(trainer) == pytest.approx(loss_of(make(loss_type=loss_type)), abs=1e-5)


@pytest.mark.process
@pytest.mark.parametrize(
    ("losses", "credit"),
    [
        (["stepwise"], "first_error"),
        (["stepwise", "sft"], "first_error"),
        (["step_dpo", "sigmoid"], "first_error"),
        (["stepwise", "step_sft"], "fork"),
    ],
)
def test_gradient_accumulation_and_checkpointing_change_nothing(make, losses, credit):
    """Neither when the micro-batches have different numbers of tokens, or of pairs (3, 3, 2)."""
    settings = {
        "loss_type": losses,
        "credit": credit,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    trainers = [
        make(**settings),
        make(**settings, per_device_train_batch_size=2, gradient_accumulation_steps=4),
        make(**settings, per_device_train_batch_size=3, gradient_accumulation_steps=3),
        make(**settings, gradient_checkpointing=True),
    ]
    for trainer in trainers:
        perturb(trainer.model)  # at the reference the anchor has no slope
        trainer.train()
    losses_logged = [trainer.state.log_history[0]["loss"] for trainer in trainers]
    assert losses_logged == pytest.approx(losses_logged[:1] * 4, abs=5e-6)
    once, *others = map(weights, trainers)
    untouched = dict(
        AutoModelForCausalLM.from_pretrained(
            trainers[0].ref_model.config._name_or_path
        ).named_parameters()
    )
    assert all(not torch.equal(once[name], untouched[name]) for name in once)
    for other in others:
        for name in once:
            torch.testing.assert_close(other[name], once[name], rtol=0, atol=2e-6)


@pytest.mark.process
def test_eval_dataset(make):
    trainer = make(
        eval_rows=ROWS[:4],
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        precompute_ref_log_probs=True,
    )
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 2 and evaluations[1]["eval_loss"] != evaluations[0]["eval_loss"]
    assert {"eval_rewards/accuracies", "eval_scores/chosen", "eval_logps/chosen_vs_ref"} <= set(
        evaluations[0]
    )
    live = make(eval_rows=ROWS[:4])
    assert live.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert live.evaluate(Dataset.from_list(ROWS[4:]))["eval_loss"] == pytest.approx(
        0.693147, abs=1e-5
    )


@pytest.mark.process
def test_a_model_in_memory_and_streamed_rows(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = StepwiseDPOConfig(
        str(tmp_path),
        loss_type=["stepwise"],
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = IterableDataset.from_generator(lambda: iter(ROWS))
    trainer = StepwiseDPOTrainer(
        model,
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(0.693147, abs=1e-5)
