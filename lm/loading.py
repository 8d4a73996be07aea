"""The one loader of models and tokenizers, which makes all checks.

It refuses a model whose weights are incomplete and, unless `trust_remote_code` is given, a model
that only its own code can run."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file

from common.errors import ModelError, first_line
from common.progress import taking_long

# the errors known to be raised by the libraries for a folder that is no model
LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError)


def pick_device() -> tuple[str, bool]:
    """(device, bf16) for training on this machine.

    On a CPU with instructions for bf16, training in bf16 is 1.5 times faster than in float32;
    without them it is 3.5 times slower. So bf16 is used only on a CPU that has them."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return "cpu", bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def scoring_device(device: str | None = None) -> tuple[str, torch.dtype | str]:
    """(device, dtype) for scoring and sampling; the default device is the GPU if there is one.

    The dtype is float32 on a CPU, and on a GPU that of the stored weights ("auto")."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.float32 if device == "cpu" else "auto"


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


def load_weights(
    model_class: Any,
    path: str | Path,
    may_miss: Callable[[Any, str], bool] = lambda model, key: False,
    **options: Any,
) -> Any:
    """model_class.from_pretrained, from safetensors only; no weight may be missing.

    may_miss(model, key): whether this weight may be missing; it is then initialized at random.
    Raises ValueError if another weight is missing, and the errors of transformers."""
    model, loading = model_class.from_pretrained(
        path, use_safetensors=True, output_loading_info=True, **options
    )
    missing = [key for key in loading["missing_keys"] if not may_miss(model, key)]
    if missing:
        raise ValueError(f"weights are missing, for example {min(missing)}")
    return model


def load_adapter(
    model: Any, path: str, trainable: bool = False, revision: str | None = None
) -> Any:
    """The PEFT adapter at `path` on its loaded base. trainable: it is loaded to be trained.

    Raises ValueError if part of the adapter is missing, or if it is not a LoRA-like adapter."""
    if Path(path).is_dir() and not (Path(path) / "adapter_model.safetensors").is_file():
        raise ValueError("adapter_model.safetensors is missing")
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


def load_tokenizer(path: str, base: str | None = None, **options: Any) -> Any:
    """The tokenizer at `path`, or that of the base if an adapter has none."""
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError):
        if base in (None, path):
            raise
        return AutoTokenizer.from_pretrained(base)


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
                return model, AutoTokenizer.from_pretrained(path, **hub)
            model = load_adapter(model, path, trainable, revision)
            return model, load_tokenizer(path, base, revision=revision)
    except LOAD_ERRORS as error:
        place = "it" if base == path else f"it and its base {base}"
        raise ModelError(
            f"{path}: no model can be loaded from {place} ({first_line(error)})"
        ) from None
