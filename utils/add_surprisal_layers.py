"""Put two layers on a causal LM that know how surprising tokens are: a backbone for judges.

    python utils/add_surprisal_layers.py --output saved_model/policy_surprisal

A model that can do arithmetic expects the right digit, but a judge made of it does not see a wrong
one. The model's expectation is in its last layer at the token before, and no layer is left that
could compare it with the token that follows. New layers do not learn this comparison from labels,
because their heads would first have to find the token before (docs/LOG.md). Here they learn it
without labels and with the model frozen, on solutions in which some numbers were changed; half of
the solutions are written as a PRM reads them. The loss has three parts:

1. half of the heads of the first new layer attend to the token before: -log of that attention
2. two linear maps of the top give the least log p(x_t | x_<t) in the step so far and in the
   solution so far: smooth L1, for values from FLOOR to 0
3. the model predicts the next token as before: cross-entropy to its former distribution

The linear maps are not saved. The result is a plain LLaMA and a causal LM as before, for train.py
prm and train.py reward."""

import copy
import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_model, check_output, parse_args, run
from common.errors import UserError
from common.files import at_root
from common.outputs import replacing_folder
from common.progress import Bar
from evaluation.metrics import auroc_metric, mean_metric
from lm.text_encoding import encode_steps
from reasoning.problems import changed_numbers, stories

FLOOR = -8.0  # nats: lower log-probs are raised to this value
ATTENTION_WEIGHT = 0.3  # of part 1 of the loss; the others have weight 1
TARGETS = ("step", "solution")
CHECK_BATCHES = 20  # for the figures at the end
SURPRISING = -3  # nats: a token with a lower log-prob counts as surprising in these figures


