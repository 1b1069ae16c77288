"""Measures which share of a model the links reach, and why the rest is left out."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from cola.lora import peft
from cola.lora.defaults import heads, left_encoders, task_heads, within
from cola.lora.kinds import is_quantized, kind_of, known_kind
from cola.lora.layer import FACTORS
from cola.lora.link import per_cent
from cola.lora.live import LiveLink
from cola.lora.names import modules_by_name, unwrap
from cola.lora.parameter import entries_of
from cola.lora.reading import LinkedConvolution
from cola.lora.targets import WHOLE, is_stacked, obstacles
from cola.lora.token_rows import TokenRows

logger = logging.getLogger("cola")

#: kinds of encoders by words in their paths
_TOWERS = {"vision": ("vis", "image", "video"), "audio": ("audio", "speech")}


@dataclass(frozen=True)
class Reached:
    """Adapted layers with one name in one part of the model.

    Attributes:
        part: path of the part, up to the first index of a layer.
        name: last part of the layers' paths.
        layers: number of layers.
        parameters: number of parameters in their weights.
    """

    part: str
    name: str
    layers: int
    parameters: int


@dataclass(frozen=True)
class LeftOut:
    """Parameters that stay frozen, and why.

    Attributes:
        group: ``"fused experts"``, ``"output head"``, ``"embeddings"``, ``"norms and biases"``, ``"vision tower"``,
            ``"audio tower"``, ``"other tower"``, ``"shared weights"``, ``"convolutions"``, ``"attention"``,
            ``"refused linear layers"``, ``"other linear layers"`` or ``"other"``.
        parameters: number of parameters.
        why: the reason, in words.
    """

    group: str
    parameters: int
    why: str


@dataclass(frozen=True)
class Coverage:
    """The share of a model that a run's links reach. Each parameter of the model is counted once.

    Attributes:
        rows: the adapted layers, by part and name, in the model's order.
        left_out: the frozen parameters, the largest group first.
        trained: number of extra trained parameters (biases, ``modules_to_save``).
        total: number of the model's parameters, without links.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    >>> found = coverage(model, {"0": model[0]})
    >>> found.layers, found.parameters, found.total, round(found.share, 2)
    (1, 32, 49, 0.65)
    >>> print(found)
    1 layer with links, 32 of 49 parameters (65.3 %)
      0: 1 layer, 32
    left out:
      norms and biases: 9 (18.4 %), links go on matrices
      other linear layers: 8 (16.3 %), target_modules does not name them
    """

    rows: tuple[Reached, ...]
    left_out: tuple[LeftOut, ...]
    trained: int
    total: int

    @property
    def layers(self) -> int:
        """Number of layers that carry links."""
        return sum(row.layers for row in self.rows)

    @property
    def parameters(self) -> int:
        """Number of parameters in the weights of the layers that carry links."""
        return sum(row.parameters for row in self.rows)

    @property
    def share(self) -> float:
        """`parameters` as a share of the model's, from 0 to 1."""
        return self.parameters / max(self.total, 1)

    def summary(self) -> str:
        """The first line, and the three largest groups of the left-out parameters."""
        rest = ", ".join(f"{one.group} {self._share(one.parameters)}" for one in self.left_out[:3])
        return self._head() + (f"; left out: {rest}" if rest else "")

    def __repr__(self) -> str:
        return f"Coverage({self._head()})"

    def __str__(self) -> str:
        lines = [self._head()]
        for row in self.rows:
            part = f"{row.part}: " if row.part else ""
            lines.append(f"  {part}{row.name}: {_layers(row.layers)}, {row.parameters:,}")
        if self.trained:
            lines.append(f"trained in addition: {self.trained:,} ({self._share(self.trained)})")
        if self.left_out:
            lines.append("left out:")
        lines += [f"  {o.group}: {o.parameters:,} ({self._share(o.parameters)}), {o.why}" for o in self.left_out]
        return "\n".join(lines)

    def _head(self) -> str:
        reached = f"{self.parameters:,} of {self.total:,} parameters ({self._share(self.parameters)})"
        return f"{_layers(self.layers)} with links, {reached}"

    def _share(self, parameters: int) -> str:
        return f"{100 * parameters / max(self.total, 1):.1f} %"


