"""What a server says in an error, and what of a message nobody may read: keys and passwords."""

import html
import json
import re
from typing import Any
from urllib.parse import quote, urlsplit

from common.errors import ServerError

# keys under which servers put the words of an error, the most telling first
_WORDS = (
    "message", "msg", "error", "detail", "details", "errors", "error_message", "error_description",
    "description", "reason", "title", "fault", "faultstring",
)  # fmt: skip
_NESTED = 6  # levels of an error body that are searched
_PARAMETER = re.compile(r"[\w.\[\]-]{1,80}")

# what looks like a secret, wherever it comes from: a header, a field, a URL, a provider's key
_SECRETS = re.compile(
    r"(?P<header>\b(?:bearer|basic)\s+)(?=[\w.~+/-]*[\d_=])[\w.~+/=-]{6,}"
    r"|(?P<field>\b(?:api[-_ ]?key(?:\s+provided)?|access[-_]?token|token|secret|passw(?:or)?d"
    r"|authorization)[\"']?\s*[=:]\s*[\"']?)(?!(?:bearer|basic)\b)[^\s\"'&,;}]{3,}"
    r"|(?P<url>://)[^\s/@]{1,200}(?=@)"
    r"|\b(?:sk|pk|gsk|xai|nvapi)-[\w*.-]{6,}|\b(?:hf|gsk)_\w{10,}|\bAIza[\w-]{20,}"
    r"|\borg-\w{8,}|\bproj_\w{8,}",
    re.I,
)
HIDDEN = "[hidden]"


def check_url(name: str, url: str) -> str:
    """The host of an API's URL.

    Raises ServerError if it is no URL, or if it holds a password or a key: URLs are printed and
    written to results."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError if it is no number
    except ValueError:  # an incomplete IPv6 address too
        parts = None
    shown = _without_credentials(url)
    if shown != url:
        raise ServerError(
            f"{name} {shown}: a URL with a password or a key would end in results and logs: "
            "leave out what stands before @ or behind ?, and set OPENAI_API_KEY"
        )
    if not parts or parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ServerError(f"{name} {url!r} is no URL: expected one like http://localhost:8000/v1")
    return parts.hostname


def _without_credentials(url: str) -> str:
    """The URL without what stands before an @ of its host, behind ? and behind #."""
    url = re.sub(r"[?#].*", f"?{HIDDEN}", url, flags=re.S)
    scheme, slashes, rest = url.rpartition("://")
    return scheme + slashes + re.sub(r".*@", f"{HIDDEN}@", rest, flags=re.S)


def hide_secrets(text: str, key: str | None) -> str:
    """A message without the key, in any spelling, and without all else that looks like a secret."""
    if key and len(key) >= 4:
        for spelling in {key, json.dumps(key)[1:-1], quote(key, safe=""), repr(key)[1:-1]}:
            text = text.replace(spelling, HIDDEN)
    return _SECRETS.sub(
        lambda match: (match[match.lastgroup] if match.lastgroup else "") + HIDDEN, text
    )


def without_half_surrogates(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, so that it can be written."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# --- the body of an answer


def decode(content: bytes) -> Any:
    """The JSON value of an answer's body. Raises ValueError or RecursionError.

    A body of server-sent events gives the first of them that is an error, else the last one."""
    text = content.decode("utf-8-sig", errors="replace").strip()
    if not re.match(r"(data|event|id|retry)?:", text):
        return json.loads(text)
    lines = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    return next((event for event in events if is_error(event)), {"events": events[-1:]})


def is_error(body: Any) -> bool:
    """Whether a decoded body is an error and no completion, whatever the status says."""
    if isinstance(body, list):  # Google's form
        return len(body) == 1 and is_error(body[0])
    if not isinstance(body, dict) or body.get("choices"):
        return False
    return bool(body.get("error") or body.get("detail")) or body.get("object") == "error"


def error_words(content: bytes) -> tuple[str, str | None]:
    """The words of an error's body in one line, and the parameter that it names, if any.

    JSON in the forms of OpenAI, vLLM, TGI, FastAPI and others; of a web page the title; else the
    text itself. The words are empty for an empty body."""
    text = content[:100_000].decode("utf-8-sig", errors="replace")
    try:
        body = decode(content)
    except (ValueError, RecursionError):
        return _line(_page_title(text) if re.match(r"\s*<", text) else text), None
    return _line(_words(body, _NESTED) or text), _parameter(body, _NESTED)


def _words(value: Any, depth: int) -> str:
    if isinstance(value, str):
        return value
    if depth and isinstance(value, list):
        return "; ".join(filter(None, (_words(item, depth - 1) for item in value[:5])))
    if not depth or not isinstance(value, dict):
        return ""
    lower = {str(key).lower(): item for key, item in value.items()}
    words = next(filter(None, (_words(lower.get(key), depth - 1) for key in _WORDS)), "")
    place = lower.get("loc")  # FastAPI: ["body", "top_logprobs"]
    if words and isinstance(place, list):
        words = f"{'.'.join(str(part) for part in place[:6] if part != 'body')}: {words}"
    # OpenRouter: what the provider behind it said
    metadata = lower.get("metadata")
    behind = metadata.get("raw") if isinstance(metadata, dict) else None
    return f"{words}: {behind}" if words and isinstance(behind, str) else words


def _parameter(value: Any, depth: int) -> str | None:
    """The parameter that an error body names: `param`, or the last part of FastAPI's `loc`."""
    if depth and isinstance(value, list):
        return next(filter(None, (_parameter(item, depth - 1) for item in value[:5])), None)
    if not depth or not isinstance(value, dict):
        return None
    place = value.get("loc")
    named = place[1:2] if isinstance(place, list) and place[:1] == ["body"] else place
    found = value.get("param") or (named[0] if isinstance(named, list) and named else None)
    if isinstance(found, str) and _PARAMETER.fullmatch(found):
        return found.rpartition(".")[2]
    nested = (_parameter(value.get(key), depth - 1) for key in ("error", "detail", "message"))
    return next(filter(None, nested), None)


def _page_title(page: str) -> str:
    """The title of a web page, else its first heading, else the page itself."""
    for tag in ("title", "h1"):
        start = re.search(rf"<{tag}\b[^<>]*>", page, re.I)
        title = html.unescape(page[start.end() :].partition("<")[0]).strip() if start else ""
        if title:
            return f"a web page: {title}"
    return page


def _line(text: str) -> str:
    return " ".join(without_half_surrogates(text).split())
