"""Training FLOPs of a causal language model with adapters, from its configuration alone; no model is made.

Counted are matrix products, 2·m·k·n for (m×k)(k×n), as `torch.utils.flop_counter` does, with which every number here
agrees exactly when attention is eager (`attn_implementation="eager"`): a fused kernel recomputes products that autograd
keeps. Norms, activations, biases, rotations and the loss are elementwise and count nothing there or here, and neither
do embeddings, which are look-ups. (transformers 4 forms the angles of rotary embeddings by a small product, which torch
counts and we do not; transformers 5 multiplies elementwise.)

A linear layer `y = W x` of n tokens costs 2·n·in·out forward, the same again for the gradient of x **if anything below
needs it**, and the same again for the gradient of W if W is trained. With frozen W's, nothing below the first adapted
layer needs a gradient, and in the first adapted block only what depends on an adapter does: with adapters on queries
and values the first block's keys need none. An adapter of rank r, `s·B(A x)`, costs

    forward    2·n·r·(in + out)
    backward   2·n·r·(in + out)    the gradients of A and B
             + 2·n·r·out           the gradient of A x
             + 2·n·r·in            the gradient of x, if needed

so 6·n·r·(in + out), or 4·n·r·in + 6·n·r·out where x needs no gradient. `cola`'s layer (one autograd function) and
PEFT's (two linear layers) do the same products, so both are counted alike. Dropout and the scaling s are elementwise.
`cola`'s layer adds `B(A x)`, and A's part of the gradient of x, in place (`aten.addmm_`), which torch's counter takes
for nothing unless its `custom_mapping` names it.

The cost is linear in r. A second link of rank r₂ instead of r₁ therefore saves (`saved_by_rank`)

    (r₁ − r₂) · Σ_{tokens of the second link} c,      c = Σ_{adapters} 6·(in + out) − Σ_{inputs without gradient} 2·in

FLOPs, the "FLOPs saved" of the paper's Table 4. Its figures are proportional to 8 − r₂ and imply, with OPT-1.3B's c of
1,171,456, some 153,700 (CB), 18,300 (WSC) and 222,400 (WiC) tokens. Two epochs of the protocol's batches, a row per
candidate, padded to a multiple of 8, WSC with the 54 examples that the protocol leaves it, have 151,100 ± 6,600,
18,400 ± 1,700 and 226,200 ± 700 (mean ± standard deviation over draws). So the figures agree with those of one run,
within 2 %, and not with a sum over five.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

QUERY_AND_VALUE = ("q_proj", "v_proj")
"""The layers that get adapters in the paper."""

PAPER_PER_ADAPTER_PARAMETER = 6
"""FLOPs per token and trained parameter by the rule of thumb 6·N·n (2 forward, 4 backward)."""


@dataclass(frozen=True)
class Linear:
    """One weight matrix.

    Attributes:
        name: the last part of the module's name, such as `q_proj`.
        inner: its input's width, "in" above.
        out: its output's width.
    """

    name: str
    inner: int
    out: int


@dataclass(frozen=True)
class Architecture:
    """The matrix products of a decoder, in the order of its forward.

    Attributes:
        layers: number of blocks.
        attention: q, k, v and the output projection.
        heads: attention heads of the queries; keys and values of fewer heads are repeated before the products.
        head_dim: width of a head.
        mlp: the linear layers that read the block's stream (up, or gate and up), then the one that writes to it.
        before: linear layers between the embeddings and the blocks.
        after: linear layers between the blocks and the logits, the output embedding last.
    """

    layers: int
    attention: tuple[Linear, Linear, Linear, Linear]
    heads: int
    head_dim: int
    mlp: tuple[Linear, ...]
    before: tuple[Linear, ...]
    after: tuple[Linear, ...]

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """What a transformers configuration describes.

        Args:
            config: of an OPT, or of a Llama or a model built like it (Mistral, Qwen2).

        Raises:
            ValueError: another kind of model.
        """
        kind = getattr(config, "model_type", type(config).__name__)
        if kind == "opt":
            return cls._opt(config)
        if kind in ("llama", "mistral", "qwen2"):
            return cls._llama(config)
        raise ValueError(
            f"config.model_type={kind!r}: FLOPs are counted for opt, llama, mistral and qwen2; describe another "
            "decoder as an Architecture of its linear layers"
        )

    @classmethod
    def _opt(cls, config: Any) -> Architecture:
        width, inner, embedding = config.hidden_size, config.ffn_dim, config.word_embed_proj_dim
        projected = embedding != width
        return cls(
            layers=config.num_hidden_layers,
            attention=(
                Linear("q_proj", width, width),
                Linear("k_proj", width, width),
                Linear("v_proj", width, width),
                Linear("out_proj", width, width),
            ),
            heads=config.num_attention_heads,
            head_dim=width // config.num_attention_heads,
            mlp=(Linear("fc1", width, inner), Linear("fc2", inner, width)),
            before=(Linear("project_in", embedding, width),) if projected else (),
            after=(
                *((Linear("project_out", width, embedding),) if projected else ()),
                Linear("lm_head", embedding, config.vocab_size),
            ),
        )

    @classmethod
    def _llama(cls, config: Any) -> Architecture:
        width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or width // heads
        return cls(
            layers=config.num_hidden_layers,
            attention=(
                Linear("q_proj", width, heads * head_dim),
                Linear("k_proj", width, kv_heads * head_dim),
                Linear("v_proj", width, kv_heads * head_dim),
                Linear("o_proj", heads * head_dim, width),
            ),
            heads=heads,
            head_dim=head_dim,
            mlp=(
                Linear("gate_proj", width, inner),
                Linear("up_proj", width, inner),
                Linear("down_proj", inner, width),
            ),
            before=(),
            after=(Linear("lm_head", width, config.vocab_size),),
        )

    @property
    def adaptable(self) -> tuple[str, ...]:
        """Names of the layers that may carry adapters: all but the output embedding."""
        return tuple(
            layer.name for layer in (*self.before, *self.attention, *self.mlp, *self.after) if layer.name != "lm_head"
        )


@dataclass(frozen=True)
class Trained:
    """What is trained.

    Attributes:
        rank: of the adapters; 0 for none.
        targets: names of the layers that carry them, or `("all-linear",)`.
        weights: whether all weights are trained (full fine-tuning) instead.
    """

    rank: int = 0
    targets: tuple[str, ...] = QUERY_AND_VALUE
    weights: bool = False

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank={self.rank}: must be 0 (no adapters) or positive")
        if self.rank and self.weights:
            raise ValueError(f"rank={self.rank} with weights=True: train adapters on frozen weights, or all weights")

    def names(self, model: Architecture) -> frozenset[str]:
        """The layers of `model` that carry adapters.

        Raises:
            ValueError: a target that the model has not.
        """
        if not self.rank:
            return frozenset()
        if self.targets == ("all-linear",):
            return frozenset(model.adaptable)
        missing = [name for name in self.targets if name not in model.adaptable]
        if missing or not self.targets:
            raise ValueError(
                f"targets={self.targets}: name some of the model's linear layers ({', '.join(model.adaptable)}) "
                "or ('all-linear',)"
            )
        return frozenset(self.targets)


FULL = Trained(weights=True)
"""Full fine-tuning."""
NOTHING = Trained()
"""Evaluation: no backward."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of forward and backward; the adapters' share is included in both and named beside them."""

    forward: int = 0
    backward: int = 0
    adapter_forward: int = 0
    adapter_backward: int = 0

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def adapters(self) -> int:
        """The adapters' share of `total`."""
        return self.adapter_forward + self.adapter_backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.adapter_forward + other.adapter_forward,
            self.adapter_backward + other.adapter_backward,
        )


