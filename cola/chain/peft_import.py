"""Reads a LoRA adapter in PEFT's format as a link, without needing PEFT.

Only a plain ``s·B A`` can be a link. Everything else is refused with the reason, because an adapter
that is half understood would silently give wrong weights.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cola.chain import peft_forms, peft_tokens, tensorfile
from cola.chain.files import MAX_JSON, StoreError, parse, read
from cola.chain.peft_export import CONFIG, PREFIX, WEIGHTS
from cola.common.arguments import is_finite
from cola.common.contexts import unaffected
from cola.knot.tie import RECORDED, TIEABLE
from cola.lora.link import Factor, KnotReport, LayerReport, Link, are_factors, used_rank
from cola.lora.names import require_plain_name
from cola.lora.peft import CHANGES_BASE
from cola.lora.per_layer import TOKENS

#: entries of adapter_config.json that do not change the product of a stored LoRA
_HARMLESS = {
    "alora_invocation_string", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type",
}  # fmt: skip
_UNDERSTOOD = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", TOKENS}
#: a safe pattern consists of characters and classes of them, repeated or not, and alternatives of these
_ATOM = r"(?:[^\\()\[\]{}*+?|^$]|\\[\W_dw]|\[\^?[\w.-]+\])[*+]?"
_GROUP = rf"\((?:\?:)?(?:{_ATOM}|\|)*\)"
_SAFE = re.compile(rf"\^?(?:{_ATOM}|{_GROUP}|\|)*\$?")


@unaffected()
def from_peft(directory: Path, rounding: str) -> Link:
    """The adapter as link 0; see `Chain.from_peft`."""
    if rounding not in RECORDED:
        raise ValueError(f"rounding={rounding!r} is unknown: choose one of {', '.join(RECORDED)}")
    path = directory / CONFIG
    config = parse(read(path, limit=MAX_JSON), path)
    if not isinstance(config, dict):
        raise StoreError(f"{path} is not an adapter's configuration")
    _require_plain_lora(config, path)
    path = directory / WEIGHTS
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise StoreError(f"{directory / 'adapter_model.bin'} is a pickle, which is never read: save it as safetensors")
    tensors, _ = tensorfile.load(read(path), path)
    tensors, rows = peft_tokens.imported(tensors, config, path, PREFIX)
    factors, trained = _sort(tensors, config, path, rounding)
    layers = {name: LayerReport(factor.norm(), 0.0, rounding) for name, factor in factors.items()}
    norm = math.sqrt(sum(layer.delta_norm**2 for layer in layers.values()))
    ranks = [factor.rank for factor in factors.values()]
    return Link(0, 0, factors, trained, KnotReport(0, 0, max(ranks), norm, 0.0, None, 0.0, layers), rows)


def _require_plain_lora(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise StoreError(f"{path} describes an adapter of type {kind!r:.40}; only LORA can be a link")
    for name, value in config.items():
        if value and name not in _HARMLESS | _UNDERSTOOD:
            raise StoreError(
                f"{path} has {name}={value!r:.60}: such an adapter is not a plain s·B A, so it cannot be a link"
            )
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise StoreError(f"{path} has target_parameters={parameters!r:.60}, which are no names")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(CHANGES_BASE):
        raise StoreError(
            f"{path} has init_lora_weights={init!r:.40}, which changes the base weights too: convert the adapter to "
            "plain LoRA first (PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )


def _sort(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path, rounding: str
) -> tuple[dict[str, Factor], dict[str, Tensor]]:
    """The file's tensors: factors by layer, and values that were trained in addition."""
    factors: dict[str, Factor] = {}
    trained: dict[str, Tensor] = {}
    attentions = peft_forms.attentions(key.removeprefix(PREFIX) for key in tensors)
    for key, tensor in sorted(tensors.items()):  # a file has no order; of one module's parameters the inner come first
        name = key.removeprefix(PREFIX)
        try:
            require_plain_name(name)
        except ValueError as error:
            raise StoreError(f"{path}: {error}") from None
        if len(name) > 512:
            raise StoreError(f"{path} has a name of {len(name)} characters: {name[:60]!r}…")
        layer, found, end = name.rpartition(".lora_A") if name.endswith(".lora_A.weight") else ("", "", "")
        if not found and name.endswith(".lora_embedding_A"):
            layer, found, end = name.rpartition(".lora_embedding_A")
        if found:
            B = tensors.get(f"{key.removesuffix('A' + end)}B{end}")
            form = "embedding" if "embedding" in found else "attention" if layer in attentions else ""
            where, factor = _factor(layer, tensor, B, config, path, rounding, form)
            if factor.form != "attention output":  # which is zero
                factors[where] = factor
        elif name.endswith((".lora_B.weight", ".lora_embedding_B")):
            if re.sub(r"B(\.weight)?$", r"A\1", key) not in tensors:
                raise StoreError(f"{path} has {key!r:.120} without its lora_A")
        elif "lora_" in name:
            raise StoreError(f"{path} has {key!r:.120}: not part of a plain LoRA")
        else:
            trained[name.replace(".base_layer.bias", ".bias")] = tensor
    if not factors:
        raise StoreError(f"{path} holds no LoRA factors")
    return (peft_forms.without_heads(factors) if config.get("ensure_weight_tying") else factors), trained


