"""How PEFT's format stores the factors of one layer, by the form in which the layer uses its weight.

`LayerPrint` lists the forms. Of E matrices PEFT stores A as (E·r)×in and B as out×(r·E), the experts' columns
interleaved. It wraps a module once per adapted parameter, so that all but the module's last one are found deeper.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cola.chain.fingerprint import Fingerprint
from cola.lora.link import Factor

Pair = tuple[Tensor, Tensor]

#: forms of layers whose path is a parameter's own name
_PARAMETERS = ("parameter", "attention input")
#: where PEFT's layer for nn.MultiheadAttention keeps its output projection
_OUTPUT = ".base_layer.out_proj"
#: parameters that experts hold in this order, as transformers registers them
_EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Forms:
    """The forms of a chain's layers.

    Args:
        of: form by path, in the model's order.
        base: the base model's fingerprint, if it is known.
    """

    of: Mapping[str, str]
    base: Fingerprint | None = None

    def require_known(self) -> None:
        """Raise ValueError if PEFT's format has no place for a layer."""
        for path, form in self.of.items():
            reason = None
            if form == "attention output":
                reason = "because PEFT 0.21 adds the update of nn.MultiheadAttention's output projection twice"
            elif form == "linear with own forward":
                reason = "because PEFT adds B A x to the output, and the layer's own forward may do something else"
            elif form == "table":
                reason = (
                    "because PEFT looks up the layer's inputs themselves, and its own forward makes indices of them"
                )
            elif form == "grouped convolution":
                reason = "because PEFT convolves without its groups, dilation and padding"
            elif form == "parameter" and "." not in path:
                reason = "because it is a parameter of the model itself, and PEFT wraps the module that has a parameter"
            elif form == "parameter" and path.rpartition(".")[2].isdigit():
                reason = "because PEFT wraps the module that has a parameter, and a wrapped list has no items"
            elif form == "convolution" and (self.base is None or path not in self.base.layers):
                reason = "because the size of its kernel is not known: apply the chain to the base model first"
            elif form == "embedding" and self.heads(path) and not self._are_tied(path):
                reason = f"which shares its weight with {self.heads(path)[0]!r}: PEFT would adapt it at one place alone"
            if reason is not None:
                raise ValueError(
                    f"an adapter in PEFT's format cannot hold layer {path!r}, {reason}. Save the merged model "
                    "instead, or leave the layer out of training (exclude_modules)"
                )

    def modules(self) -> list[str]:
        """Paths of the modules that PEFT adapts as a whole."""
        whole = {path: form for path, form in self.of.items() if form != "parameter"}
        return [path.rpartition(".")[0] if form == "attention input" else path for path, form in whole.items()]

    def parameters(self) -> list[str]:
        """Names of the parameters that PEFT adapts by themselves."""
        return [path for path, form in self.of.items() if form == "parameter"]

    def heads(self, path: str) -> list[str]:
        """Paths of the layers that share an embedding's weight."""
        built = self.base.architecture if self.base is not None else None
        shared = built.shared.get(f"{path}.weight", ()) if built is not None else ()
        return [name.removesuffix(".weight") for name in shared]

    def _are_tied(self, path: str) -> bool:
        """Whether PEFT 0.21 adapts an embedding and its heads together: in transformers' models, by these names."""
        built = self.base.architecture if self.base is not None else None
        named = path.endswith("embed_tokens") and self.heads(path) == ["lm_head"]
        return built is not None and built.model_type is not None and named

    def ties(self) -> bool:
        """Whether an embedding that shares its weight is adapted."""
        return any(form == "embedding" and self.heads(path) for path, form in self.of.items())

    def tensors(self, path: str, A: Tensor, B: Tensor, rank: int) -> dict[str, Tensor]:
        """The layer's tensors by their keys, padded with zeros to ``rank``; the scale is in B."""
        form, extra = self.of[path], rank - A.shape[-2]
        A, B = pad(A, (0, 0, 0, extra)), pad(B, (0, extra))
        if form == "embedding":
            found = {f"{path}.lora_embedding_A": A, f"{path}.lora_embedding_B": B}
            for head in self.heads(path):
                found.update(_pair(head, B.mT.contiguous(), A.mT.contiguous()))
            return found
        if form == "convolution":
            assert self.base is not None
            shape = self.base.layers[path].shape
            return _pair(path, A.reshape(rank, *shape[1:]), B.reshape(*B.shape, *[1] * (len(shape) - 2)))
        if form not in _PARAMETERS:
            return _pair(path, A, B)
        owner = path.rpartition(".")[0]
        if form == "attention input":
            return {**_pair(owner, A, B), **_pair(owner + _OUTPUT, torch.zeros_like(A), B.new_zeros(A.shape[1], rank))}
        siblings = [other for other in self.parameters() if other.rpartition(".")[0] == owner]
        owner += ".base_layer" * (len(siblings) - 1 - siblings.index(path))
        if A.dim() == 3:
            A, B = A.flatten(end_dim=1), B.permute(1, 2, 0).flatten(1).contiguous()
        return _pair(owner, A, B)


