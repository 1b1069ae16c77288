"""Chooses names by which PEFT finds exactly the adapted layers in a base model; PEFT matches ends of paths.

The rules are those of PEFT 0.21 (`check_target_module_exists`, `_set_trainable`, `_inject_parameters`, and its
conversion of configurations for transformers 5).
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

from cola.chain.architecture import Architecture, holders
from cola.chain.fingerprint import Fingerprint, weight_of
from cola.chain.peft_forms import Forms
from cola.lora.per_layer import TASK_HEADS

#: by the model_type of mixtures in transformers 5, names of layers that PEFT takes for parts of fused experts
_MIXTRAL, _QWEN = ("gate", "w1", "w2", "w3"), ("gate", "gate_proj", "up_proj", "down_proj")
_FUSED = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(
        (
            "Dots3NoteTextModel", "UnlimitedOcrTextModel", "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
            "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite",
            "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe",
            "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "solar_open",
        ),
        _QWEN,
    ),
}  # fmt: skip
#: matches the names of fused experts' tensors, for models whose model_type was not recorded
_EXPERTS = re.compile(r"(^|\.)experts\.(gate_up_proj|down_proj)$")
#: by model_type, layers that are lost because PEFT 0.21 renames their keys when it loads them with transformers 5
_RENAMED = {
    **dict.fromkeys(("inkling2", "inkling2_text"), r"\.[kv]_sconv\.weight_proj$"),
    **dict.fromkeys(("laguna", "mistral_large4", "mistral_large4_text"), r"\.shared_experts\."),
    "maskformer": r"\.layers\.\d+\.blocks\.\d+\.",
    "pi0": r"(^|\.)embed_action_time\.",
    "unlimited_ocr": r"(^|\.)language_model\.layers\.",
}


def choose(forms: Forms, saved: Sequence[str], base: Fingerprint | None) -> dict[str, Any]:
    """The entries of ``adapter_config.json`` that select the adapted layers.

    Args:
        forms: of the adapted layers.
        saved: paths of the modules that are stored whole.
        base: has the names of all tensors and the architecture, if they are known.

    Returns:
        ``target_modules``: the layers' names if these select the adapted layers alone, else their paths, else a regular
        expression. ``target_parameters``: single parameters, and the weights of layers that PEFT would otherwise take
        for parts of fused experts; or None.

    Raises:
        ValueError: PEFT would adapt other layers, or refuse one; the message names it.
    """
    built = base.architecture if base is not None else None
    tensors = set(base.prints()) if base is not None and base.others is not None else set()
    paths, single = forms.modules(), forms.parameters()
    modules = holders(tensors).union(paths, built.modules if built is not None else ())
    _require_free(paths, saved, modules, built)
    fused = _fused(built, tensors)
    apart = [path for path in paths if path.rpartition(".")[2] in fused]
    plain = [path for path in paths if path not in set(apart)]
    expression: Any = "|".join(map(re.escape, plain)) or []
    parameters = [*_parameters(single, tensors), *map(weight_of, apart)] or None
    if built is None and not fused:
        return {"target_modules": expression, "target_parameters": parameters}  # it fits, whatever the other modules
    _require_parameters(apart, tensors, base)
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in plain))
    for listed in (names, plain):
        if _selected(listed, modules) == set(plain):
            break
    else:
        if fused:  # PEFT would reduce an expression to names
            other = sorted(_selected(plain, modules) - set(plain))[0]
            raise ValueError(
                f"PEFT cannot tell the adapted layers of this mixture from {other!r}, whose path ends as one of theirs "
                "does: save the merged model instead"
            )
        return {"target_modules": expression, "target_parameters": parameters}
    return {"target_modules": listed, "target_parameters": parameters}


def _parameters(single: Sequence[str], tensors: Collection[str]) -> list[str]:
    """Names by which PEFT finds these parameters alone: the last two parts, if they suffice."""
    short = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in single))
    return short if tensors and _selected(short, tensors) == set(single) else list(single)


def task(saved: Sequence[str], base: Fingerprint | None) -> dict[str, Any]:
    """``task_type``, or without one ``auto_mapping``, by which PEFT finds the base model's class."""
    built = base.architecture if base is not None else None
    if base is None or built is None:
        return {"task_type": None, "auto_mapping": None}
    heads = {
        m for m in holders(base.prints()) if any(m.endswith(head) for head in TASK_HEADS.get(built.task or "", ()))
    }
    if built.task and heads <= set(saved):
        return {"task_type": built.task, "auto_mapping": None}
    mapping = {"base_model_class": built.name, "parent_library": built.library}
    return {"task_type": None, "auto_mapping": mapping}


def _fused(built: Architecture | None, tensors: Collection[str]) -> tuple[str, ...]:
    if built is not None and built.model_type is not None:
        return _FUSED.get(built.model_type, ())
    return tuple({*_MIXTRAL, *_QWEN}) if built is None and any(map(_EXPERTS.search, tensors)) else ()


def _selected(listed: Sequence[str], modules: Collection[str]) -> set[str]:
    """The modules that PEFT adapts for a list of names."""
    ends = tuple(f".{name}" for name in listed)
    return {module for module in modules if f".{module}".endswith(ends)}


def _require_free(
    paths: Sequence[str], saved: Sequence[str], modules: Collection[str], built: Architecture | None
) -> None:
    """Refuse layers and modules that PEFT would lose, refuse, or confuse with others."""
    for path in (*paths, *saved):
        if built is not None and path in built.aliases:
            raise ValueError(
                f"an adapter in PEFT's format cannot hold {path!r}: the model has this module at "
                f"{', '.join(map(repr, built.aliases[path]))} as well, and PEFT would change it at one place alone. "
                "Save the merged model instead"
            )
    for path in paths:
        # as in PEFT: the names are expressions
        owner = next((name for name in saved if re.match(rf"(^|.*\.){name}($|\..*)", path)), None)
        if owner is not None:
            raise ValueError(
                f"an adapter in PEFT's format cannot hold layer {path!r}: PEFT adapts nothing in a module called "
                f"{owner!r}, which is stored whole. Save the merged model instead"
            )
        if built is not None and re.search(_RENAMED.get(built.model_type or "", "$^"), path):
            raise ValueError(
                f"PEFT loads a {built.model_type} model's layer {path!r} under another name, so that its part of an "
                "adapter would be lost: save the merged model, or leave the layer out of target_modules"
            )
    for name in saved:
        other = next((m for m in sorted(modules) if m.endswith(name) and m not in saved), None)
        if other is not None:
            raise ValueError(
                f"an adapter in PEFT's format cannot hold module {name!r}: PEFT would look for {other!r} too, whose "
                "path ends the same. Save the merged model instead"
            )


def _require_parameters(apart: Sequence[str], tensors: Collection[str], base: Fingerprint | None) -> None:
    """Check that PEFT can adapt the weights of these layers as parameters, and finds no others by their names."""
    prints = base.layers if base is not None else {}
    for path in apart:
        one = prints.get(path)
        if one is not None and (one.transposed or not one.dtype.startswith(("float", "bfloat"))):
            raise ValueError(
                f"PEFT takes layer {path!r} of this mixture for a part of its fused experts, and cannot adapt a "
                f"{one.dtype} weight as a parameter: save the merged model, or leave the layer out of target_modules"
            )
        other = next((n for n in sorted(tensors) if n.endswith(f".{weight_of(path)}")), None)
        if other is not None and other.removesuffix(".weight") not in apart:
            raise ValueError(
                f"PEFT cannot tell the weight of layer {path!r} from {other!r}, whose name ends the same: save the "
                "merged model instead"
            )