def batch_flops(config: Any, rows: int, length: int, trained: Trained, *, kept: int | None = None) -> Flops:
    """One forward and backward of a batch, without gradient checkpointing.

    Args:
        config: a transformers configuration (`Architecture.of`), or an `Architecture`.
        rows: sequences in the batch. A classification example of K candidates makes K of them.
        length: tokens in each, padding included: padding is computed like any token.
        trained: what is trained; nothing means forward only.
        kept: positions of each row that logits are computed for (transformers' `logits_to_keep`); None for all.

    Raises:
        ValueError: no rows or tokens, a model that is not known, targets that it has not.

    Example:
        >>> from transformers import OPTConfig
        >>> opt = OPTConfig(
        ...     hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32, word_embed_proj_dim=2048
        ... )
        >>> step = batch_flops(opt, rows=8, length=128, trained=Trained(rank=8))
        >>> f"{step.total:.3e}, adapters {step.adapters / step.total:.2%}"
        '5.430e+12, adapters 0.18%'
    """
    if rows < 1 or length < 1:
        raise ValueError(f"rows={rows}, length={length}: a batch has at least one row of one token")
    if kept is not None and not 1 <= kept <= length:
        raise ValueError(f"kept={kept}: from 1 to length={length} positions of a row have logits")
    model = config if isinstance(config, Architecture) else Architecture.of(config)
    walk = _Walk(rows * length, trained.rank, trained.names(model), trained.weights)
    #: one head's product of queries and keys; that of probabilities and values is as large
    product = 2 * rows * model.heads * length * length * model.head_dim
    q_proj, k_proj, v_proj, out = model.attention
    *readers, writer = model.mlp

    stream = trained.weights  # does the residual stream need a gradient? From the embeddings on, if they are trained
    for layer in model.before:
        stream = walk.linear(layer, stream)
    for _ in range(model.layers):
        q, k, v = (walk.linear(layer, stream) for layer in (q_proj, k_proj, v_proj))
        probabilities = walk.matmul(product, q, k)
        context = walk.matmul(product, probabilities, v)
        stream = walk.linear(out, context) or stream
        inner = [walk.linear(layer, stream) for layer in readers]
        stream = walk.linear(writer, any(inner)) or stream
    *projections, head = model.after
    for layer in projections:
        stream = walk.linear(layer, stream)
    walk.tokens = rows * (kept or length)
    walk.linear(head, stream)
    return Flops(walk.forward, walk.backward, walk.adapter_forward, walk.adapter_backward)