def coverage(
    model: nn.Module, layers: Mapping[str, nn.Module], trained: Iterable[nn.Parameter] = (), target_modules: object = ()
) -> Coverage:
    """Count the parameters that links on ``layers`` reach.

    Args:
        model: a model with or without links.
        layers: the modules with the adapted weights, by canonical path.
        trained: the extra trained parameters; parameters outside the model count as well.
        target_modules: as in `LinkConfig`; decides the reason given for linear layers that are left out.
    """
    extra = {id(p): p.numel() for p in trained}
    linked = {id(known_kind(layer).parameter(layer)): path for path, layer in layers.items()}
    rows: dict[tuple[str, str], list[int]] = {}
    left: dict[str, dict[str, int]] = {}  # group: reason: size
    groups = _Groups(model, layers, target_modules)
    total = 0
    for path, module, name, parameter in _parameters(model):
        size = _size(module, name, parameter)
        total += size
        if id(parameter) in linked:
            part, kind = _place(linked[id(parameter)])
            row = rows.setdefault((part, kind), [0, 0])
            row[0], row[1] = row[0] + 1, row[1] + size
        elif id(parameter) not in extra:
            group, why = groups.of(path, module, name, parameter)
            reasons = left.setdefault(group, {})
            reasons[why] = reasons.get(why, 0) + size
    frozen = [
        LeftOut(group, sum(why.values()), next(iter(why)) + (f" (and {len(why) - 1} more)" if len(why) > 1 else ""))
        for group, why in left.items()
    ]
    return Coverage(
        rows=tuple(Reached(part, kind, *row) for (part, kind), row in rows.items()),
        left_out=tuple(sorted(frozen, key=lambda one: -one.parameters)),
        trained=sum(extra.values()),
        total=total,
    )


def covered(live: LiveLink) -> Coverage:
    """The coverage of a live link."""
    layers = {path: live.layers[path].holder for path in live.layers}
    return coverage(live.model, layers, live.trained().values(), live.config.target_modules)


def counted(model: nn.Module, others: Iterable[nn.Parameter] = ()) -> tuple[int, int]:
    """The number of trained parameters, and of all, links included; each counts once, and a sharded one as a whole.

    Args:
        model: a model with or without links.
        others: trained parameters that may lie outside of it.
    """
    sizes = {id(p): (p.requires_grad, p.numel()) for p in others}
    for module in unwrap(model).modules():
        for name, p in module._parameters.items():
            if p is not None:
                sizes[id(p)] = p.requires_grad, _size(module, name, p)
    return sum(size for trained, size in sizes.values() if trained), sum(size for _, size in sizes.values())


def announced(live: LiveLink) -> Coverage:
    """The coverage of a live link, after logging it; warns of half a model or most rows left out, and a frozen head."""
    found = covered(live)
    logger.info("%s", found.summary())
    if live.config.target_modules in WHOLE and found.share < 0.5:
        logger.warning(
            "target_modules=%r reaches less than half of the model: %s", live.config.target_modules, found.summary()
        )
    _warn_of_rows(live)
    inner, trained = unwrap(live.model), [path.rpartition(".")[0] for path in live.trained()]
    frozen = [head for head in task_heads(inner) if not any(within(p, [head]) for p in (*live.layers, *trained))]
    if frozen:
        if len(frozen) == 1:
            words = "the head %s of %s stays frozen: if it is new, train it whole by modules_to_save=%r"
        else:
            words = "the heads %s of %s stay frozen: if they are new, train them whole by modules_to_save=%r"
        logger.warning(words, " and ".join(map(repr, frozen)), type(inner).__name__, frozen)
    return found


