"""Loads and saves base models for the command line, by transformers, which is imported when needed."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cola.chain.chain import Chain
from cola.lora.names import base_tensors

#: beginnings of a tokenizer's file names
_TOKENIZER = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges", "spm", "bpe", "special_tokens", "added_tokens")


def load_base(
    name: str, chain: Chain, *, trust_remote_code: bool = False, seed: int = 0, offline: bool = False
) -> nn.Module:
    """Load a model in the class that its config names, with each tensor in the dtype that the chain recorded.

    Weights are read from safetensors files only.

    Args:
        name: a model directory or a hub name.
        chain: trained on this model.
        trust_remote_code: run code that comes with the model.
        seed: for parts that the model's files lack (a new head), which transformers draws at random.
        offline: ask no hub.

    Raises:
        ValueError: the config does not name a class, or needs the model's own code.
        OSError: transformers cannot find or read it.
        ImportError: transformers is not installed.
    """
    directory, name = Path(name).expanduser(), os.path.expanduser(name)
    if not name:
        raise ValueError("--base is empty: give a model directory or a hub name")
    if not directory.is_dir() and _is_a_path(name):
        raise ValueError(f"--base {name}: there is no such directory")
    unclear = _may_be_a_path(name)
    try:
        import transformers
    except ImportError:
        raise ImportError("this command loads models with transformers: pip install transformers") from None
    local = {"trust_remote_code": trust_remote_code, "local_files_only": offline or unclear or directory.is_dir()}
    try:
        with _quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(name, **local)
    except (OSError, ValueError) as error:
        if unclear:
            raise ValueError(
                f"--base {name}: the directory {directory.parent} has no {directory.name}, and the hub's cache has no "
                "such model; to download one of this name, call the command in another directory"
            ) from None
        if directory.is_dir() or not (offline or _hub_is_off()):
            raise ValueError(f"--base {name}: {' '.join(str(error).split())}") from None
        raise ValueError(
            f"--base {name}: there is no such directory, and the hub's cache has no such model (no hub is asked)"
        ) from None
    kind = _class_of(config, name, trust_remote_code, transformers)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    prints = chain.base.prints() if chain.base is not None else {}
    named = ((name, getattr(torch, one.dtype, None)) for name, one in prints.items())
    dtypes = {name: dtype for name, dtype in named if isinstance(dtype, torch.dtype) and dtype.is_floating_point}
    widest = functools.reduce(torch.promote_types, dtypes.values()) if dtypes else "auto"
    options: dict[str, Any] = {"dtype" if version >= (4, 56) else "torch_dtype": widest}
    options.update({option: True for option, value in local.items() if value})
    with torch.random.fork_rng(devices=[]), _quiet(transformers):
        torch.manual_seed(seed)
        model = kind.from_pretrained(name, use_safetensors=True, **options)
    for path, tensor in base_tensors(model).items():
        if tensor.is_floating_point() and path in dtypes:
            tensor.data = tensor.data.to(dtypes[path])
    return model


def save_merged(
    model: Any, directory: Path, name: str, *, trust_remote_code: bool = False, offline: bool = False
) -> None:
    """``save_pretrained`` of a plain model, with the base model's tokenizer if there is one.

    Raises:
        RuntimeError: transformers cannot save such a model.
    """
    import transformers

    try:
        with _quiet(transformers):
            model.save_pretrained(directory)
    except NotImplementedError:  # transformers 5.23, for models loaded from quantised files
        raise RuntimeError(
            f"transformers {transformers.__version__} cannot save a {type(model).__name__} that was loaded quantised: "
            "write an adapter by cola export; or, in Python, quantise the base by from_pretrained(..., "
            "quantization_config=...), and call chain.apply(model) and model.save_pretrained"
        ) from None
    name = os.path.expanduser(name)
    base = Path(name)
    if base.is_dir() and not any(path.name.startswith(_TOKENIZER) for path in base.iterdir()):
        return  # transformers would invent one
    try:
        here = offline or base.is_dir() or _may_be_a_path(name)
        local = {"trust_remote_code": trust_remote_code, "local_files_only": here}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **local)
        tokenizer.save_pretrained(directory)
    except Exception:  # it needs code or packages; the weights are saved, and they matter
        return


def _class_of(config: Any, name: str, trust_remote_code: bool, transformers: Any) -> Any:
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and any(key.startswith("AutoModel") for key in remote):
        return getattr(transformers, next(key for key in remote if key.startswith("AutoModel")))
    architecture = next(iter(getattr(config, "architectures", None) or []), None)
    if architecture is None:
        raise ValueError(f"--base {name}: its config.json names no architecture, so its class is not known")
    kind = getattr(transformers, str(architecture), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"--base {name}: transformers has no class {architecture!r}; if the model brings its own code and you "
            "trust it, pass --trust-remote-code"
        )
    return kind


def _is_a_path(name: str) -> bool:
    """Whether a name cannot be one on the hub."""
    return name.startswith((".", "/", "~")) or len(name.replace("\\", "/").split("/")) > 2


def _may_be_a_path(name: str) -> bool:
    """Whether a name is a mistyped path, or one on the hub whose owner's name a directory here has."""
    directory = Path(name)
    return not directory.is_dir() and "/" in name and directory.parent.is_dir()


def _hub_is_off() -> bool:
    import huggingface_hub

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars, unless a person watches them: in a log each is a heap of lines."""
    logging = transformers.utils.logging
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