@dataclass
class SurprisalArguments:
    model_name_or_path: str = arg(
        at_root("models/policy-mini"), "a LLaMA-type causal LM: a directory or a hub name"
    )
    output: str = arg(
        at_root("saved_model/policy_surprisal"), "folder of the model with two more layers"
    )
    updates: int = arg(1500, "optimizer steps")
    batch_size: int = arg(16, "solutions an update: of pretraining problems, each once")
    learning_rate: float = arg(2e-3, "peak learning rate of AdamW, decayed linearly to 0")
    seed: int = arg(0, "seed of the new weights and of the changed numbers")
    overwrite: bool = arg(False, "replace the output")

    def __post_init__(self):
        for name in ("updates", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"argument --{name}: expected above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Text:
    """A solution in two tokenizations, which are equal or differ by the step tokens of a PRM.

    plain: the ids that the frozen model knows. read: the ids that the new layers read. source: for
    every id of `read` the place in `plain` of the same id, or of the last one before an added id.
    step_of: the step of every id of `read`, -1 in the prompt."""

    plain: list[int]
    read: list[int]
    source: list[int]
    step_of: list[int]


def aligned(plain: list[int], step_of: list[int], read: list[int]) -> Text:
    """The Text of a solution. Raises ValueError if `read` is not `plain` with added ids."""
    source, steps, place = [], [], 0
    for index in read:
        # an added id belongs to the step that follows it
        steps.append(step_of[min(place, len(plain) - 1)])
        place += place < len(plain) and plain[place] == index
        source.append(place - 1)
    if place < len(plain) or source[0] < 0:
        raise ValueError("the PRM's text is not the solution's with tokens added")
    return Text(plain, read, source, steps)


def solutions(tokenizer: Any, seed: int) -> Iterator[Text]:
    """Solutions of pretraining problems, most with changed numbers, half with step tokens."""
    from reward_model.prm_formats import StepTokens  # heavy: torch would slow --help

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
            # a PRM's text ends with a newline instead of EOS
            plain = [*plain[:-1], read[-1]]
        yield aligned(plain, step_of, read)


def build(args: SurprisalArguments, model: Any, tokenizer: Any) -> dict:
    """Train two layers and put them on the model. Returns Metrics on other solutions."""
    # heavy: torch and transformers would slow --help
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
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

    def next_batch() -> dict[str, Tensor]:
        """The inputs and targets of the next solutions.

        `ids` (B, L); `hidden` (B, L, H), the output of the model's last layer; `expected` (B, L,
        V), the log-probs of the next token; `on` (B, L), true at the tokens of solutions; `step`,
        `solution` (B, L), the least log-prob of a token so far."""
        rows = list(itertools.islice(texts, args.batch_size))
        plain, ids = padded([row.plain for row in rows], 0), padded([row.read for row in rows], 0)
        source = padded([row.source for row in rows], -1)
        step_of = padded([row.step_of for row in rows], -1)
        on, added = step_of >= 0, F.pad(source[:, 1:] == source[:, :-1], (1, 0))
        source = source.clamp(min=0)[..., None]
        hidden: list[Tensor] = []
        with torch.no_grad():
            expected = model(plain).logits.float().log_softmax(-1)
            hook = body.norm.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
            body(ids, use_cache=False)
            hook.remove()
        token = F.pad(expected[:, :-1].gather(2, plain[:, 1:, None]), (0, 0, 1, 0))
        token = token.gather(1, source)[..., 0].clamp(min=FLOOR)
        token = token.masked_fill(added | ~on, 0)  # added tokens and the prompt are not surprising
        step = token.clone()
        for t in range(1, ids.shape[1]):
            same_step = step_of[:, t] == step_of[:, t - 1]
            least = torch.minimum(token[:, t], step[:, t - 1])
            step[:, t] = torch.where(same_step, least, token[:, t])
        return {
            "ids": ids,
            "hidden": hidden[0].float(),
            "expected": expected.gather(1, source.expand(-1, -1, expected.shape[-1])),
            "on": on,
            "step": step,
            "solution": token.cummin(1).values,
        }

    first = next_batch()
    # the new layers learn on hidden states of size 1 and are rescaled at the end
    scale = first["hidden"][first["on"]].pow(2).mean().sqrt()
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # the one that returns its attention
    layers = nn.ModuleList(type(body.layers[0])(config, depth + k) for k in range(2))
    norm, heads = copy.deepcopy(body.norm), config.num_attention_heads // 2
    readers = nn.ModuleDict({name: nn.Linear(config.hidden_size, 1) for name in TARGETS})
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

    def batch_losses(data: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden, on, length = data["hidden"] / scale, data["on"], data["hidden"].shape[1]
        positions = body.rotary_emb(hidden, torch.arange(length, device=device)[None])
        causal = torch.full((length, length), float("-inf"), device=device).triu(1)[None, None]
        inputs = {"position_embeddings": positions, "attention_mask": causal}
        attention = []
        for layer in layers:
            attended, weights = layer.self_attn(layer.input_layernorm(hidden), **inputs)
            attention.append(weights)  # (B, heads, L, L)
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        top = norm(hidden)
        losses = {
            name: F.smooth_l1_loss(readers[name](top)[..., 0][on], data[name][on])
            for name in TARGETS
        }
        # (B, L - 1): the attention to the token before
        before = attention[0][:, :heads].diagonal(-1, 2, 3).mean(1)
        losses["attention"] = -ATTENTION_WEIGHT * before[on[:, 1:]].clamp(min=1e-6).log().mean()
        logps = model.lm_head(top).log_softmax(-1)
        losses["next"] = -(data["expected"].exp() * logps).sum(-1)[on].mean()
        return losses

    bar = Bar(range(args.updates), desc="learning how surprising tokens are", unit="update")
    for _ in bar:
        losses = batch_losses(next_batch())
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix({name: f"{value.item():.2f}" for name, value in losses.items()})

    check_batches = [next_batch() for _ in range(CHECK_BATCHES)]
    put_on(model, layers, norm, scale)
    return figures_of(model, readers, check_batches)


def put_on(model: Any, layers: Any, norm: Any, scale: Any) -> None:
    """Add layers, and the norm behind them, to the model.

    They were trained on the model's last hidden states divided by `scale`."""
    for layer in layers:
        layer.self_attn.o_proj.weight.data.mul_(scale)
        layer.mlp.down_proj.weight.data.mul_(scale)
        layer.self_attn.config = model.config
    model.model.layers.extend(layers.to(model.dtype))
    model.model.norm = norm.to(model.dtype)
    model.config.num_hidden_layers += len(layers)


def figures_of(model: Any, readers: Any, batches: list[dict]) -> dict:
    """Metrics of the finished model.

    They show how well its top ranks surprising tokens, and how far its predictions are from those
    of the former model."""
    import torch  # heavy: would slow --help

    scores: dict[str, list[float]] = {name: [] for name in TARGETS}
    labels: dict[str, list[bool]] = {name: [] for name in TARGETS}
    divergences, clusters = [], []
    for number, data in enumerate(batches):
        on, expected = data["on"], data["expected"]
        with torch.no_grad():
            top = model.model(data["ids"], use_cache=False).last_hidden_state
            logps = model.lm_head(top).float().log_softmax(-1)
            divergences += (expected.exp() * (expected - logps)).sum(-1)[on].tolist()
            for name in TARGETS:
                scores[name] += (-readers[name](top.float())[..., 0][on]).tolist()
                labels[name] += (data[name][on] < SURPRISING).tolist()
        clusters += [number * len(on) + row for row in on.nonzero()[:, 0].tolist()]
    figures = {}
    for name in TARGETS:
        label = f"AUROC of a token that was less likely than e^{SURPRISING}, in the {name} so far"
        figures[label] = auroc_metric(labels[name], scores[name], clusters)
    label = "KL divergence of its predictions from the model's, nats a token"
    return figures | {label: mean_metric(divergences)}


def main() -> None:
    (args,) = parse_args(SurprisalArguments, description=__doc__.split("\n\n")[0])
    check_model(args.model_name_or_path)
    check_output(args.output, args.overwrite, [args.model_name_or_path], folder=True)
    # heavy: torch and transformers would slow --help
    from lm.policy import Policy

    policy = Policy.load(args.model_name_or_path)
    model_type = policy.model.config.model_type
    if model_type != "llama":
        raise UserError(
            f"{args.model_name_or_path}: a {model_type} model, expected a LLaMA-type model"
        )
    figures = build(args, policy.model, policy.tokenizer)
    with replacing_folder(args.output) as folder:
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
