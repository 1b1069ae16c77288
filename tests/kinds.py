"""A tiny model for each kind of layer that reads its weight, and how a test puts links on it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPERTS, TOKENS = 3, 10


class Experts(nn.Module):
    """Fused experts as transformers reads them: E×out×in one by one, gathered for each token, or in groups."""

    def __init__(self, read: str = "one by one", is_transposed: bool = False, inner: int = 8, out: int = 16) -> None:
        super().__init__()
        self.read, self.is_transposed = read, is_transposed
        self.proj = nn.Parameter(
            torch.empty(EXPERTS, inner, out) if is_transposed else torch.empty(EXPERTS, out, inner)
        )

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(len(x)) * EXPERTS // len(x)  # sorted, and each expert has tokens
        if self.read == "gathered":
            mine = self.proj[chosen]
            if self.is_transposed:
                return torch.bmm(x.unsqueeze(1), mine).squeeze(1)
            return torch.bmm(mine, x.unsqueeze(-1)).squeeze(-1)
        if self.read == "grouped":
            ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0, dtype=torch.int32)
            return F.grouped_mm(x, self.proj if self.is_transposed else self.proj.transpose(-2, -1), offs=ends)
        parts = []
        for expert in range(EXPERTS):
            rows, one = x[chosen == expert], self.proj[torch.tensor(expert)]
            parts.append(rows @ one if self.is_transposed else F.linear(rows, one))
        return torch.cat(parts)


class Scaled(nn.Linear):
    """A linear layer with a forward of its own, which reads the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x @ self.weight.t()) + self.bias


class Shared(nn.Module):
    """Tokens and positions looked up, and an output head on the tokens' matrix."""

    def __init__(self, vocabulary: int = 9, width: int = 8) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(TOKENS, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids) + self.positions(torch.arange(ids.shape[-1]))))


class Attention(nn.Module):
    """An attention on itself."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Mixed(nn.Module):
    """Each kind of layer in one model of 6 inputs and 3 outputs, for runs of several processes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Scaled(6, 8)
        self.table = nn.Embedding(5, 8)
        self.experts = nn.Parameter(torch.empty(EXPERTS, 8, 8))
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(16, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        signs = (x[:, :4] > 0).sum(1)
        h = torch.tanh(self.first(x) + self.table(signs))
        chosen = F.one_hot(signs % EXPERTS, EXPERTS).to(h.dtype)
        h = torch.tanh(sum(chosen[:, e : e + 1] * F.linear(h, one) for e, one in enumerate(self.experts)))
        h = torch.tanh(self.conv(h.unflatten(1, (2, 4))))
        return self.head(self.attention(h, h, h, need_weights=False)[0].flatten(1))


@dataclass(frozen=True)
class Kind:
    """How a tiny model of one kind is made, what it takes and which of its layers carry links."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    looks_up: bool = False

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model, whose weights follow from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
        return model.to(dtype)

    def inputs(self, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """The inputs of one step."""
        g = torch.Generator().manual_seed(step)
        if self.looks_up:
            return torch.randint(9, self.shape, generator=g)
        return torch.randn(self.shape, generator=g).to(dtype)


def _experts(read: str, is_transposed: bool) -> Kind:
    return Kind(functools.partial(Experts, read, is_transposed), (TOKENS, 8), ("proj",))


def _conv(make: Callable[[], nn.Module], *shape: int) -> Kind:
    return Kind(lambda: nn.Sequential(make()), (2, *shape), ("0",))


KINDS: dict[str, Kind] = {
    **{f"experts {read}": _experts(read, False) for read in ("one by one", "gathered", "grouped")},
    **{f"experts in×out {read}": _experts(read, True) for read in ("one by one", "gathered", "grouped")},
    "embedding": Kind(lambda: nn.Sequential(nn.Embedding(9, 8, padding_idx=1)), (2, 6), ("0",), looks_up=True),
    "shared embedding": Kind(Shared, (2, 6), ("tokens", "positions"), looks_up=True),
    "conv1d": _conv(lambda: nn.Conv1d(4, 6, 3, padding="same"), 4, 7),
    "conv2d": _conv(lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding_mode="circular", padding=1), 4, 6, 5),
    "conv2d in groups": _conv(lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False), 4, 7, 6),
    "conv2d channels last": _conv(lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), 4, 5, 5),
    "conv3d": _conv(lambda: nn.Conv3d(3, 4, 2, stride=(1, 2, 1)), 3, 3, 4, 3),
    "attention": Kind(Attention, (2, 5, 8), ("attention.in_proj_weight", "attention.out_proj")),
    "attention, batch second": Kind(
        lambda: Attention(False), (5, 2, 8), ("attention.in_proj_weight", "attention.out_proj")
    ),
    "encoder layer": Kind(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        (2, 5, 8),
        ("self_attn.in_proj_weight", "self_attn.out_proj"),
    ),
    "linear of one's own": Kind(lambda: nn.Sequential(Scaled(8, 6)), (4, 8), ("0",)),
}