def run_flops(config: Any, batches: Iterable[tuple[int, int]], trained: Trained) -> Flops:
    """The sum of `batch_flops` over `batches` of (rows, length): a link, an epoch, a run."""
    model = config if isinstance(config, Architecture) else Architecture.of(config)
    total = Flops()
    for rows, length in batches:
        total += batch_flops(model, rows, length, trained)
    return total


def per_token_and_rank(config: Any, targets: tuple[str, ...] = QUERY_AND_VALUE) -> int:
    """c of this module's equation: the adapters' FLOPs for one token at rank 1, forward and backward."""
    return batch_flops(config, 1, 1, Trained(1, targets)).adapters


def saved_by_rank(
    config: Any, tokens: int, rank: int, reference: int = 8, targets: tuple[str, ...] = QUERY_AND_VALUE
) -> int:
    """FLOPs that a link of `rank` saves against one of rank `reference`: (reference − rank)·tokens·c.

    Args:
        config: as in `batch_flops`.
        tokens: that the link is trained on: every row (candidate) of every batch of its epochs, with padding.
        rank: of the link.
        reference: the rank it is compared with, the paper's 8.
        targets: the adapted layers.
    """
    if min(rank, reference) < 1 or tokens < 0:
        raise ValueError(f"rank={rank}, reference={reference}, tokens={tokens}: ranks are positive, tokens at least 0")
    return (reference - rank) * tokens * per_token_and_rank(config, targets)


def implied_tokens(
    saved: float, config: Any, rank: int, reference: int = 8, targets: tuple[str, ...] = QUERY_AND_VALUE
) -> float:
    """The tokens over which a link of `rank` saves `saved` FLOPs: the inverse of `saved_by_rank`."""
    if rank == reference:
        raise ValueError(f"rank={rank} is the reference's: it saves nothing, whatever the tokens")
    return saved / ((reference - rank) * per_token_and_rank(config, targets))


@dataclass
class _Walk:
    """A forward that carries, instead of values, whether each needs a gradient, and counts products as it goes."""

    tokens: int
    rank: int
    adapted: frozenset[str]
    weights: bool
    forward: int = field(default=0, init=False)
    backward: int = field(default=0, init=False)
    adapter_forward: int = field(default=0, init=False)
    adapter_backward: int = field(default=0, init=False)

    def linear(self, layer: Linear, needed: bool) -> bool:
        """A linear layer on an input whose gradient is `needed`; returns whether its output's is."""
        product = 2 * self.tokens * layer.inner * layer.out
        self.forward += product
        self.backward += product * (needed + self.weights)
        if layer.name not in self.adapted:
            return needed or self.weights
        down, up = 2 * self.tokens * layer.inner * self.rank, 2 * self.tokens * self.rank * layer.out
        backward = (down + up) + up + (down if needed else 0)
        self.forward += down + up
        self.backward += backward
        self.adapter_forward += down + up
        self.adapter_backward += backward
        return True

    def matmul(self, product: int, left: bool, right: bool) -> bool:
        """A product of two activations; each gradient that is needed costs as much as the product."""
        self.forward += product
        self.backward += product * (left + right)
        return left or right
