"""FLOPs of LoRA adapters per token and rank, as `torch.utils.flop_counter` counts them on a model without weights.

The cost of an adapter `s·B(A x)` is linear in its rank. A second link of rank r₂ instead of r₁ therefore saves
(r₁ − r₂) · tokens · c FLOPs, the "FLOPs saved" of the paper's Table 4, where c is `per_token_and_rank`. A layer of
in × out adds 6·(in + out) to c: 2 in the forward pass, 4 in the backward. If its input
needs no gradient, as in the first block, it adds 2·in less.

The paper's figures are proportional to 8 − r₂. With c = 1,171,456 for OPT-1.3B they imply some 153,700 (CB), 18,300
(WSC) and 222,400 (WiC) tokens. Two epochs of the protocol's batches (a row per candidate, padded to a multiple of 8,
WSC with the 54 examples that the protocol leaves it) have 151,100 ± 6,600, 18,400 ± 1,700 and 226,200 ± 700 tokens
(mean ± standard deviation over draws). So the figures agree with one run, within 2 %, not with a sum over five.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.methods import QUERY_AND_VALUE


def per_token_and_rank(config: Any, targets: Sequence[str] = QUERY_AND_VALUE) -> int:
    """The adapters' FLOPs for one token at rank 1, forward and backward, without gradient checkpointing.

    Args:
        config: a transformers configuration of a causal language model.
        targets: names of the layers that carry adapters.

    Raises:
        ValueError: transformers has no such model, or the model has no layer of these names.

    Example:
        >>> from transformers import OPTConfig
        >>> one_layer = OPTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=64)
        >>> per_token_and_rank(one_layer)  # q and v: 6·(64 + 64) each, less 2·64, since their input needs no gradient
        1280
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # shapes only: no memory, no arithmetic
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False)
        ids = torch.zeros(1, 1, dtype=torch.long)
    carriers = [layer for path, layer in model.named_modules() if f".{path}".endswith(tuple(f".{t}" for t in targets))]
    if not carriers:
        raise ValueError(f"targets={tuple(targets)}: a model of type {config.model_type!r} has no layer of these names")
    counted = []
    for rank in (1, 2):
        hooks = [layer.register_forward_hook(_adapter(rank)) for layer in carriers]
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum().backward()
        counted.append(counter.get_total_flops())
        for hook in hooks:
            hook.remove()
    return counted[1] - counted[0]


def _adapter(rank: int) -> Any:
    def add(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        a = torch.empty(inputs[0].shape[-1], rank, device="meta", requires_grad=True)
        b = torch.empty(rank, out.shape[-1], device="meta", requires_grad=True)
        return out + inputs[0] @ a @ b

    return add
