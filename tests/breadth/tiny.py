# ruff: noqa: E501 (a table of expressions, one a line)
"""Tiny random models of the architectures of transformers, made from their own configuration classes.

A configuration's sizes are known by the names of its fields; `EXCEPTIONS` has what the names do not tell.
"""

import inspect
import re
from typing import Any

from transformers.models.auto import modeling_auto

#: kind of architecture to the auto mapping that lists its members
KINDS = {
    "causal LM": "CAUSAL_LM",
    "masked LM": "MASKED_LM",
    "seq2seq LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "image-text": "IMAGE_TEXT_TO_TEXT",
    "image classification": "IMAGE_CLASSIFICATION",
    "dual encoder": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "CTC": "CTC",
    "speech seq2seq": "SPEECH_SEQ_2_SEQ",
    "audio classification": "AUDIO_CLASSIFICATION",
}

VOCAB, WIDTH, HEADS, LAYERS, IMAGE, PATCH = 99, 32, 4, 2, 32, 8

#: expressions for whole names of integer fields, and their value; the first that matches counts, None keeps the default
SIZES: list[tuple[str, Any]] = [
    (r"additional_vocab_size|type_vocab_size|.*_multiple_of|patch_embed.*size", None),
    (r".*vocab_size.*|.*_vocab|num_embeddings", VOCAB),
    (r"codebook_size", 64),
    (r"max_.*positions?|max_position_embeddings|.*max_position.*|n_positions|n_ctx|max_seq_len|max_text_len.*", 64),
    (r"num_layers_per_stack|num_conv_layers|num_adapter_layers|num_residual_layers|num_nextn.*|num_mtp.*|num_global_layers", 1),
    (r"layers|.*_layers|num_blocks|.*depth|n_layer|aligner_num_add_layers|num_encoder_blocks|num_self_attends_per_block", LAYERS),
    (r".*key_value_heads.*|.*kv_n?_?heads|.*query_groups|multi_query_group_num", 2),
    (r".*heads?|.*heads_per_layer|decoder_attention_heads", HEADS),
    (r"qk_head_dim", 2 * WIDTH // HEADS),
    (r"mamba_d_head|mamba_head_dim", 2 * WIDTH // HEADS),
    (r".*head_dim|.*_head_size|d_kv|kv_channels|dim_head|d_head|resampler_dim_head", WIDTH // HEADS),
    (r"rotary_dim|index_kpool", 4),
    (r"n_groups", 2),
    (r"first_k_dense_replace|num_dense_layers|decoder_sparse_step|attn_layer_offset", 1),
    (r"full_attention_interval|attn_layer_period", 2),
    (r".*_rank|.*lowrank", 8),
    (r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|d_ff|dff|dim_ff|n_inner|.*mlp_dim|d_inner|feed_forward_size|share_expert_dim|.*intermediate_dim", 48),
    (r"num_experts|.*_num_experts|num_local_experts|n_routed_experts|num_hash", 4),
    (r".*experts_per_tok.*|moe_.*top_?k|num_selected.*|moe_k", 2),
    (r"n_group|topk_group", 1),
    (r"index_topk|index_block_size|index_topk_blocks", 4),
    (r".*hidden_size.*|.*d_model|n_embd|.*embed_dim|dim|emb_dim|.*width|embedding_size|.*hidden_dim|.*embedding_dim|.*_proj_dim|projection_dim|.*projection_size|lru_width|d_latents|output_dim|proj_size|codevector_dim|proj_codevector_dim|classifier_proj_size|.*_proj_size|feature_size|adapter_out_dim|projector_(in|out)put_dim|vision_output_dim|project_dim|.*embedding_size|entity_emb_size|prediction_head_size|dim_model_base|pooler_output_size", WIDTH),
    (r".*image_size|resolution", IMAGE),
    (r"temporal_patch_size", None),
    (r"patch_size", PATCH),
    (r".*state_size|.*d_state", 8),
    (r"num_codevectors_per_group|num_query_tokens|num_latents|.*num_latents|latent_query_num|num_register_tokens", 4),
    (r"num_conv_pos_embeddings|num_conv_pos_embedding_groups", 4),
    (r".*chunk_size|.*chunk_length", 16),
    (r"num_labels", 3),
]  # fmt: skip

#: fields of a configuration class, by its name, that must have a value of their own
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "Mamba2Config": {"head_dim": 16},
    "XLNetConfig": {"d_head": 8, "n_head": 4},
    "ZambaConfig": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2},
    "Zamba2Config": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "EsmConfig": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 4},
    "XmodConfig": {"default_language": "en_XX"},
    "Wav2Vec2BertConfig": {"vocab_size": VOCAB},
    "Wav2Vec2ConformerConfig": {"vocab_size": VOCAB, "conv_dim": (16,) * 7},
    "EsmcConfig": {"num_key_value_heads": 4},
    "Glm5NextTextConfig": {"num_key_value_heads": 4},
    "ReformerConfig": {
        "is_decoder": True,
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (3, 4),
        "attn_layers": ["local", "lsh"],
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    **{
        name: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
        for name in (
            "Qwen2VLTextConfig",
            "Qwen2_5_VLTextConfig",
            "Qwen2_5OmniTextConfig",
            "PaddleOCRTextConfig",
            "Glm4vTextConfig",
            "GlmOcrTextConfig",
        )
    },
    "BambaConfig": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "FalconH1Config": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "GraniteMoeHybridConfig": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "NemotronConfig": {"num_key_value_heads": 4},
    "CvtConfig": {"embed_dim": (16, 16, 32), "num_heads": (1, 2, 2), "depth": (1, 1, 1)},
    "Qwen4ExpTextConfig": {"layer_types": None},
    "BitConfig": {"num_groups": 4},
    "MobileViTConfig": {"hidden_sizes": (16, 16, 16)},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "Speech2TextConfig": {"num_conv_layers": 2},
    "GraniteSpeech5CTCConfig": {"context_size": 32},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "Swinv2Config": {
        "num_heads": (1, 2),
        "depths": (1, 1),
        "embed_dim": 16,
        "image_size": 64,
        "patch_size": 4,
        "window_size": 4,
    },
    "DonutSwinConfig": {
        "num_heads": (1, 2),
        "depths": (1, 1),
        "embed_dim": 16,
        "image_size": 64,
        "patch_size": 4,
        "window_size": 4,
    },
    "SwinConfig": {
        "num_heads": (1, 2),
        "depths": (1, 1),
        "embed_dim": 16,
        "image_size": 64,
        "patch_size": 4,
        "window_size": 4,
    },
    "PerceiverConfig": {"num_self_attention_heads": 1, "num_cross_attention_heads": 1},
    "MuseSparkVisionConfig": {"num_hidden_layers": 4},
    "Molmo2AdapterConfig": {"vision_feature_layer": [0, 1]},
    "Gemma4AssistantConfig": {"hidden_size_per_layer_input": 0},
}


def architectures() -> dict[str, str]:
    """Every architecture of the installed transformers by class name: its kind."""
    found: dict[str, str] = {}
    for kind, mapping in KINDS.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return found


def tiny_config(kind: type, ids: dict[int, int] | None = None) -> Any:
    """A small configuration of this class; configurations inside it are made small as well."""
    return kind(**_changes(kind, {} if ids is None else ids))


def _changes(kind: type, ids: dict[int, int]) -> dict[str, Any]:
    default = kind()
    changes: dict[str, Any] = {}
    for name in inspect.signature(kind.__init__).parameters:
        try:
            value = getattr(default, name)
        except Exception:
            continue
        new = _small(name, value, ids)
        if new is not None:
            changes[name] = new
    for name in getattr(kind, "sub_configs", None) or {}:
        sub = getattr(default, name, None)
        if sub is not None:
            made = _changes(type(sub), ids)
            changes[name] = type(sub)(**made)
    if "qk_rope_head_dim" in changes and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = HEADS  # multi-head latent attention has no grouped queries
    changes.update(EXCEPTIONS.get(kind.__name__, {}))
    return changes


def _small(name: str, value: Any, ids: dict[int, int]) -> Any:
    if value is None:
        return WIDTH // HEADS if name == "head_dim" else None
    if isinstance(value, dict):
        return _sections(value)
    if name in ("layer_types", "mlp_layer_types", "indexer_types") and value:  # a kind for each layer
        kinds = list(dict.fromkeys(value))
        return [*kinds, *kinds][:LAYERS] if len(kinds) > 1 else None
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        if name == "depths":
            return type(value)(1 for _ in value)
        if re.fullmatch(r"conv_dim|hidden_sizes|embed_dims?|.*_channels|layer_depths|tdnn_dim", name):
            return type(value)(v if v < 16 else max(8, v // 8) for v in value)
        return None
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        if re.fullmatch(r".*token_ids?|.*token_index|.*_idx|.*_id", name):
            return ids.setdefault(value, VOCAB - 1 - len(ids)) if value >= 3 else None
        for expression, new in SIZES:
            if re.fullmatch(expression, name):
                return None if new is None else min(new, value)
        return None
    return None


def _sections(rope: dict[str, Any]) -> dict[str, Any] | None:
    """Rotary parameters whose sections sum to half a head's width again."""
    new = {name: _sections(value) or value if isinstance(value, dict) else value for name, value in rope.items()}
    if rope.get("mrope_section"):
        half, count = WIDTH // HEADS // 2, len(rope["mrope_section"])
        new["mrope_section"] = [half - count + 1] + [1] * (count - 1)
    return new if new != rope else None
