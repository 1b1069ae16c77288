"""Recognises the base model that a chain belongs to, by a fingerprint of all its parameters and persistent buffers.

A tensor's digest is the SHA-256 of its bytes in logical order. It is the same for every device, sharding and thread
count, and changes with every edit. It costs one pass over the weights, and is remembered until a tensor changes (edits
in place through ``.data`` go unseen, as they do in autograd). Hashing takes several tensors at once, at about 0.7 GB/s
per core (on a processor with SHA instructions).
"""

import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cola.chain.architecture import Architecture
from cola.common.distributed import is_sharded, shared_out, whole

_PIECE = 1 << 25  # bytes fetched from a device at a time
_SMALL = 1 << 20  # bytes up to which threads cost more than they save


@dataclass(frozen=True)
class LayerPrint:
    """The print of an adapted layer's weight.

    Attributes:
        shape: as stored.
        dtype: e.g. ``"bfloat16"``.
        transposed: whether it is stored in×out (transformers' Conv1D).
        digest: of its bytes; None if they could not be read (a tensor on the meta device).
        form: how the layer uses it: ``"linear"``, ``"embedding"``, ``"table"`` (an embedding with a forward of its own,
            as of positions), ``"linear with own forward"``, ``"convolution"`` (``"grouped convolution"`` if it has
            groups, dilation or padding other than zeros), ``"attention output"`` (of nn.MultiheadAttention), or, if the
            path is the weight's own name, ``"attention input"`` or ``"parameter"``.
    """

    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    digest: str | None
    form: str = "linear"


