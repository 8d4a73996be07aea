"""A causal LM with two more layers that know what surprised it: a backbone for judges (train.py prm, train.py reward).

    python utils/add_surprisal_layers.py --output saved_model/policy_surprisal

A model that can do arithmetic expects the right digit; a judge made of it still does not see the wrong one. What was expected is
known in the last layer, at the token before, so no layer is left that could compare it with what came, and layers that are only put
on top do not learn to from labels: their heads would have to find the token before first (docs/LOG.md). Here they are taught it,
without labels, on solutions in which some numbers were changed, half of them as a PRM reads them, the model itself frozen:

1. half of the heads of the first new layer look at the token before:    -log of the attention that it gets
2. the top says the least log p(x_t | x_<t) of the step so far, and of the solution so far: smooth L1, from FLOOR to 0
3. it still predicts the next token as the model did:                    cross-entropy to its distribution

What reads 2 off the top is thrown away. What is written is a plain LLaMA, a causal LM as before.
"""

import copy
import itertools
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_model, check_output, parse_args, run
from common.errors import UserError
from common.files import at_root

FLOOR = -8.0  # nats: below it a token is as surprising as can be
ATTENTION = 0.3  # weight of 1 beside the others, which have 1
READ = ("step", "solution")
CHECKED = 20  # batches that the figures at the end are measured on


