"""The policy that a script samples from, in this process or on a server, and its arguments.

A script mixes `PolicyArgs` into its own arguments, calls `check_policy` before any work and then
`open_policy`. reward_model/registry.py has the same functions for judges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from common.cli import DtypeArgs, arg, check_input, check_least, check_model
from common.errors import UserError
from common.files import at_root, open_text
from common.identity import identity
from common.progress import taking_long
from lm.known_words import warn_of_unknown_words
from lm.prompting import THINKING, Prompts, Style
from lm.server_text import check_url
from reasoning.steps import SEPARATORS, step_separator

if TYPE_CHECKING:
    from lm.policy import Policy

BASE = at_root("models/policy-mini")


@dataclass(kw_only=True)
class TemplateArgs:
    """What stands around a prompt, mixed into the arguments of a script or a training.

    If they are not given, those that the model was saved with are used."""

    system_prompt: str | None = arg(
        None, "a system message before the prompt, for a model with a chat template"
    )
    prompt_template: str | None = arg(
        None,
        "a text file with {prompt}, and examples if you like; it replaces the instruction before "
        "the prompt of a chat model, and the whole plain template of any other",
    )


@dataclass(kw_only=True)
class PromptArgs(TemplateArgs):
    """How a policy is asked and how its text becomes steps, mixed into a script's arguments."""

    step_separator: str = arg(
        "newline",
        f"what ends a step: {', '.join(SEPARATORS)} (lines that begin with `Step 2:`), or a "
        "regular expression",
    )
    thinking: str = arg(
        "off",
        "of a model that thinks first: off; keep: its thoughts are its first steps; cut: its "
        "thoughts are left out of its steps",
        choices=[*THINKING],
    )


@dataclass(kw_only=True)
class SamplingArgs(PromptArgs):
    """`PromptArgs` of a script that samples."""

    top_p: float = arg(
        1.0, "draw only the likeliest tokens that together reach this probability, above 0, up to 1"
    )
    top_k: int = arg(0, "draw only the TOP_K likeliest tokens; 0: all")


@dataclass
class PolicyArgs(SamplingArgs, DtypeArgs):
    """The arguments of all policies, mixed into those of a script."""

    model_name_or_path: str = arg(
        BASE, "the policy: any causal LM; with --policy_base_url the server's name for it"
    )
    policy_base_url: str | None = arg(
        None,
        "URL of an OpenAI-compatible completion server, http://localhost:8000/v1 "
        "(key from OPENAI_API_KEY)",
    )
    policy_requests: int = arg(16, "with --policy_base_url: the most requests at once")


def given_prompts(args: TemplateArgs) -> Prompts:
    """The prompts that the arguments name. Raises UserError for a mistake in them."""
    template = None
    if args.prompt_template is not None:
        check_input(args.prompt_template)
        with open_text(args.prompt_template, newline="") as file:
            template = file.read()
    try:
        return Prompts(args.system_prompt, template)
    except ValueError as error:
        raise UserError(f"argument --prompt_template: {args.prompt_template}: {error}") from None


def style_of(args: PromptArgs) -> Style:
    """The style that the arguments name. Raises UserError for a mistake in them."""
    try:
        separator = step_separator(args.step_separator)
    except ValueError as error:
        raise UserError(f"argument --step_separator: {error}") from None
    style = Style(separator=separator, thinking=args.thinking, prompts=given_prompts(args))
    if not isinstance(args, SamplingArgs):
        return style
    check_least(args, top_k=0)
    top_p = args.top_p if isinstance(args.top_p, float | int) else 1.0  # a script's own list
    if not 0 < top_p <= 1:
        raise UserError(f"argument --top_p: expected above 0, up to 1, got {top_p}")
    if getattr(args, "temperature", None) == 0 and (top_p < 1 or args.top_k):
        name = "top_p" if top_p < 1 else "top_k"
        raise UserError(f"argument --{name}: at --temperature 0 nothing is drawn")
    return replace(style, top_p=top_p, top_k=args.top_k)


def style_identity(args: PromptArgs) -> dict[str, Any]:
    """The settings of the style that are not the defaults, for the `job` of a run."""
    style = style_of(args)
    found = {"top_p": style.top_p, "top_k": style.top_k, "thinking": style.thinking}
    found |= {"step_separator": args.step_separator, **vars(style.prompts)}
    usual = {"top_p": 1.0, "top_k": 0, "thinking": "off", "step_separator": "newline"}
    return {name: value for name, value in found.items() if value != usual.get(name)}


def check_policy(args: PolicyArgs) -> None:
    """Raises UserError for a mistake in the policy's arguments. Imports nothing heavy."""
    check_least(args, policy_requests=1)
    style_of(args)
    if args.policy_base_url is not None:
        check_url("policy", args.policy_base_url)
    else:
        if args.policy_requests != PolicyArgs.policy_requests:
            raise UserError("argument --policy_requests: needs --policy_base_url")
        made_by = "make models-policy" if args.model_name_or_path == BASE else None
        check_model(args.model_name_or_path, made_by)


def open_policy(args: PolicyArgs, prompts: Sequence[str] = (), chat: bool = False) -> "Policy":
    """The policy that the arguments name. chat: it will answer chats.

    prompts: what it will answer; a warning is printed if it does not know their words. Raises
    ModelError if it cannot be opened."""
    # torch, transformers and openai would slow --help
    if args.policy_base_url is None:
        with taking_long(f"loading {args.model_name_or_path}"):
            from lm.policy import Policy

            policy = Policy.load(args.model_name_or_path, style_of(args))
        warn_of_foreign_prompts(policy, args.model_name_or_path, prompts)
        return policy
    from lm.server_policy import ServerPolicy

    url, model = args.policy_base_url, args.model_name_or_path
    policy = ServerPolicy(url, model, args.policy_requests, style=style_of(args))
    # one token, so that a server that cannot be used is found before any work
    with taking_long(f"waiting for {args.policy_base_url}"):
        policy.texts(["2 + 3 = ?"], max_new_tokens=1, chat=chat)
    return policy


def warn_of_foreign_prompts(
    policy: "Policy", model: str, prompts: Sequence[str], flag: str = "--model_name_or_path"
) -> None:
    """Warn on stderr if a policy does not know the words of its prompts; flag: that names it."""
    advice = f"name a model that has learned such text, {flag} MODEL"
    warn_of_unknown_words(policy.count_tokens, f"policy {model}", prompts, advice)


def policy_identity(args: PolicyArgs) -> dict[str, Any]:
    """All that changes a policy's samples, for the `job` of a run that can resume."""
    style = style_identity(args)
    if args.policy_base_url is not None:
        return {"model": args.model_name_or_path, "policy_base_url": args.policy_base_url} | style
    from lm.loading import scoring_identity  # torch, as above

    return {"model": identity(args.model_name_or_path)} | scoring_identity() | style