@dataclass(frozen=True)
class TensorPrint:
    """The print of any other parameter, or a persistent buffer; the digest is also None if it is not known.

    Attributes:
        shape, dtype, digest: as in `LayerPrint`.
        without: rows that the digest takes as zeros, because a chain brings its own (``trainable_token_indices``). New
            tokens' rows are drawn anew whenever the embedding is resized.
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str | None
    without: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values; older chains do not have ``without``."""
        found = {"shape": self.shape, "dtype": self.dtype, "digest": self.digest}
        return {**found, "without": list(self.without)} if self.without else found


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a chain's base model.

    Attributes:
        layers: prints of the adapted layers, by path.
        name: hub name or directory that the model says it came from; informal, never compared.
        others: prints of all other parameters and persistent buffers, by name; None if only layers were read.
        architecture: of the model; never compared, and None if it was not recorded.
    """

    layers: Mapping[str, LayerPrint] = field(default_factory=dict)
    name: str | None = None
    others: Mapping[str, TensorPrint] | None = None
    architecture: Architecture | None = field(default=None, compare=False)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits for the whole."""
        parts = [f"{path} {_about(layer)}" for path, layer in sorted(self.layers.items())]
        parts += [f"{name} {other.to_json()}" for name, other in sorted((self.others or {}).items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        name = "" if self.name is None else f", name={self.name!r}"
        layers = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)}"
        return f"Fingerprint({self.digest}, {layers}{name})"

    def prints(self) -> dict[str, LayerPrint | TensorPrint]:
        """All prints, by the name of the tensor."""
        return {**{weight_of(path, layer.form): layer for path, layer in self.layers.items()}, **(self.others or {})}

    def differences(self, tensors: Mapping[str, Tensor], *, all_of_it: bool = True) -> "Iterator[Difference]":
        """Yield where tensors differ from this base model's. Names, shapes and dtypes come first, as they are free.

        Args:
            tensors: by name.
            all_of_it: they are a whole model. False (for a file of weights) compares just the tensors that are there.

        >>> base = Fingerprint(others=prints_of({"head.weight": torch.ones(2, 2)}))
        >>> [difference.how for difference in base.differences({"head.weight": torch.zeros(2, 2)})]
        ["'head.weight' has other values than in the chain's base"]
        """
        prints = self.prints()
        titles = {weight_of(path, layer.form): f"layer {path!r}" for path, layer in self.layers.items()}
        for name in prints if all_of_it else ():
            if name not in tensors:
                yield Difference(name, False, f"the chain's base has {name!r}, which is missing here")
        for name in tensors if all_of_it and self.others is not None else ():
            if name not in prints:
                yield Difference(name, False, f"{name!r} is here, and the chain's base does not have it")
        both = {name: tensors[name] for name in prints if name in tensors}
        for name, tensor in both.items():
            title, mine = titles.get(name, repr(name)), prints[name]
            shape, dtype = tuple(tensor.shape), dtype_name(tensor)
            if mine.shape != shape:
                yield Difference(name, False, f"{title} is {shape}, in the chain's base it is {mine.shape}")
            elif mine.dtype != dtype:
                how = f"{title} is {dtype}, in the chain's base it is {mine.dtype}: load it as that"
                yield Difference(name, False, how)
        known = {name: tensor for name, tensor in both.items() if prints[name].digest is not None}
        without = {name: one.without for name, one in prints.items() if isinstance(one, TensorPrint) and one.without}
        for name, digest in digests(known, without).items():
            if digest is None:
                yield Difference(name, False, f"{name!r} has no values to compare (it is on the meta device): load it")
            elif digest != prints[name].digest:
                title = f"the weight of {titles[name]}" if name in titles else repr(name)
                yield Difference(name, True, f"{title} has other values than in the chain's base")

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        others = None if self.others is None else {name: other.to_json() for name, other in self.others.items()}
        layers = {path: _about(layer) for path, layer in self.layers.items()}
        found = {"name": self.name, "layers": layers, "others": others}
        return found if self.architecture is None else {**found, "architecture": self.architecture.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fingerprint":
        """Reverse `to_json`.

        Raises:
            KeyError, TypeError, AttributeError: the values do not describe a fingerprint.
        """
        layers = {}
        for path, one in prints_from_json(value["layers"]).items():
            transposed = value["layers"][path]["transposed"]
            if type(transposed) is not bool:
                raise TypeError(f"transposed={transposed!r:.40}")
            form = value["layers"][path].get("form", "linear")
            if not isinstance(form, str):
                raise TypeError(f"form={form!r:.40}")
            layers[path] = LayerPrint(one.shape, one.dtype, transposed, one.digest, form)
        others, name = value.get("others"), value["name"]
        if not isinstance(name, (str, type(None))):
            raise TypeError(f"name={name!r:.40}")
        built = value.get("architecture")
        architecture = None if built is None else Architecture.from_json(built)
        return cls(layers, name, None if others is None else prints_from_json(others), architecture)


@dataclass(frozen=True)
class Difference:
    """A tensor that differs from the base model's.

    Attributes:
        name: of the tensor.
        in_values: whether it fits and differs in its values alone.
        how: the difference in words.
    """

    name: str
    in_values: bool
    how: str


class Digests:
    """A cache of digests. A Parameter is read again only after it was changed or replaced. Copies start empty."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[weakref.ref[Tensor], tuple[Any, ...], str | None]] = {}

    def of(
        self, tensors: Mapping[str, Tensor], without: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, str | None]:
        """As `digests`; a tensor is always asked about without the same rows."""
        found = {}
        for name, tensor in tensors.items():
            known = self._known.get(name)
            if known is not None and known[0]() is tensor and known[1] == _version(tensor) is not None:
                found[name] = known[2]
        fresh = {name: tensor for name, tensor in tensors.items() if name not in found}
        for name, digest in digests(fresh, without).items():
            found[name], version = digest, _version(fresh[name])
            if version is not None:
                self._known[name] = weakref.ref(fresh[name]), version, digest
        return {name: found[name] for name in tensors}

    def __reduce__(self) -> Any:
        return Digests, ()


def prints_of(
    tensors: Mapping[str, Tensor],
    found: Mapping[str, str | None] | None = None,
    without: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, TensorPrint]:
    """Prints of tensors, by name.

    Args:
        tensors: by name.
        found: the digests if they are known; a missing one becomes None.
        without: as in `digests`.
    """
    found, rows = digests(tensors, without) if found is None else found, without or {}
    return {
        name: TensorPrint(tuple(t.shape), dtype_name(t), found.get(name), tuple(rows.get(name, ())))
        for name, t in tensors.items()
    }


def prints_from_json(value: Mapping[str, Any]) -> dict[str, TensorPrint]:
    """Prints by name, from JSON values.

    Raises:
        KeyError, TypeError, AttributeError: the values do not describe prints.
    """
    found = {}
    for name, one in value.items():
        shape, dtype, digest = one["shape"], one["dtype"], one["digest"]
        sizes = isinstance(shape, (list, tuple)) and all(type(size) is int for size in shape)
        if not sizes or not isinstance(dtype, str) or not isinstance(digest, (str, type(None))):
            raise TypeError(f"{name!r:.80}: {one!r:.80}")
        without = one.get("without", ())
        if not isinstance(without, (list, tuple)) or not all(type(row) is int and row >= 0 for row in without):
            raise TypeError(f"{name!r:.80}: without={without!r:.80}")
        found[name] = TensorPrint(tuple(shape), dtype, digest, tuple(without))
    return found


def _about(layer: LayerPrint) -> dict[str, Any]:
    """The print as a dict, without the form of a linear layer, which older chains do not record."""
    found = asdict(layer)
    if layer.form == "linear":
        del found["form"]
    return found


def weight_of(path: str, form: str = "linear") -> str:
    """Name of the weight of the layer at ``path``, whose print has this form."""
    if form in ("parameter", "attention input"):
        return path
    return f"{path}.weight" if path else "weight"


def dtype_name(tensor: Tensor) -> str:
    """E.g. ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


def digests(tensors: Mapping[str, Tensor], without: Mapping[str, Sequence[int]] | None = None) -> dict[str, str | None]:
    """SHA-256 of each tensor's bytes, in hexadecimal digits; None for one on the meta device.

    A tensor under several names is read once. Sharded tensors are gathered one at a time and hashed by the processes in
    turn, so all processes must call together.

    Args:
        tensors: by name.
        without: rows that count as zeros, by name of a tensor; of these tensors copies are made.
    """
    copies: dict[tuple[int, ...], Tensor] = {}
    for name, rows in (without or {}).items():
        tensor = tensors.get(name)
        if tensor is not None and not tensor.is_meta and tensor.dim() and max(rows) < len(tensor):
            place = (id(tensor), *rows)
            if place not in copies:
                copies[place] = whole(tensor.detach()).index_fill(0, torch.tensor(rows, device=tensor.device), 0)
            tensors = {**tensors, name: copies[place]}
    unique = {id(tensor): tensor for tensor in tensors.values() if not tensor.is_meta}
    here = {i: tensor for i, tensor in unique.items() if not is_sharded(tensor)}
    shards = {i: tensor for i, tensor in unique.items() if is_sharded(tensor)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in here.values())
    devices = {tensor.device for tensor in here.values()}
    if size < _SMALL or any(device.type not in ("cpu", "cuda") for device in devices):
        found = {i: checksum(tensor) for i, tensor in here.items()}
    else:  # hashing lets other threads run
        for device in devices:
            if device.type == "cuda":  # the threads would not wait for the caller's stream
                torch.cuda.synchronize(device)
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            found = dict(zip(here, pool.map(checksum, here.values())))
    if shards:
        found.update(zip(shards, shared_out(list(shards.values()), checksum)))
    return {name: found.get(id(tensor)) for name, tensor in tensors.items()}


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in logical order, little-endian, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with torch._C.DisableTorchFunctionSubclass():  # a quantised Parameter's own split() would not return bytes
        if hasattr(tensor, "__tensor_flatten__"):  # a tensor composed of others
            for name in tensor.__tensor_flatten__()[0]:
                digest.update(checksum(getattr(tensor, name)).encode())
            return digest.hexdigest()
        data = tensor.detach()
        data = data.to_dense() if data.layout != torch.strided else data
        data = data.dequantize() if data.is_quantized else data  # torch's own kind has no byte view
        data = torch.view_as_real(data.resolve_conj()) if data.is_complex() else data
        for piece in _flat(data).view(torch.uint8).split(_PIECE):
            digest.update(piece.cpu().numpy())
    return digest.hexdigest()


def _flat(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1)
    # one element is contiguous whatever its stride
    return flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)


def _version(tensor: Tensor) -> tuple[Any, ...] | None:
    """Changes whenever the tensor does, except for edits through ``.data``; None if torch does not keep track."""
    # a change of a shard does not raise the version of the whole, batch norm does not raise that of its statistics, and
    # inference tensors have none
    composed = hasattr(tensor, "__tensor_flatten__")
    if not isinstance(tensor, nn.Parameter) or composed or tensor.is_meta or tensor.is_inference():
        return None
    return tensor._version, tensor.dtype, tensor.device, tensor.data_ptr()
