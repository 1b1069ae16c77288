"""The tiny models that come with the repository: transformers' own OPT, over bytes.

``tiny`` has read code: 1.1 M parameters, four layers of width 144. ``tiny-prose`` has read English prose: 120 K
parameters, two layers of width 64, so small that a thin LoRA cannot teach it code. Checkpoints are stored in fp16 and
used in fp32; `provenance.json` records the loss after that rounding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM
from transformers.utils import logging

from experiments.tiny.corpus import BOS, VOCABULARY

CONTEXT = 256
"""Bytes per block. With `BOS` in front the model sees one position more."""

COMMITTED = Path(__file__).parents[1] / "tiny-opt"
NAMED: Mapping[str, Path] = {"tiny": COMMITTED, "tiny-prose": Path(__file__).parents[1] / "tiny-prose"}
"""Name -> the folder of a checkpoint that comes with the repository."""


def quiet() -> None:
    """Turn off transformers' progress bars; commands show their own."""
    logging.disable_progress_bar()


def config(width: int = 144, layers: int = 4, heads: int = 3, context: int = CONTEXT) -> OPTConfig:
    """OPT's configuration over bytes: feed-forward of 4 x `width`, no dropout, tied embeddings."""
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        max_position_embeddings=context + 1,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.03,
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=None,
        use_cache=False,
    )


def fresh(configuration: OPTConfig, seed: int) -> OPTForCausalLM:
    """A randomly initialised model; torch's global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(configuration)


def save(model: OPTForCausalLM, folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write `config.json`, `model.safetensors` (fp16) and `provenance.json`; `model` becomes fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    write_provenance(folder, provenance)


def write_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write how the checkpoint in `folder` was made, as `provenance.json`."""
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


def load(folder: Path = COMMITTED) -> OPTForCausalLM:
    """The model in `folder`, fp32, in evaluation mode.

    Raises:
        FileNotFoundError: there is no checkpoint in `folder`.
    """
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"model={str(folder)!r} has no model.safetensors; make one with "
            f"`python -m experiments pretrain --out {folder}`"
        )
    return OPTForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()
