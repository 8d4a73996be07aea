"""The one loader of models and tokenizers, which makes all checks.

It refuses a model whose weights are incomplete or not safetensors and, unless `trust_remote_code`
is given, a model that only its own code can run. Every call of transformers says so explicitly:
where it says nothing, transformers asks on the terminal and runs the code after a "y"."""

import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import disable_progress_bars
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)

from common.cli import DTYPE_VARIABLE, DTYPES, warn
from common.errors import ModelError, UserError, first_line, short
from common.progress import taking_long

# Loading and saving weights takes seconds and shows no bars; downloads do, on a terminal.
with disable_progress_bars():  # transformers turns off both
    transformers.logging.disable_progress_bar()

# the errors known to be raised by the libraries for a folder that is no model
LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError)

# The dtype of `scoring_device` on a CPU with instructions for bf16; `load_weights` knows the size
BF16_IF_LARGE = "bfloat16 if large"
# Bytes of stored weights. Smaller models are fast enough in float32, and their samples are then the
# same on CPUs with and without these instructions.
LARGE = 64 << 20


def pick_device() -> tuple[str, bool]:
    """(device, bf16) for training on this machine.

    On a CPU with instructions for bf16, training in bf16 is 1.5 times faster than in float32;
    without them it is 3.5 times slower. So bf16 is used only on a CPU that has them."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    return "cpu", _cpu_has_bf16()


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def scoring_device(device: str | None = None) -> tuple[str, torch.dtype | str]:
    """(device, dtype for `load_weights`) for scoring and sampling; by default the GPU if there is
    one.

    The dtype is that of `--dtype` if it was given. Else it is that of the stored weights ("auto")
    on a GPU, and float32 on a CPU, but bf16 for large models if the CPU has instructions for it.
    Raises UserError for a value of the environment variable that is no dtype."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = os.environ.get(DTYPE_VARIABLE, "auto")
    if given not in DTYPES:
        expected = ", ".join(DTYPES)
        raise UserError(f"variable {DTYPE_VARIABLE}: expected one of {expected}, got {given}")
    if given != "auto":
        return device, getattr(torch, given)
    if device != "cpu":
        return device, "auto"
    return device, BF16_IF_LARGE if _cpu_has_bf16() else torch.float32


def scoring_identity() -> dict[str, str]:
    """What of the dtype changes samples and scores, for the `job` of a run that can resume.

    Nothing for float32 on a CPU and for the stored dtype on a GPU."""
    found = scoring_device()
    return {} if found[1] == "auto" or found == ("cpu", torch.float32) else {"dtype": str(found[1])}


def in_one_dtype(model: Any, device: str) -> Any:
    """The model on a device, all its weights in its dtype: PEFT keeps trained ones in float32.

    Buffers keep their dtype: in bf16 the frequencies of rotary positions would be wrong."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(model.dtype)
    return model.to(device)


def _is_large(path: str | Path, gguf_file: str | None = None, revision: str | None = None) -> bool:
    """Whether the stored weights of a model have at least LARGE bytes."""
    files: Iterable[Path]
    if Path(path).is_dir():
        files = Path(path).glob(gguf_file or "*.safetensors")
    else:
        options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        if cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **options):
            return True  # only large models have several files
        found = cached_file(path, SAFE_WEIGHTS_NAME, **options)
        files = [Path(found)] if found else []
    return sum(file.stat().st_size for file in files) >= LARGE


def base_of(path: str, revision: str | None = None) -> tuple[str, bool]:
    """(path of the base model, True) for a PEFT adapter, (path, False) for any other model.

    Raises ValueError if the adapter names no base."""
    adapter = find_adapter_config_file(path, revision=revision)
    if adapter is None:
        return path, False
    base = json.loads(Path(adapter).read_text("utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError("its adapter_config.json names no base_model_name_or_path")
    return base, True


def check_safetensors(path: str | Path, revision: str | None = None) -> None:
    """Raises ValueError unless the weights of a model are safetensors in its own folder.

    Other files with weights are pickles, which can run code. transformers reads one if it stands in
    the index of a sharded model, if config.json names it, or if it is an adapter's."""
    folder = Path(path)
    if find_adapter_config_file(path, revision=revision) is not None:
        raise ValueError("the base is an adapter too, expected a whole model")
    named = PreTrainedConfig.get_config_dict(path, revision=revision)[0].get("transformers_weights")
    if folder.is_dir() and not named and not any(folder.glob("*.safetensors*")):
        raise ValueError("it has no weights in safetensors, and no others are read")
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    files = [named] if named else []
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **options)
    if str(named).endswith(".index.json"):
        files, index = [], cached_file(path, named, **options)
    if index is not None:
        files += set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values())
    for name in files:
        if Path(str(name)).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"it names {short(str(name))}, expected safetensors in its own folder")


def load_weights(
    model_class: Any,
    path: str | Path,
    may_miss: Callable[[Any, str], bool] = lambda model, key: False,
    trust_remote_code: bool = False,
    *,
    dtype: torch.dtype | str = "auto",
    **options: Any,
) -> Any:
    """model_class.from_pretrained, from safetensors or a GGUF file only; no weight may be missing.

    dtype: one of torch's, "auto" for that of the stored weights, or that of `scoring_device`.
    may_miss(model, key): whether this weight may be missing; it is then initialized at random.
    Raises ValueError if another weight is missing, and the errors of transformers."""
    if "gguf_file" not in options:
        check_safetensors(path, options.get("revision"))
    if dtype == BF16_IF_LARGE:
        is_large = _is_large(path, options.get("gguf_file"), options.get("revision"))
        dtype = torch.bfloat16 if is_large else torch.float32
    model, loading = model_class.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **options,
    )
    missing = [key for key in loading["missing_keys"] if not may_miss(model, key)]
    if missing:
        raise ValueError(f"weights are missing, for example {min(missing)}")
    return model