def forms_of(factors: Mapping[str, Factor], base: Fingerprint | None) -> Forms:
    """The forms of the layers that have these factors."""
    return Forms({path: factor.form for path, factor in factors.items()}, base)


def without_heads(factors: Mapping[str, Factor]) -> dict[str, Factor]:
    """The factors without an embedding's own that PEFT stores once more, for the head that shares its weight."""
    embeddings = [f for f in factors.values() if f.form == "embedding"]
    return {
        path: factor
        for path, factor in factors.items()
        if factor.form != "linear"
        or not any(torch.equal(factor.A, f.B.mT) and torch.equal(factor.B, f.A.mT) for f in embeddings)
    }


def attentions(keys: Iterable[str]) -> set[str]:
    """Paths of the nn.MultiheadAttention modules that an adapter's keys show."""
    return {key.partition(_OUTPUT + ".lora_A")[0] for key in keys if _OUTPUT + ".lora_A" in key}


def read(
    layer: str, A: Tensor, B: Tensor, r: int, parameters: Sequence[str], *, attention: bool = False
) -> tuple[str, Tensor, Tensor, str] | str:
    """One layer of an adapter: path, A, B and form; or why it cannot be read, as the end of a sentence.

    Args:
        layer: the path in the adapter's keys.
        A, B: as stored.
        r: the layer's rank.
        parameters: ``target_parameters`` of the configuration.
        attention: whether the layer is one of `attentions`.
    """
    if A.dim() > 2:
        return layer, A.flatten(1), B.flatten(1), "convolution"
    if layer.endswith(_OUTPUT):
        if A.any() and B.any():
            return "is the output projection of nn.MultiheadAttention, whose update PEFT 0.21 adds twice"
        return f"{layer.removesuffix(_OUTPUT)}.out_proj", A, B, "attention output"
    if attention:
        return f"{layer}.in_proj_weight", A, B, "attention input"
    owner = layer.replace(".base_layer", "")
    named = [name for name in parameters if f".{owner}.{_last(name)}".endswith(f".{name}")]
    if not named or (f"{owner}.weight").endswith(tuple(named)):
        return layer, A, B, "linear"
    order = [name for name in _EXPERTS if name in map(_last, named)]
    if len(named) > 1 and len(order) != len(named):
        return "adapts several parameters of one module, whose order the file does not tell"
    order = order if len(named) > 1 else [_last(named[0])]
    depth = layer.count(".base_layer")
    if depth >= len(order):
        return "wraps more parameters of the module than target_parameters names"
    experts = A.shape[0] // r
    if experts * r != A.shape[0] or B.shape[1] != A.shape[0]:
        return f"has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, and no number of experts of rank {r} fits"
    if experts > 1:
        A, B = A.reshape(experts, r, -1), B.reshape(B.shape[0], r, experts).permute(2, 0, 1).contiguous()
    return f"{owner}.{order[len(order) - 1 - depth]}", A, B, "parameter"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _pair(path: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
