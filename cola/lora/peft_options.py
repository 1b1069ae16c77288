"""Options in the words of PEFT's LoraConfig: how a LinkConfig says the same, and the way out where it cannot.

PEFT is not imported: its configuration is recognised by name.
"""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from cola.lora.per_layer import PER_LAYER, TOKENS

#: fields of LoraConfig that say nothing about training, or (``fan_in_fan_out``) what a layer's kind says already
_NEUTRAL = (
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "fan_in_fan_out",
    "megatron_core", "qalora_group_size", "runtime_config",
)  # fmt: skip
_NO_LINK = "is more than a link's s·BA: leave it out"
#: the way out for what a LinkConfig has no place for; each follows on the option and its value
_WAYS_OUT = {
    "use_rslora": "has no place in a LinkConfig: scaling='rslora' makes the scale lora_alpha/√r",
    "init_lora_weights": "has no place in a LinkConfig: choose init, e.g. 'kaiming' (PEFT's True), 'gaussian' or "
    "'orthogonal'",
    "bias": "has no place in a LinkConfig, which trains 'none' or 'lora_only' of the adapted layers: add other biases "
    "by opt.add_param_group",
    "inference_mode": "freezes the adapter, and a link is trained: leave it out",
    "layer_replication": "changes the model: make the larger model first",
    "ensure_weight_tying": "is not needed: shared weights in modules_to_save stay shared, so leave it out",
    "megatron_config": "belongs to Megatron's layers, which carry no links: leave it out",
    "use_dora": "trains norms next to a link's s·BA, which gain no more than a LoRA of their bytes "
    '(experiments/RESULTS.md, "DoRA"): leave it out',
    "lora_bias": _NO_LINK, "use_qalora": _NO_LINK, "use_bdlora": _NO_LINK,
    "velora_config": _NO_LINK, "kasa_config": _NO_LINK, "monteclora_config": _NO_LINK, "arrow_config": _NO_LINK,
    "alora_invocation_tokens": _NO_LINK,
}  # fmt: skip
_STARTS = "sets how PEFT starts its adapter: choose LinkConfig(init=...)"
_WAYS_OUT.update(dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), _STARTS))
#: other libraries' words
_CALLED = {"rank": "r", "lora_rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}


def is_lora_config(value: Any) -> bool:
    """Whether ``value`` is PEFT's LoraConfig or a subclass."""
    return any(c.__name__ == "LoraConfig" and c.__module__.split(".")[0] == "peft" for c in type(value).__mro__)


def carried(config: Any) -> dict[str, Any]:
    """The LinkConfig arguments that mean what a LoraConfig says.

    Raises:
        ValueError: a value differs from PEFT's default and cannot be carried over; names each such option.
    """
    if type(config).__name__ != "LoraConfig":
        raise ValueError(f"link={type(config).__name__}(...) is more than LoRA: give a LoraConfig or a LinkConfig")
    default = type(config)()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    given = {name: value for name, value in values.items() if value != getattr(default, name)}
    targets, whole = values["target_modules"], values["modules_to_save"] or ()
    found = {
        "r": values["r"],
        "lora_alpha": values["lora_alpha"],
        "target_modules": sorted(targets) if isinstance(targets, (set, list, tuple)) else targets,
        "lora_dropout": values["lora_dropout"],
        "modules_to_save": whole if isinstance(whole, str) else tuple(whole),
    }
    for name in (*found, *_NEUTRAL):
        given.pop(name, None)
    if given.get("bias") == "lora_only":
        found["bias"] = given.pop("bias")
    if given.pop("use_rslora", False):
        found["scaling"] = "rslora"
    if str(given.get("init_lora_weights")).lower() == "gaussian":
        del given["init_lora_weights"]
        found["init"] = "gaussian"
    for name in (*PER_LAYER, TOKENS):
        value = given.pop(name, None)
        if value is not None:
            found[name] = getattr(value, "value", sorted(value) if isinstance(value, set) else value)
    if given:
        raise ValueError(f"link=LoraConfig(...): {'; '.join(way_out(name, value) for name, value in given.items())}")
    return found


def way_out(name: str, value: Any, known: Collection[str] = ()) -> str:
    """What to do about an option that a LinkConfig does not have, with its name and value.

    Args:
        name: the option's.
        value: its value.
        known: names of the options that there are.
    """
    if name in _WAYS_OUT:
        return f"{name}={value!r:.60} {_WAYS_OUT[name]}"
    near = [_CALLED[name]] if name in _CALLED else difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "leave it out"
    return f"{name}={value!r:.60} is unknown to a LinkConfig: {hint}"


def require_known(options: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise TypeError for the options of a LinkConfig that are not ``known``."""
    unknown = {name: value for name, value in options.items() if name not in known}
    if unknown:
        raise TypeError(f"LinkConfig: {'; '.join(way_out(name, value, known) for name, value in unknown.items())}")


def require_for_base(options: Mapping[str, Any], known: Collection[str], base: str, taken: Collection[str]) -> None:
    """Raise TypeError for options that a base optimizer does not have: those of the links, and mistyped ones.

    Args:
        options: keyword arguments that the base's signature does not have.
        known: names of a LinkConfig's options.
        base: the base's name.
        taken: names that the base and the ChainOptimizer take.
    """
    mine = {name: value for name, value in options.items() if name in known}
    theirs = {name: value for name, value in options.items() if name in _WAYS_OUT or name in _CALLED}
    advice = [way_out(name, value) for name, value in theirs.items() if name not in mine]
    if mine:
        advice.insert(0, f"give link=LinkConfig({', '.join(f'{name}={value!r:.60}' for name, value in mine.items())})")
    others = {name: value for name, value in options.items() if name not in mine and name not in theirs}
    for name, value in others.items():
        near = difflib.get_close_matches(name, taken, n=1)
        advice.append(f"did you mean {near[0]}?" if near else f"leave {name}={value!r:.60} out")
    if advice:
        raise TypeError(f"{base} does not take {', '.join({**mine, **theirs, **others})}: {'; '.join(advice)}")