def check_adapter(path: str, revision: str | None = None) -> None:
    """Raises ValueError unless the weights of an adapter are safetensors."""
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if cached_file(path, "adapter_model.safetensors", **options) is None:
        raise ValueError("adapter_model.safetensors is missing, and no other weights are read")


def load_adapter(
    model: Any, path: str, trainable: bool = False, revision: str | None = None
) -> Any:
    """The PEFT adapter at `path` on its loaded base. trainable: it is loaded to be trained.

    Raises ValueError if part of the adapter is missing, or if it is not a LoRA-like adapter."""
    check_adapter(path, revision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # PEFT only warns, and initializes the missing weights at random
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            model = PeftModel.from_pretrained(
                model, path, is_trainable=trainable, revision=revision
            )
        except UserWarning as warning:
            raise ValueError(str(warning)) from None
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(f"its adapter is of the type {kind}, expected LoRA or a similar type")
    return model


def merge_adapter(model: Any, dtype: torch.dtype | None = None) -> Any:
    """The model with its adapter merged into the base, in `dtype`, all weights trainable.

    A model without an adapter is returned unchanged."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload().to(dtype).requires_grad_(True)  # PEFT froze the base
    return model


def load_tokenizer(
    path: str | Path, base: str | None = None, trust_remote_code: bool = False, **options: Any
) -> Any:
    """The tokenizer at `path`, or that of the base if an adapter has none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError):
        if base in (None, path):
            raise
        return AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)


def check_embeddings(tokenizer: Any, model: Any) -> None:
    """Raises ValueError if a text can have tokens for which the model has no embedding.

    Prints a warning if many embeddings have no token."""
    rows = model.get_input_embeddings().weight.shape[0]
    written = (tokenizer.bos_token or "") + str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder
    beyond = [item for item in tokenizer.get_vocab().items() if item[1] >= rows]
    for token, index in beyond:
        # a special token that nothing writes cannot get into a text
        if not (index in added and added[index].special and token not in written):
            raise ValueError(
                f"the tokenizer does not fit the model: the id of its token {token!r} is {index}, "
                f"but the model has only {rows} embeddings"
            )
    if len(tokenizer) < 0.9 * rows:
        warn(
            f"the tokenizer has {len(tokenizer)} tokens, the model has {rows} embeddings: "
            "do they belong together?"
        )


def fit_tokenizer(tokenizer: Any, model: Any) -> Any:
    """The tokenizer, checked and repaired for its causal LM, which may be on the meta device.

    An EOS that is missing, or has no embedding, is taken from generation_config.json or
    config.json. A padding token without an embedding becomes EOS. Raises ValueError for a tokenizer
    that is not a fast one, that has tokens without an embedding, or that drops line breaks."""
    if not tokenizer.is_fast:
        raise ValueError("it has no fast tokenizer (tokenizer.json)")
    check_embeddings(tokenizer, model)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token is None or tokenizer.eos_token_id >= rows:
        tokenizer.eos_token = None
        sources = (model.generation_config, model.config.get_text_config())
        found = [getattr(source, "eos_token_id", None) for source in sources]
        for end in (ids[0] if isinstance(ids, list) and ids else ids for ids in found):
            if isinstance(end, int) and 0 <= end < min(rows, len(tokenizer)):
                tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
                break
    if (tokenizer.pad_token_id or 0) >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    line_break = tokenizer("a\nb", add_special_tokens=False)["input_ids"]
    if "\n" not in tokenizer.decode(line_break):
        raise ValueError("its tokenizer drops line breaks, which end the steps")
    return tokenizer


def load_model(
    path: str,
    dtype: torch.dtype | str,
    trainable: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a directory or a hub name: a causal LM, or a LoRA-like adapter.

    A model with an adapter is a PeftModel, not merged: a merge into 16-bit weights would round
    small updates away (see `merge_adapter`, best used in float32). trainable: an adapter is loaded
    to be trained. revision: of the model that is named, not of an adapter's base. Raises ModelError
    if the model cannot be loaded completely."""
    base = path
    try:
        base, is_adapter = base_of(path, revision)
        hub: dict[str, Any] = {
            "revision": None if is_adapter else revision,
            "trust_remote_code": trust_remote_code,
        }
        with taking_long(f"loading {path}"):
            model = load_weights(AutoModelForCausalLM, base, dtype=dtype, **hub)
            if not is_adapter:
                return model, fit_tokenizer(load_tokenizer(path, **hub), model)
            model = load_adapter(model, path, trainable, revision)
            tokenizer = load_tokenizer(path, base, trust_remote_code, revision=revision)
            return model, fit_tokenizer(tokenizer, model)
    except LOAD_ERRORS as error:
        place = "it" if base == path else f"it and its base {base}"
        raise ModelError(
            f"{path}: no model can be loaded from {place} ({first_line(error)})"
        ) from None