def _warn_of_rows(live: LiveLink) -> None:
    """Warn of a layer that looks up rows, and of whose rows a link trains only a few."""
    for path, layer in live.layers.items() if live.config._selects else ():
        count = live._drawn_shape(layer.holder)[1]
        if layer.kind.looks_up and layer.rank < count:
            logger.warning(
                "with init='selector' and train='B' a link trains %d of the %d rows of %r (%s), in the order of "
                "their indices: leave the layer out by exclude_modules, or train the rows of chosen tokens by "
                "trainable_token_indices",
                layer.rank, count, path, per_cent(layer.rank / count),
            )  # fmt: skip
            return


class _Groups:
    """Finds the group of a parameter without a link, and the reason."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], target_modules: object) -> None:
        self.all = target_modules == "all"
        self.linear = "target_modules does not name them"
        if target_modules in WHOLE:
            self.linear = "the rank of a link is above theirs"
        inner, modules = unwrap(model), modules_by_name(model)
        self.heads, self.obstacles = heads(inner, modules), obstacles(model)
        self.towers = [t for t in left_encoders(inner, modules) if not any(within(path, [t]) for path in layers)]

    def of(self, path: str, module: nn.Module, name: str, parameter: nn.Parameter) -> tuple[str, str]:
        tower = next((tower for tower in self.towers if within(path, [tower])), None)
        if tower is not None:
            kind = next((kind for kind, words in _TOWERS.items() if any(word in tower for word in words)), "other")
            return f"{kind} tower", f"{tower} feeds the language model"
        if path in self.heads:
            return "output head", f"{self.heads[path]} is the model's output"
        if name.endswith("bias") or (parameter.dim() <= 1 and not is_quantized(module)):
            return "norms and biases", "links go on matrices"
        if is_stacked(path, module, name, parameter):
            group = "attention" if isinstance(module, nn.MultiheadAttention) else "fused experts"
            return group, self._why(f"{path}.{name}".lstrip("."))
        own = kind_of(module)
        if own is None or name != "weight":
            return "other", f"a {type(module).__name__} is no layer of a known kind: see target_parameters"
        reason = self.obstacles.get(path, "")
        if own.linear and reason and not reason.startswith("already carries"):
            if reason.startswith("is tied"):
                return "shared weights", f"{path} {reason.split(':')[0]}"
            return "refused linear layers", f"{path} {reason}"
        if own.linear:
            return "other linear layers", self.linear
        group = "convolutions" if issubclass(own, LinkedConvolution) else "other linear layers"
        return "embeddings" if own.looks_up else group, self._why(path)

    def _why(self, path: str) -> str:
        """Why a layer that only ``target_modules="all"`` reaches carries no link."""
        reason = self.obstacles.get(path, "")
        if reason and not reason.startswith("already carries"):
            return f"{path} {reason}"
        return self.linear if self.all else "target_modules='all' reaches them"


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Each parameter of the model but the links', once: its module's path, the module, its name, the parameter.

    Where PEFT trains a copy of a module, the copy counts and the unused original does not.
    """
    wrappers = [m for m in unwrap(model).modules() if peft.original(m) == "original_module"]
    unused = {id(module) for wrapper in wrappers for module in wrapper._modules["original_module"].modules()}  # type: ignore[union-attr]
    seen: set[int] = set()
    for path, module in modules_by_name(model).items():
        for name, parameter in () if id(module) in unused else module._parameters.items():
            own = TokenRows.entries if isinstance(module, TokenRows) else entries_of(module)
            factor = name in (own or FACTORS) or not set(FACTORS).isdisjoint(path.split("."))
            if parameter is not None and not factor and id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, module, name, parameter


def _size(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """The size of a parameter before its quantisation, which packs codes."""
    if name == "weight" and is_quantized(module):
        out, inner = known_kind(module).shape(module)
        return out * inner
    return parameter.numel()


def _place(path: str) -> tuple[str, str]:
    """The part of the model, up to the first index, and the layer's own name."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:first]), parts[-1]


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"