@dataclass
class SurprisalArguments:
    model_name_or_path: str = field(
        default=at_root("models/policy-mini"),
        metadata={"help": "a LLaMA-type causal LM: a directory or a hub name"},
    )
    output: str = field(
        default=at_root("saved_model/policy_surprisal"),
        metadata={"help": "folder of the model with two layers more"},
    )
    updates: int = field(default=1500, metadata={"help": "optimizer steps"})
    batch_size: int = field(
        default=16, metadata={"help": "solutions an update: of pretraining problems, each once"}
    )
    learning_rate: float = field(
        default=2e-3, metadata={"help": "peak learning rate of AdamW, decayed linearly to 0"}
    )
    seed: int = field(
        default=0, metadata={"help": "seed of the new weights and of the errors put in"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output"})

    def __post_init__(self):
        for name in ("updates", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"argument --{name}: expected above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Text:
    """A solution as the model knows it, and as it is read: the same, or with the step tokens of a PRM. source: for every token that
    is read the place of the last one before it, or itself, that the model knows (so a place that comes again is of one added)."""

    plain: list[int]
    read: list[int]
    source: list[int]
    step_of: list[int]  # -1: prompt


def aligned(plain: list[int], step_of: list[int], read: list[int]) -> Text:
    """Raises ValueError if `read` is not `plain` with tokens added in between."""
    source, steps, place = [], [], 0
    for index in read:
        # what is added belongs to the step that follows
        steps.append(step_of[min(place, len(plain) - 1)])
        place += place < len(plain) and plain[place] == index
        source.append(place - 1)
    if place < len(plain) or source[0] < 0:
        raise ValueError("the PRM's text is not the solution's with tokens added")
    return Text(plain, read, source, steps)


def solutions(tokenizer, seed: int) -> Iterator[Text]:
    """Reference solutions of pretraining problems; in most of them a number or two are changed; step tokens in every other one."""
    from lm.text_encoding import encode_steps
    from reasoning.problems import changed_numbers, stories
    from reward_model.prm_formats import StepTokens

    rng, tagged = random.Random(f"surprisal {seed}"), StepTokens(tokenizer)
    for number, story in enumerate(stories("pretrain")):
        problem = story.problem()
        steps = list(problem.steps)
        for _ in range(2):
            ways = list(changed_numbers(steps, rng))
            if ways and rng.random() < 0.9:
                steps = rng.choice(ways)[0]
        plain, step_of = encode_steps(tokenizer, problem.prompt, [], steps)
        read = plain
        if number % 2:
            ((read, _),) = tagged.encode([(problem.prompt, steps)])
            # a PRM reads a newline at the end, and no end-of-text token
            plain = [*plain[:-1], read[-1]]
        yield aligned(plain, step_of, read)


def build(args: SurprisalArguments, model, tokenizer) -> dict:
    """Train the layers, put them on the model. Returns figures on solutions that it was not trained on."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from tqdm import tqdm
    from transformers import get_linear_schedule_with_warmup

    from reward_model.process_reward_model import add_step_token

    torch.manual_seed(args.seed)
    add_step_token(model, tokenizer)
    texts = solutions(tokenizer, args.seed)
    body, depth, device = model.model, model.config.num_hidden_layers, model.device
    model.requires_grad_(False).eval()

    def padded(rows: list[list], fill: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=device)

    def batch() -> dict[str, Tensor]:
        """`ids` (B, L); `hidden` (B, L, H), what the model's last layer writes; `expected` (B, L, V), log-probs of the next token;
        `on` (B, L), where the tokens of solutions are; `step`, `solution` (B, L), the least log-prob of a token in it so far."""
        rows = list(itertools.islice(texts, args.batch_size))
        plain, ids = padded([row.plain for row in rows], 0), padded([row.read for row in rows], 0)
        source, step_of = (
            padded([row.source for row in rows], -1),
            padded([row.step_of for row in rows], -1),
        )
        on, added = step_of >= 0, F.pad(source[:, 1:] == source[:, :-1], (1, 0))
        source = source.clamp(min=0)[..., None]
        written: list[Tensor] = []
        with torch.no_grad():
            expected = model(plain).logits.float().log_softmax(-1)
            hook = body.norm.register_forward_pre_hook(lambda _, given: written.append(given[0]))
            body(ids, use_cache=False)
            hook.remove()
        token = F.pad(expected[:, :-1].gather(2, plain[:, 1:, None]), (0, 0, 1, 0)).gather(
            1, source
        )[..., 0]
        token = token.clamp(min=FLOOR).masked_fill(added | ~on, 0)  # what is added surprises nobody
        step = token.clone()
        for t in range(1, ids.shape[1]):
            goes_on = step_of[:, t] == step_of[:, t - 1]
            step[:, t] = torch.where(
                goes_on, torch.minimum(token[:, t], step[:, t - 1]), token[:, t]
            )
        expected = expected.gather(1, source.expand(-1, -1, expected.shape[-1]))
        return {
            "ids": ids,
            "hidden": written[0].float(),
            "expected": expected,
            "on": on,
            "step": step,
        } | {"solution": token.cummin(1).values}

    first = batch()
    # new layers learn beside numbers of size 1, and are scaled at last
    scale = first["hidden"][first["on"]].pow(2).mean().sqrt()
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # the one that shows its attention
    layers = nn.ModuleList(type(body.layers[0])(config, depth + k) for k in range(2))
    norm, heads = copy.deepcopy(body.norm), config.num_attention_heads // 2
    readers = nn.ModuleDict({name: nn.Linear(config.hidden_size, 1) for name in READ})
    for layer in layers:
        for weight in layer.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.05)
        layer.input_layernorm.weight.data.copy_(body.norm.weight)
    learned = nn.ModuleList([layers, norm, readers]).float().requires_grad_(True).to(device)
    optimizer = torch.optim.AdamW(
        learned.parameters(), lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)
    )
    schedule = get_linear_schedule_with_warmup(optimizer, args.updates // 20, args.updates)

    def losses_of(data: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden, on, length = data["hidden"] / scale, data["on"], data["hidden"].shape[1]
        positions = body.rotary_emb(hidden, torch.arange(length, device=device)[None])
        causal = torch.full((length, length), float("-inf"), device=device).triu(1)[None, None]
        attention = []
        for layer in layers:
            given = layer.input_layernorm(hidden)
            seen, weights = layer.self_attn(
                given, position_embeddings=positions, attention_mask=causal
            )
            attention.append(weights)  # (B, heads, L, L)
            hidden = hidden + seen
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        top = norm(hidden)
        # (B, L - 1): what the token before gets
        before = attention[0][:, :heads].diagonal(-1, 2, 3).mean(1)
        losses = {
            name: F.smooth_l1_loss(readers[name](top)[..., 0][on], data[name][on]) for name in READ
        }
        losses["attention"] = -ATTENTION * before[on[:, 1:]].clamp(min=1e-6).log().mean()
        losses["next"] = (
            -(data["expected"].exp() * model.lm_head(top).log_softmax(-1)).sum(-1)[on].mean()
        )
        return losses

    bar = tqdm(range(args.updates), desc="learning what surprises the model")
    for _ in bar:
        losses = losses_of(batch())
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix({name: f"{value.item():.2f}" for name, value in losses.items()})

    ends = [batch() for _ in range(CHECKED)]
    put_on(model, layers, norm, scale)
    return figures_of(model, readers, ends)


def put_on(model, layers, norm, scale) -> None:
    """Layers that learned beside the model's last hidden states divided by `scale`, and the norm behind them, become its own."""
    for layer in layers:
        layer.self_attn.o_proj.weight.data.mul_(scale)
        layer.mlp.down_proj.weight.data.mul_(scale)
        layer.self_attn.config = model.config
    model.model.layers.extend(layers.to(model.dtype))
    model.model.norm = norm.to(model.dtype)
    model.config.num_hidden_layers += len(layers)


def figures_of(model, readers, ends: list[dict]) -> dict:
    """What the finished model's top says of surprises; how far its predictions are from those of the model that it was made of."""
    import torch

    from evaluation.metrics import auroc_metric, mean_metric

    said, surprised, apart, solution_of = (
        {name: [] for name in READ},
        {name: [] for name in READ},
        [],
        [],
    )
    for number, data in enumerate(ends):
        on, expected = data["on"], data["expected"]
        with torch.no_grad():
            top = model.model(data["ids"], use_cache=False).last_hidden_state
            apart += (
                (expected.exp() * (expected - model.lm_head(top).float().log_softmax(-1)))
                .sum(-1)[on]
                .tolist()
            )
            for name in READ:
                said[name] += (-readers[name](top.float())[..., 0][on]).tolist()
                surprised[name] += (data[name][on] < -3).tolist()
        solution_of += [(number, row) for row in on.nonzero()[:, 0].tolist()]
    clusters = [
        *map({key: k for k, key in enumerate(dict.fromkeys(solution_of))}.__getitem__, solution_of)
    ]
    return {
        f"AUROC of a token that was less likely than e^-3, in the {name} so far": auroc_metric(
            surprised[name], said[name], clusters
        )
        for name in READ
    } | {"KL divergence of its predictions from the model's, nats a token": mean_metric(apart)}


def main() -> None:
    (args,) = parse_args(SurprisalArguments, description=__doc__.split("\n\n")[0])
    check_model(args.model_name_or_path)
    check_output(args.output, args.overwrite)
    from lm.policy import Policy

    policy = Policy.load(args.model_name_or_path)
    if policy.model.config.model_type != "llama":
        raise UserError(
            f"{args.model_name_or_path}: a {policy.model.config.model_type}, expected a LLaMA-type model"
        )
    figures = build(args, policy.model, policy.tokenizer)
    working = Path(args.output).with_name(Path(args.output).name + ".tmp")
    policy.model.save_pretrained(working)
    policy.tokenizer.save_pretrained(working)
    shutil.rmtree(args.output, ignore_errors=True)
    working.rename(args.output)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
