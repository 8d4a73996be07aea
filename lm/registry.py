"""The policy a script samples, here or on a server, and its arguments: `check_policy` before any work, then `open_policy`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.cli import check_model
from common.errors import UserError
from common.files import at_root, content_hash

if TYPE_CHECKING:
    from lm.policy import Policy

BASE = at_root("models/policy-mini")


@dataclass
class PolicyArgs:
    """Mixed into a script's own arguments."""

    model_name_or_path: str = field(
        default=BASE,
        metadata={
            "help": "the policy: any causal LM; with --policy_base_url the name by which the server knows it"
        },
    )
    policy_base_url: str | None = field(
        default=None,
        metadata={
            "help": "URL of an OpenAI-compatible completion server, http://localhost:8000/v1 (key from OPENAI_API_KEY)"
        },
    )
    policy_requests: int = field(
        default=16, metadata={"help": "with --policy_base_url: most requests at once"}
    )


def check_policy(args: PolicyArgs) -> None:
    """Raises UserError for a mistake in the policy's arguments, before anything heavy is imported."""
    if args.policy_requests < 1:
        raise UserError(
            f"argument --policy_requests: expected 1 or more, got {args.policy_requests}"
        )
    if args.policy_base_url is None:
        if args.policy_requests != PolicyArgs.policy_requests:
            raise UserError("argument --policy_requests: goes with --policy_base_url")
        check_model(
            args.model_name_or_path, "make models" if args.model_name_or_path == BASE else None
        )


def open_policy(args: PolicyArgs, chat: bool = False) -> "Policy":
    """The policy that the arguments name. chat: it is to answer chats. Raises ModelError if it cannot be opened."""
    if args.policy_base_url is None:
        from lm.policy import Policy

        return Policy.load(args.model_name_or_path)
    from lm.server_policy import RemotePolicy

    policy = RemotePolicy(args.policy_base_url, args.model_name_or_path, args.policy_requests)
    # a server that cannot be used is found before the work begins
    policy.texts(["2 + 3 = ?"], max_new_tokens=1, chat=chat)
    return policy


def policy_identity(args: PolicyArgs) -> dict:
    """All that changes a policy's samples, for the `job` of ResumableRows."""
    identity = {"model": content_hash(args.model_name_or_path) or args.model_name_or_path}
    return identity | ({"policy_base_url": args.policy_base_url} if args.policy_base_url else {})
