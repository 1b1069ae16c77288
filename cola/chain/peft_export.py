"""Writes a whole chain as one LoRA adapter in PEFT's format, without needing PEFT.

``Σ s_i B_i A_i = [s₁B₁ s₂B₂ …] [A₁; A₂; …]`` is one product of rank Σr. So with the scales folded into B and
``lora_alpha = r`` a single adapter on the original base model equals the chain. Layers of lower rank are padded with
zeros, so that all have one rank and no reader needs patterns.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola.chain import peft_forms, peft_targets, peft_tokens, replay, spectrum, tensorfile
from cola.chain.files import write
from cola.chain.fingerprint import Fingerprint
from cola.knot.tie import delta_norm
from cola.lora.link import Link
from cola.lora.names import require_plain_name

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def to_peft(
    links: Sequence[Link], directory: Path, r: int | None, base: Fingerprint | None, base_model: str | None
) -> dict[str, float]:
    """Write ``adapter_model.safetensors``, ``adapter_config.json`` and ``export.json``; see `Chain.to_peft`."""
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ValueError(f"r={r!r} must be a positive integer, or None for the exact adapter of rank Σr")
    paths = replay.paths(links)
    if not paths:
        raise ValueError("an empty chain has nothing to export: finish() ties the last link")
    changed = base.architecture.changed if base is not None and base.architecture is not None else None
    if changed is not None:
        raise ValueError(
            f"to_peft() writes an adapter for the original base, and {changed}: the chain belongs on the changed one. "
            "Save the merged model instead; or train from an init that leaves the base alone, like "
            "init_lora_weights=True"
        )
    first = {path: next(link.factors[path] for link in links if path in link.factors) for path in paths}
    forms = peft_forms.forms_of(first, base)
    forms.require_known()
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    ranks, errors, norms = {}, {}, {}
    for path in paths:
        require_plain_name(path)
        factors = [link.factors[path] for link in links if path in link.factors]
        dtype = torch.promote_types(factors[0].A.dtype, torch.float32)  # s·B may not fit half precision
        if r is None or r >= sum(A.shape[-2] for f in factors for A, _, _ in f.triples()):
            (B, A), errors[path] = spectrum.stack(factors), 0.0
            norms[path] = delta_norm(B, A, 1.0)
        else:
            A, B, values = spectrum.truncate(factors, r)
            errors[path], norms[path] = values[..., r:].norm().item(), values.norm().item()
        ranks[path] = A.shape[-2]
        pairs[path] = A.to(dtype), B.to(dtype)
    rank = max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in pairs.items():
        tensors.update({PREFIX + key: value for key, value in forms.tensors(path, A, B, rank).items()})
    biases, saved = _trained(links, paths)
    _require_whole(saved, paths, base)
    tensors.update(biases)
    tensors.update(saved)
    deltas, tokens = peft_tokens.exported(links, base)
    tensors.update((f"{PREFIX}{key}", rows) for key, rows in deltas.items())
    name = base_model or (base.name if base is not None else None)
    inside = all(key.endswith(".base_layer.bias") for key in biases)
    bias = "none" if not biases else "lora_only" if inside else "all"
    config = _config(rank, forms, base, name, bias, sorted({_owner(key) for key in saved})) | tokens
    account = {"ranks": ranks, "error": errors, "norm": norms, "links": [link.rank for link in links]}
    write(directory / WEIGHTS, tensorfile.dump(tensors, metadata={"format": "pt"}))
    write(directory / CONFIG, json.dumps(config, indent=2).encode())
    write(directory / "export.json", json.dumps(account, indent=1).encode())
    return errors


def _config(
    rank: int, forms: peft_forms.Forms, base: Fingerprint | None, name: str | None, bias: str, saved: list[str]
) -> dict[str, Any]:
    """The content of ``adapter_config.json``; alpha = r, so s = 1."""
    linear = [path for path, form in forms.of.items() if form == "linear"]
    flipped = base is not None and any(base.layers[path].transposed for path in linear if path in base.layers)
    return {
        "peft_type": "LORA",
        **peft_targets.task(saved, base),
        "base_model_name_or_path": name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": bias,
        **peft_targets.choose(forms, saved, base),
        **({"ensure_weight_tying": True} if forms.ties() else {}),
        "modules_to_save": saved or None,
        "fan_in_fan_out": flipped,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _trained(links: Sequence[Link], paths: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The last values of everything else that was trained: lone biases, and modules that PEFT stores whole."""
    values = {path: value for link in links for path, value in link.trained.items()}
    adapted = {f"{path}.bias" for path in paths}
    whole = {_owner(name) for name in values if not name.endswith("bias")}
    biases, saved = {}, {}
    for name, value in values.items():
        require_plain_name(name)
        if name in adapted:  # the bias stays inside the layer that PEFT wraps
            biases[f"{PREFIX}{name.removesuffix('bias')}base_layer.bias"] = value
        elif name.endswith("bias") and _owner(name) not in whole:
            biases[f"{PREFIX}{name}"] = value
        else:
            saved[f"{PREFIX}{name}"] = value
    return biases, saved


def _require_whole(saved: dict[str, Tensor], paths: Sequence[str], base: Fingerprint | None) -> None:
    """Refuse modules that were trained in part: PEFT's format holds a module with all its tensors or not at all."""
    present = {key.removeprefix(PREFIX) for key in saved}
    prints = {} if base is None else base.prints()
    for owner in sorted({_owner(key) for key in saved}):
        lacking = sorted(n for n in prints if n.rpartition(".")[0] == owner and n not in present)
        if not owner or owner in paths or lacking:
            mine = sorted(n for n in present if n.rpartition(".")[0] == owner)
            why = "it is the model itself" if not owner else "it is adapted" if owner in paths else ""
            raise ValueError(
                f"an adapter in PEFT's format cannot hold {', '.join(mine)}, which training has moved: it holds "
                f"modules as a whole, and {why or f'the chain has no {lacking[0]!r} (train the whole module)'}. Save "
                "the merged model instead"
            )


def _owner(name: str) -> str:
    return name.removeprefix(PREFIX).rpartition(".")[0]
