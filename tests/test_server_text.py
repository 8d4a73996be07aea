"""What servers say in errors, what they refuse, and what of it may be shown."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ServerError
from common.terminal import printable
from evaluation.results import print_table
from lm.refusals import remedy
from lm.server_text import check_url, decode, error_words, hide_secrets

CHAT = {"model": "m", "messages": [], "max_tokens": 8, "temperature": 0, "logprobs": True,
        "top_logprobs": 20}  # fmt: skip
TEXT = {"model": "m", "prompt": "", "max_tokens": 8, "temperature": 0, "logprobs": 5}
SAMPLE = {"model": "m", "prompt": "", "max_tokens": 8, "temperature": 1, "seed": 3, "top_p": 1,
          "stop": ["\n"]}  # fmt: skip

# --- errors

BODIES = [  # the body of an error -> its words
    ({"error": {"message": "no such model", "type": "x", "param": None}}, "no such model"),
    ({"error": "model not found"}, "model not found"),
    ({"error": "Input validation error: too big", "error_type": "validation"},
     "Input validation error: too big"),
    ({"object": "error", "message": "bad", "type": "BadRequestError", "code": 400}, "bad"),
    ({"message": "Forbidden"}, "Forbidden"),
    ({"Message": "Forbidden"}, "Forbidden"),
    ({"detail": "Not Found"}, "Not Found"),
    ({"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs", "type": "x"}]},
     "seed: Extra inputs"),
    ({"object": "error", "message": {"detail": [{"loc": ["body", "n"], "msg": "bad"}]}}, "n: bad"),
    ({"errors": [{"code": 7, "message": "blocked"}, {"message": "twice"}]}, "blocked; twice"),
    ([{"error": {"code": 400, "message": "key not valid", "status": "X"}}], "key not valid"),
    ({"type": "error", "error": {"type": "overloaded", "message": "Overloaded"}}, "Overloaded"),
    ({"error": {"message": "Provider returned error", "metadata": {"raw": "too hot"}}},
     "Provider returned error: too hot"),
    ({"title": "Bad Request", "detail": "seed is unknown", "status": 400}, "seed is unknown"),
    ({"fault": {"faultstring": "Quota"}}, "Quota"),
    ({"code": 3}, '{"code": 3}'),
    ("just a text", "just a text"),
    ([], "[]"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), BODIES)
def test_the_words_of_an_error(body, words):
    assert error_words(json.dumps(body).encode())[0] == words
    assert error_words(b"\xef\xbb\xbf" + json.dumps(body).encode())[0] == words


def test_errors_that_are_no_json():
    for content, words in [
        (b"upstream\r\n connect error ", "upstream connect error"),
        (b"<html>\n<head><title>502 Bad &amp; gateway</title>", "a web page: 502 Bad & gateway"),
        (b"<!DOCTYPE html><h1 class='x'>Sorry</h1><p>" + b"x" * 10**6, "a web page: Sorry"),
        (b"<title></title><b>no title", "<title></title><b>no title"),
        (b"", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b'{"error": {"message": "half \\ud83d"}}', "half \ufffd"),
        (b'data: {"error": {"message": "crashed"}}\n\ndata: [DONE]\n\n', "crashed"),
        (b'event: error\r\ndata: {"message": "m"}\r\n', "data: {"),
        (b"[" * 10**5, "["),
    ]:
        found = error_words(content)[0]
        assert found == words or (len(words) > 0 and words in found and found != "")


@pytest.mark.property
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode()))
def test_any_bytes_have_words_of_one_line(content):
    words, _ = error_words(content)
    assert "\n" not in words
    hide_secrets(words, "sk-secret").encode()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "message", "detail", "loc", "msg", "param", "choices", "metadata"]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.property
@given(JSON_VALUES, st.sampled_from([CHAT, TEXT, SAMPLE]))
def test_any_json_has_words_and_a_remedy_or_none(value, body):
    words, parameter = error_words(json.dumps(value).encode())
    change = remedy(body, f"{words} max_tokens logprobs", parameter)
    if change:
        change.apply(body)


# --- refusals: a body, the words, and what changes in the body (None: nothing can)

REFUSALS = [
    (CHAT, "Invalid value for 'top_logprobs': must be less than or equal to 5.",
     {"top_logprobs": 5}),
    (CHAT, "Requested sample logprobs of 20, which is greater than max allowed: 5",
     {"top_logprobs": 5}),
    (CHAT, "`top_n_tokens` must be >= 0 and <= 5. Given: 20", {"top_logprobs": 5}),
    (CHAT, "top_logprobs should be between 0 and 10", {"top_logprobs": 10}),
    (CHAT, "Cannot request more than 5 logprobs.", {"top_logprobs": 5}),
    (CHAT, "top_logprobs: Input should be less than or equal to 8", {"top_logprobs": 8}),
    (CHAT, "This model (gpt-4o) supports at most 11 top_logprobs", {"top_logprobs": 11}),
    (CHAT, "Invalid top_logprobs value", {"top_logprobs": 10}),  # no number: step by step
    (CHAT | {"top_logprobs": 10}, "top_logprobs is too large", {"top_logprobs": 5}),
    (CHAT, "logprobs: Input should be a valid integer", {"logprobs": 20, "top_logprobs": None}),
    (CHAT, "cannot unmarshal bool into Go struct field .logprobs of type int",
     {"logprobs": 20, "top_logprobs": None}),
    (CHAT, "Unsupported parameter: 'top_logprobs'", {"logprobs": 20, "top_logprobs": None}),
    (TEXT, "logprobs: Input should be a valid boolean", {"logprobs": True, "top_logprobs": 5}),
    (TEXT, "invalid type: integer `5`, expected a boolean (logprobs)",
     {"logprobs": True, "top_logprobs": 5}),
    (TEXT, "logprobs: 5 is above the limit 3", {"logprobs": 3}),
    (CHAT, "logprobs are not supported by this model", "gives no logprobs"),
    (CHAT, "This model does not support log probabilities", "gives no logprobs"),
    (CHAT, "`top_n_tokens` != 0 is not allowed for this endpoint",
     {"logprobs": 20, "top_logprobs": None}),
    (TEXT, "5 is greater than the maximum of 1 - 'logprobs'", "gives log-probs of one token only"),
    (CHAT, "Unsupported parameter: 'max_tokens' is not supported with this model. "
     "Use 'max_completion_tokens' instead.", {"max_tokens": None, "max_completion_tokens": 8}),
    (CHAT, "Invalid 'max_tokens': integer below minimum value. Expected a value >= 16, but got 8",
     {"max_tokens": 16}),
    (CHAT | {"max_tokens": 2048}, "max_tokens is too large: 2048. This model supports at most 512 "
     "completion tokens, whereas you provided 2048.", {"max_tokens": 512}),
    (TEXT | {"max_tokens": 2048}, "`max_new_tokens` must be <= 1024. Given: 2048",
     {"max_tokens": 1024}),
    (CHAT, "Unsupported value: 'temperature' does not support 0 with this model. Only the default "
     "(1) value is supported.", {"temperature": None}),
    (SAMPLE, "`temperature` must be strictly positive", {"temperature": None}),
    (SAMPLE, "Unrecognized request argument supplied: seed", {"seed": None}),
    (SAMPLE, "property 'seed' is unsupported", {"seed": None}),
    (SAMPLE, "stop: Extra inputs are not permitted", {"stop": None}),
    (SAMPLE, "`top_p` must be > 0.0 and < 1.0", {"top_p": None}),
    (SAMPLE, "messages: Field required", None),
    (SAMPLE, "the content was filtered", None),
    (SAMPLE, "the model does not exist", None),
    (SAMPLE, "", None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words", "expected"), REFUSALS)
def test_what_is_asked_instead(body, words, expected):
    change = remedy(body, words, None)
    if expected is None:
        assert change is None
    elif isinstance(expected, str):
        assert change.gives_up and change.words == expected
    else:
        wanted = {key: value for key, value in (body | expected).items() if value is not None}
        assert change.apply(body) == wanted
        assert "\n" not in change.words


def test_a_limit_leaves_smaller_numbers_alone():
    long, short = CHAT | {"max_tokens": 2048}, CHAT | {"max_tokens": 8}
    most = remedy(long, "max_tokens must be at most 512", None)
    assert most.apply(long)["max_tokens"] == 512 and most.apply(short)["max_tokens"] == 8
    least = remedy(short, "max_tokens must be at least 16", None)
    assert least.apply(long)["max_tokens"] == 2048 and least.apply(short)["max_tokens"] == 16


def test_the_parameter_that_an_error_names_counts_more_than_its_words():
    words = "seed and stop are wrong"
    assert "top_p" in remedy(SAMPLE, words, "top_p").words
    assert remedy(SAMPLE, words, "messages") is None
    for body, name in [
        ({"error": {"message": "m", "param": "top_p"}}, "top_p"),
        ({"detail": [{"loc": ["body", "top_p"], "msg": "m"}]}, "top_p"),
        ({"error": {"message": "m", "param": None}}, None),
        ({"detail": "m"}, None),
    ]:
        assert error_words(json.dumps(body).encode())[1] == name


# --- secrets

KEY = "sk-proj-Abc123/x+y=="


@pytest.mark.parametrize(
    "text",
    [
        f"Incorrect API key provided: {KEY}.",
        f"header Authorization: Bearer {KEY}",
        json.dumps({"headers": {"authorization": f"Bearer {KEY}"}}),
        "bad key sk-proj-Abc123%2Fx%2By%3D%3D in the query",
        f"{KEY}{KEY}{KEY}",
        f"got '{KEY!r}'",
    ],
)
def test_the_key_is_hidden(text):
    shown = hide_secrets(text, KEY)
    assert "Abc123" not in shown and "[hidden]" in shown


def test_other_secrets_are_hidden_and_words_are_not():
    for text in (
        "http://ann:passw0rd@host/v1 is down",
        "Authorization: Basic YW5uOnBhc3N3MHJk",
        "GET /v1?api_key=passw0rd&x=1",
        "api-key: passw0rd",
        '{"x-api-key": "passw0rd"}',
        "password=passw0rd",
        "Incorrect API key provided: passw0rd",
        "hf_passw0rdpassw0rd, gsk_passw0rdpassw0rd",
    ):
        shown = hide_secrets(text, None)
        assert "passw0rd" not in shown and "YW5u" not in shown, shown
    for text in (
        "max_tokens: 4096 tokens, token limit exceeded",
        "basic authentication is needed, set a bearer token",
        "Set OPENAI_API_KEY to a key; the model hf-internal-testing/tiny is not found",
        "http://localhost:8000/v1: 404",
    ):
        assert hide_secrets(text, None) == text
        assert hide_secrets(text, "x") == text  # a placeholder


def test_urls():
    for url in (
        "http://localhost:8000/v1",
        "https://api.example.com/openai/v1/",
        "http://[::1]:8/v1",
    ):
        assert check_url("judge", url)
    for url in (
        "http://ann:passw0rd@host/v1",
        "http://passw0rd@host/v1",
        "ann:passw0rd@host/v1",
        "http://ann:pass/passw0rd@host/v1",
        "http://host/v1?api_key=passw0rd",
        "http://host/v1#passw0rd",
        "http://ann:passw0rd@[host/v1",
    ):
        with pytest.raises(ServerError, match="OPENAI_API_KEY") as raised:
            check_url("judge", url)
        assert "passw0rd" not in str(raised.value) and "\n" not in str(raised.value)
    for url in ("host:8000", "ftp://host/v1", "http://", "http://host:0/v1", "http://[half", ""):
        with pytest.raises(ServerError, match="is no URL"):
            check_url("judge", url)


def test_a_stream_of_events():
    chunks = b'data: {"a": 1}\n\ndata: {"b": 2}\n\ndata: [DONE]\n'
    assert decode(chunks) == {"events": [{"b": 2}]}
    assert decode(b"\xef\xbb\xbf[1]") == [1]


# --- the terminal


def test_control_characters_are_printed_as_escapes():
    assert printable("a\tb\nc é ✓ 👩‍👧 עברית") == "a\tb\nc é ✓ 👩‍👧 עברית"
    for text, shown in [
        ("\x1b]52;c;ZWNobw==\x07", r"\x1b]52;c;ZWNobw==\x07"),
        ("\x1b[2J\x1b[31mred", r"\x1b[2J\x1b[31mred"),
        ("48\rAnswer: 49", r"48\rAnswer: 49"),
        ("12\b\b13", r"12\x08\x0813"),
        ("\x9b2J\x85\x00\x7f", r"\x9b2J\x85\x00\x7f"),
        ("\u202egnp.exe\u2066\u200f", r"\u202egnp.exe\u2066\u200f"),
        ("a\u2028b\ud83d", r"a\u2028b\ud83d"),
        ("line\r\nline", "line\nline"),
    ]:
        assert printable(text) == shown


def test_tables_are_printed_without_them(capsys):
    print_table("a \x1b[31mtitle", ["name"], [["cell \x1b[2J\u202e"]])
    out = capsys.readouterr().out
    assert "\\x1b[31mtitle" in out and "cell \\x1b[2J\\u202e" in out and "\x1b" not in out


@pytest.mark.property
@given(st.text(alphabet=st.characters(), max_size=30))
def test_whatever_is_printable_stays_so(text):
    shown = printable(text)
    assert printable(shown) == shown
    control = {*map(chr, range(32)), *map(chr, range(127, 160))} - {"\t", "\n"}
    assert not control & {*shown}
