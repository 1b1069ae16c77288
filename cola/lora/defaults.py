"""Default targets, heads, encoders and unusable layers of known models, recognised by name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from cola.lora.kinds import is_linear

#: names of the projections that compute query and value in one attention; the first entry that fits counts
QUERY_VALUE = (
    ("q_proj", "v_proj"),  # OPT, Llama, Mistral, Qwen, CLIP, Whisper, …
    ("query", "value"),  # BERT, RoBERTa, ViT
    ("q_lin", "v_lin"),  # DistilBERT
    ("q", "v"),  # T5
    ("query_proj", "value_proj"),  # DeBERTa v2
    ("q_b_proj", "kv_b_proj"),  # DeepSeek, with a low-rank query
    ("q_proj", "kv_b_proj"),  # DeepSeek, without
    ("q_b_proj", "kv_proj"),  # DeepSeek v4
    ("q_proj", "kv_proj"),
    ("c_attn",),  # GPT-2: query, key and value in one
    ("query_key_value",),  # Falcon, BLOOM, GPT-NeoX
    ("qkv_proj",),  # Phi-3
    ("Wqkv",),  # MPT, ModernBERT
    ("qkv",),  # timm
    ("linear_q", "linear_v"),  # Conformer
    ("Wq", "Wv"),  # CTRL
    ("wq", "wv"),
    ("wqkv",),  # InternLM2
    ("W_pack",),  # Baichuan
    ("att_proj",),  # OLMo, Molmo
    ("receptance", "value"),  # RWKV
    ("project_q", "project_v"),  # CPM-Ant
    ("q_head", "v_head"),  # Funnel
    ("q_proj.linear", "v_proj.linear"),  # Moshi
    ("q_proj", "v_proj_current", "v_proj_delayed"),  # Zaya
    ("in_proj_qkv",),  # gated delta networks
    ("in_proj_qkvz",),
    ("self.in_proj",),  # DeBERTa
    ("kv_b_proj",),  # DeepSeek-like, whose query has another name
    ("kv_proj",),  # JetMoE, whose queries are mixtures of experts
    ("to_q", "to_v"),  # diffusers
    ("to_qkv",),
)

#: children of a transformers model that map its features to the task's labels or tokens
HEADS = (
    "score", "classifier", "qa_outputs", "classification_head", "cls_classifier", "distillation_classifier",
    "logits_proj", "pre_classifier", "lm_head", "ctc_head",
)  # fmt: skip
#: further names that are heads only in models for `_TASKS`
_TASK_HEADS = ("head", "fc", "dist_head", "projector")
_TASKS = ("Classification", "QuestionAnswering", "MultipleChoice")

#: parts of a model that read images or sounds
ENCODERS = (
    "vision_tower", "visual", "vision_model", "vision_encoder", "vision_embed_tokens", "image_tower", "image_encoder",
    "vision_backbone", "vision", "vpm", "vqmodel", "audio_tower", "audio_encoder", "audio_model",
    "embed_tokens_extend",
)  # fmt: skip

#: classes that read their layers' weights without calling the layers: the reader and the layers' names
READ_DIRECTLY: dict[str, tuple[str, tuple[str, ...]]] = {
    "nn.MultiheadAttention": ("forward", ("out_proj",)),
    "nn.TransformerEncoderLayer": ("fast path in evaluation", ("linear1", "linear2")),
    "WavLMAttention": ("forward", ("q_proj", "k_proj", "v_proj", "out_proj")),
    "MobileBertLMPredictionHead": ("forward", ("dense", "decoder")),
    "LongcatFlashTopkRouter": ("forward", ("classifier",)),
    "MambaMixer": ("fused kernel", ("x_proj", "dt_proj", "out_proj")),
    "FalconMambaMixer": ("fused kernel", ("x_proj", "dt_proj", "out_proj")),
    "JambaMambaMixer": ("forward", ("dt_proj",)),
    "Mamba2Mixer": ("fused kernel", ("out_proj",)),
    "NemotronHMamba2Mixer": ("fused kernel", ("out_proj",)),
    "BambaMixer": ("fused kernel", ("out_proj",)),
    "GraniteMoeHybridMambaLayer": ("fused kernel", ("out_proj",)),
    "Zamba2MambaMixer": ("fused kernel", ("out_proj",)),
    "FalconH1Mixer": ("fused kernel", ("out_proj",)),
    "DetrMHAttentionMap": ("forward", ("k_proj",)),
    "ConditionalDetrMHAttentionMap": ("forward", ("k_proj",)),
    "MaskFormerDetrMHAttentionMap": ("forward", ("k_proj",)),
    "DabDetrMHAttentionMap": ("forward", ("k_linear",)),
}


def query_value(modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the query and value projections: in each attention the first entry of `QUERY_VALUE` that it has."""
    linear = [path for path, module in modules.items() if is_linear(module)]
    owners: dict[str, dict[str, list[str]]] = {}  # path of an attention: name: paths
    known = {name for names in QUERY_VALUE for name in names}
    for path in linear:
        for name in known:
            if path == name or path.endswith("." + name):
                owners.setdefault(path[: -len(name)], {}).setdefault(name, []).append(path)
    found: set[str] = set()
    for names in owners.values():
        fitting = next((entry for entry in QUERY_VALUE if all(name in names for name in entry)), ())
        found.update(path for name in fitting for path in names[name])
    return [path for path in linear if path in found]


