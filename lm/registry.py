"""The policy that a script samples from, in this process or on a server, and its arguments.

A script mixes `PolicyArgs` into its own arguments, calls `check_policy` before any work and then
`open_policy`. reward_model/registry.py has the same functions for judges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.cli import DtypeArgs, arg, check_least, check_model
from common.errors import UserError
from common.files import at_root, identity
from common.progress import taking_long
from lm.known_words import warn_of_unknown_words
from lm.server_text import check_url

if TYPE_CHECKING:
    from lm.policy import Policy

BASE = at_root("models/policy-mini")


@dataclass
class PolicyArgs(DtypeArgs):
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


def check_policy(args: PolicyArgs) -> None:
    """Raises UserError for a mistake in the policy's arguments. Imports nothing heavy."""
    check_least(args, policy_requests=1)
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

            policy = Policy.load(args.model_name_or_path)
        warn_of_foreign_prompts(policy, args.model_name_or_path, prompts)
        return policy
    from lm.server_policy import ServerPolicy

    policy = ServerPolicy(args.policy_base_url, args.model_name_or_path, args.policy_requests)
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


def policy_identity(args: PolicyArgs) -> dict[str, str]:
    """All that changes a policy's samples, for the `job` of a run that can resume."""
    if args.policy_base_url is not None:
        return {"model": args.model_name_or_path, "policy_base_url": args.policy_base_url}
    from lm.loading import scoring_identity  # torch, as above

    return {"model": identity(args.model_name_or_path)} | scoring_identity()
