"""Load the base of a chain for the command line, from a directory or the hub. Imports transformers when called."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cola.chain import Chain


def load_base(name: str, chain: Chain, *, trust_remote_code: bool = False, seed: int = 0) -> nn.Module:
    """The model of the class that its config names, in the dtype that the chain was trained on.

    Weights are read from safetensors files only.

    Args:
        name: a model directory or a hub name.
        chain: whose base it is to be.
        trust_remote_code: run code that comes with the model.
        seed: of parts that the model's files lack (a new head), which transformers draws at random.

    Raises:
        ValueError: the config does not say which class it is for, or needs code of its own.
        OSError: transformers cannot find or read it.
        ImportError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError("this command loads models by transformers: pip install transformers") from None
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ValueError(f"--base {name}: there is no such directory")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"--base {name}: {' '.join(str(error).split())}") from None
    kind = _class_of(config, name, trust_remote_code, transformers)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options: dict[str, Any] = {"dtype" if version >= (4, 56) else "torch_dtype": _dtype(chain)}
    if trust_remote_code:
        options["trust_remote_code"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.from_pretrained(name, use_safetensors=True, **options)


def save_merged(model: Any, directory: Path, name: str) -> None:
    """``save_pretrained`` of a plain model, with the base's tokenizer beside it where it has one.

    Raises:
        RuntimeError: transformers cannot save such a model.
    """
    import transformers

    try:
        model.save_pretrained(directory)
    except NotImplementedError:  # in 5.23 for models that were loaded from quantised files
        raise RuntimeError(
            f"transformers {transformers.__version__} cannot save a {type(model).__name__} that was loaded quantised: "
            "write an adapter by cola export; or, in Python, quantise the base by from_pretrained(..., "
            "quantization_config=...), and call chain.apply(model) and model.save_pretrained"
        ) from None
    try:
        transformers.AutoTokenizer.from_pretrained(name).save_pretrained(directory)
    except (
        Exception
    ):  # a base without tokenizer, or one that needs code or packages: the weights are what was asked for
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


def _dtype(chain: Chain) -> Any:
    """Most common dtype of the layers that the chain changes; as the files have it if that is unknown or quantised."""
    names = [layer.dtype for layer in chain.base.layers.values()] if chain.base is not None else []
    return getattr(torch, max(set(names), key=names.count), "auto") if names else "auto"