def left_encoders(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the image or sound encoders that feed a language model; empty if there is no such pair.

    It is empty for a dual encoder (CLIP), of which both parts are trained.
    """
    projections = query_value(modules)
    text = _outermost(path for path in modules if _last(path) == "language_model")
    inside = [path for path in projections if not within(path, text)] if text else []
    if text and len(inside) < len(projections):
        return _outermost(_branch(path, text) for path in inside)
    encoders = _outermost(path for path in modules if _last(path) in ENCODERS)
    if not encoders or (output_embeddings(model) is None and _is_dual(modules)):
        return []
    rest = [path for path in projections if not within(path, encoders)]
    return encoders if rest else []


def heads(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The output layers of a transformers model: path of each linear layer to the path of its head."""
    output = output_embeddings(model)
    found = {path: path for path, module in modules.items() if module is output}
    for head in [] if output is not None else task_heads(model):
        found.update({path: head for path, m in modules.items() if within(path, [head]) and is_linear(m)})
    return found


def task_heads(model: nn.Module) -> list[str]:
    """Names of the children of a transformers model that a task adds, with fresh weights."""
    if not any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__):
        return []
    labels = any(task in type(model).__name__ for task in _TASKS)
    names = (*HEADS, *(_TASK_HEADS if labels else ()))
    return [name for name in model._modules if name in names and output_embeddings(model) is not model._modules[name]]


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that a transformers model names as its output embeddings."""
    ask: Any = getattr(model, "get_output_embeddings", None)
    try:
        return ask() if callable(ask) else None
    except (AttributeError, NotImplementedError):
        return None


def read_directly(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """The layers (by id) whose parent reads their weights without calling them; why they cannot carry a link."""
    found = {}
    for parent in modules.values():
        for kind in type(parent).__mro__:
            name = f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
            reader, layers = READ_DIRECTLY.get(name, ("", ()))
            for layer in layers:
                if layer in parent._modules:
                    found[id(parent._modules[layer])] = (
                        f"belongs to {'an' if name.startswith('nn.') else 'a'} {name}, whose {reader} reads the weight "
                        "without calling the layer, so a link would have no effect there"
                    )
    return found


def within(path: str, parts: list[str]) -> bool:
    """Whether ``path`` is one of ``parts`` or lies inside one."""
    return any(path == part or path.startswith(part + ".") for part in parts)


def _is_dual(modules: Mapping[str, nn.Module]) -> bool:
    seen = ("get_image_features", "get_video_features", "get_audio_features")
    return any(hasattr(m, "get_text_features") and any(hasattr(m, name) for name in seen) for m in modules.values())


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _outermost(paths: Any) -> list[str]:
    found: list[str] = []
    for path in sorted(set(paths)):
        if not within(path, found):
            found.append(path)
    return found


def _branch(path: str, others: list[str]) -> str:
    """The shortest ancestor of ``path`` that holds none of ``others``."""
    parts = path.split(".")
    ancestors = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((a for a in ancestors if not any(within(other, [a]) for other in others)), path)
