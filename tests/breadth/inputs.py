"""Inputs that an architecture's forward takes: tried from the fullest to the plainest."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.breadth.tiny import IMAGE


def inputs_for(model: nn.Module) -> dict[str, Any]:
    """Inputs that the model takes, with the token counts and sizes that it asks for.

    Raises:
        RuntimeError: none of those that are known is taken; the message has the last reason.
    """
    reasons = []
    plain = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for candidate in _candidates(model):
        candidate = {**candidate, **plain}
        try:
            with torch.no_grad():
                if output_of(model, candidate) is not None:
                    return candidate
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise RuntimeError(f"no input is taken: {'; '.join(dict.fromkeys(reasons))}")


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """The logits, or the first floating-point tensor of the output."""
    output = model(**inputs)
    values = list(output.values()) if isinstance(output, dict) else list(output)
    named = [output.get(n) for n in ("logits", "logits_per_image", "spectrogram")] if isinstance(output, dict) else []
    for value in (*named, *values):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value
    return None


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    ids = torch.arange(24).view(2, 12) * 7 % 60 + 3
    text: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    text["mm_token_type_ids"] = torch.zeros_like(ids)
    text = {name: value for name, value in text.items() if name in takes}
    decoder = {"decoder_input_ids": ids[:, :6]} if "decoder_input_ids" in takes else {}
    main = getattr(model, "main_input_name", "input_ids")
    sizes = _image_sizes(config)
    if "pixel_values" in takes and main == "pixel_values":
        for channels in (_find(config, "num_channels") or 3, 3):
            for height, width in sizes:
                yield {"pixel_values": _draw(2, channels, height, width), **decoder}
                yield {"pixel_values": _draw(2, 4, channels, height, width), **decoder}
    for name in ("input_features", "input_values", "inputs", "audio_values"):
        if name not in takes:
            continue
        if name == "inputs":
            for size, channels in ((56, 3), (32, 3), (224, 3)):
                yield {name: _draw(2, channels, size, size)}
        bins = [
            _find(config, n)
            for n in ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim")
        ]
        for width in dict.fromkeys([b for b in bins if b] + [80, 128, 160]):
            for length in (64, 128, 200, 1024, 3000):
                yield {name: _draw(2, length, width), **decoder}
                yield {name: _draw(2, width, length), **decoder}
                yield {name: _draw(2, width, length), **decoder, "attention_mask": torch.ones(2, length).long()}
        for length in (4000, 16000):
            yield {name: _draw(2, length), **decoder}
            yield {name: _draw(2, 1, length), **decoder}
    if "pixel_values" in takes and "input_ids" in takes:
        for height, width in sizes:
            yield {**text, "pixel_values": _draw(2, 3, height, width), **decoder}
    if "input_ids" in takes:
        yield {**text, **decoder}
        yield {**text, "decoder_input_ids": ids}
        if "bbox" in takes:
            yield {**text, "bbox": torch.ones(2, 12, 4).long()}
        codes = ids.view(2, 12, 1) % 20
        yield {"input_ids": codes.expand(2, 12, 4).contiguous()}
        yield {"input_ids": torch.arange(128).view(2, 64) * 7 % 60 + 3}


def _image_sizes(config: Any) -> list[tuple[int, int]]:
    size = _find(config, "image_size") or IMAGE
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return list(dict.fromkeys([size, (IMAGE, IMAGE), (64, 64), (224, 224)]))  # type: ignore[list-item]


def _find(config: Any, name: str) -> Any:
    for one in (config, *(getattr(config, sub, None) for sub in getattr(config, "sub_configs", None) or {})):
        value = getattr(one, name, None)
        if value is not None:
            return value
    return None