def _factor(
    layer: str, A: Tensor, B: Tensor | None, config: Mapping[str, Any], path: Path, rounding: str, form: str
) -> tuple[str, Factor]:
    """The layer's path and factor."""
    if B is None or {A.dtype, B.dtype} - set(TIEABLE) or A.dim() < 2 or B.dim() < 2:
        raise StoreError(f"{path}: lora_A and lora_B of layer {layer!r:.120} are not factors of a layer")
    r = _by_pattern(config.get("rank_pattern"), layer, config.get("r"), path)
    if form == "embedding":
        found: Any = layer, A, B, "embedding"
    elif not A.shape[0] or r < 1 or r != int(r):
        raise StoreError(f"{path}: layer {layer!r:.120} has rank {A.shape[0]}, but {CONFIG} says {r:g}")
    else:
        named = config.get("target_parameters") or []
        found = peft_forms.read(layer, A, B, int(r), named, attention=form == "attention")
    if isinstance(found, str):
        raise StoreError(f"{path}: layer {layer!r:.120} {found}")
    where, A, B, form = found
    if not are_factors(A, B):
        raise StoreError(f"{path}: lora_A and lora_B of layer {layer!r:.120} are not factors of a layer")
    if r != A.shape[-2]:
        raise StoreError(f"{path}: layer {layer!r:.120} has rank {A.shape[-2]}, but {CONFIG} says otherwise")
    alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha"), path)
    scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    rank = max(used_rank(A, B), 1)  # an export pads all layers to one rank
    if rank < r:
        A, B = A[..., :rank, :].clone(), B[..., :rank].clone()
    return where, Factor(A, B, scaling, rounding, form=form)


@functools.lru_cache(maxsize=1 << 14)
def _expression(pattern: str, config: Path) -> re.Pattern[str]:
    """``pattern`` for the end of a path. Refuses nested or many repetitions, with which a match could take years."""
    try:
        found = re.compile(rf"(.*\.)?({pattern})$") if len(pattern) <= 512 else None
    except (re.error, RecursionError, OverflowError) as error:
        raise StoreError(f"{config} has a bad pattern {pattern!r:.60}: {error}") from None
    bare = re.sub(r"\\.|\[[^\]]*\]", "", pattern[:513])  # without escapes and classes, which hold no operators
    groups = (re.sub(r"\([^()]*\)", "", bare), *re.findall(r"\([^()]*\)", bare))
    ways = math.prod(group.count("|") + 1 for group in groups)
    if found is None or not _SAFE.fullmatch(pattern) or len(re.findall(r"[*+]", bare)) > 2 or ways > 32:
        raise StoreError(
            f"{config} has a pattern that is too intricate to be safe: {pattern!r:.60} (allowed are two repetitions of "
            "a character and up to 32 alternatives in all, nothing nested): write the layers' paths"
        )
    return found


def _by_pattern(patterns: Any, layer: str, default: Any, path: Path) -> float:
    """The value of the first pattern that matches the end of the layer's path, else the default."""
    config, patterns = path.with_name(CONFIG), patterns or {}
    if not isinstance(patterns, dict):
        raise StoreError(f"{config} has patterns that are not an object: {patterns!r:.60}")
    value = next((value for p, value in patterns.items() if _expression(p, config).match(layer)), default)
    if not is_finite(value):
        raise StoreError(f"{config} gives layer {layer!r:.120} the rank or alpha {value!r:.40}")
    return value
