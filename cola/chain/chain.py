"""The record of a run: the links that were tied, in order. It knows names and tensors, never optimizers."""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cola.chain import on_disk, peft_export, peft_import, plot, replay, spectrum
from cola.chain.fingerprint import Fingerprint
from cola.chain.summary import ChainSummary, summary_of
from cola.common import interrupts
from cola.common.version import FORMAT
from cola.lora.link import Factor, KnotReport, LayerReport, Link

logger = logging.getLogger("cola")

Model = TypeVar("Model", bound=nn.Module)


class Chain:
    """The tied links of a run, in order.

    Args:
        links: the first ones, with consecutive indices.
        keep: False counts links without keeping their factors (a chain that nobody wants to export).
        base: fingerprint of the weights that the links belong on, if known. A run sets it at its first knot.

    Attributes:
        missing: how many links are lost before the first one held. More than 0 only if a framework's checkpoint dropped
            them: training continues from such a checkpoint, but the chain can no longer be applied or exported.
        live: whether a running optimizer has trained a link that is not tied yet, and so is not in the chain.

    >>> len(Chain())
    0
    """

    def __init__(self, links: Iterable[Link] = (), *, keep: bool = True, base: Fingerprint | None = None) -> None:
        self.keep = keep
        self.base = base
        self._links = list(links)
        self.missing = self._links[0].index if self._links else 0
        self.live = False
        if [link.index for link in self._links] != list(range(self.missing, self.missing + len(self._links))):
            raise ValueError(f"links={[link.index for link in self._links]} are not consecutive: a link is missing")

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    def __getitem__(self, index: int) -> Link:
        return self._links[index]

    def __repr__(self) -> str:
        lost = f"{self.missing} lost links, then " if self.missing else ""
        ranks = [str(link.rank) for link in self]
        if len(ranks) > 12:
            ranks = [*ranks[:6], "…", ranks[-1]]
        kept = "" if self.keep else ", factors not kept"
        live = ", and a live one" if self.live else ""
        return f"Chain({lost}{len(self)} link{'' if len(self) == 1 else 's'}, ranks [{', '.join(ranks)}]{kept}{live})"

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def layers(self) -> list[str]:
        """Paths of the layers that any link changes."""
        return replay.paths(self)

    # in a framework's checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The chain as plain data, for frameworks that save objects by their ``state_dict``.

        A `ChainOptimizer`'s own state dict holds the links, but `torch.distributed.checkpoint` drops them. Add the
        chain as an entry there, ``{"model": …, "optimizer": …, "chain": opt.chain}``, or in Accelerate call
        ``accelerator.register_for_checkpointing(opt.chain)``. It is the same on every process, so the number of
        processes may change. It always has two entries, because some checkpoints are loaded into place.

        Returns:
            ``about``, a JSON text, and ``links``, a list with the bytes of one safetensors file per link.
        """
        ledger = self._ledger()
        about = json.dumps({"version": FORMAT, **on_disk.ledger_to_json(ledger)})
        return {"about": about, "links": [on_disk.link_to_bytes(link) for link in ledger.links]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Become the chain that `state_dict` described. Call it before or after loading the optimizer's own state.

        On a running ChainOptimizer the next step compares the links with those recorded in the optimizer's state.

        Raises:
            ValueError: this is not a chain's state, or it is damaged. Nothing is changed then.

        >>> chain = Chain()
        >>> chain.load_state_dict(Chain().state_dict())
        """
        try:
            about = json.loads(state_dict["about"])
            if about["version"] != FORMAT:
                raise ValueError(f"it has format {about['version']}, and this version of cola reads format {FORMAT}")
            links = [
                on_disk.link_from_bytes(data, Path("links") / str(i)) for i, data in enumerate(state_dict["links"])
            ]
            ledger = on_disk.ledger_of(about, links)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"this is not the state of a chain, or it is damaged: {error}") from None
        self._restore(ledger)

    # on disk

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the chain: one file per link, and a manifest. FORMAT.md describes the format.

        The chain that the directory held is replaced as a whole or, if anything fails, left intact. Links that are
        already there are not written again. Between knots a warning says that the live link is not part of the chain.

        Args:
            directory: created if it does not exist.

        Raises:
            ValueError: it holds another program's files under our names, or a layer's name could be a file's path.
            OSError: the disk is full, the directory is read-only, another process is saving there, …

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Chain().save(directory)
        ...     Chain.load(directory)
        Chain(0 links, ranks [])
        """
        self._warn_of_live_link("save()")
        on_disk.save(Path(directory), self._ledger())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Chain":
        """Read the chain that `save` or `ChainOptimizer.save` wrote, whichever came last.

        Raises:
            ValueError: a file is missing, truncated, edited, foreign or of another format version; names the file.
        """
        chain = cls()
        chain._restore(on_disk.load(Path(directory)))
        return chain

    def to_peft(
        self, directory: str | os.PathLike[str], r: int | None = None, *, base_model: str | None = None
    ) -> dict[str, float]:
        """Write the whole chain as one LoRA adapter in PEFT's format, for the ORIGINAL base model.

        Without ``r`` the adapter is exact, and its rank is the sum of the links' ranks. It includes the biases and
        modules trained alongside the links. All layers get the largest rank, padded with zeros, so that readers
        that ignore ``rank_pattern`` read them correctly. ``lora_alpha`` equals that rank: the scale is 1, and the
        links' scales are folded into B.

        ``target_modules`` lists the layers' plain names if these select the adapted layers alone, otherwise their
        paths. If neither works, or the base model's modules are not known, it is a regular expression.
        ``target_parameters`` names fused experts and other single parameters; in mixtures of experts also layers with
        names like ``gate_proj``, which PEFT takes for parts of the experts. ``task_type`` or ``auto_mapping`` tell
        ``AutoPeftModel…`` the base model's class.

        Args:
            directory: for ``adapter_model.safetensors`` and ``adapter_config.json``; created if it does not exist.
            r: truncate each layer's update to this rank by SVD (from the factors, two QRs; ΔW is never formed).
            base_model: hub name or directory of the base model, for PEFT to note; None for the recorded one.

        Returns:
            Per layer, the truncation error ``‖ΔW − ΔW_r‖`` (Frobenius); zeros without ``r``. ``export.json`` has it
            too, with ``‖ΔW‖`` and the ranks before padding.

        Raises:
            ValueError: r is not positive; the chain is empty; PEFT would adapt other layers, or had changed the base
                model before training (``init_lora_weights="pissa"``, …); or PEFT's format has no place for something
                that training has moved: part of a module (a norm's running statistics, without its weight), the
                model's own tensors, a layer that the model has at several places, or a layer that PEFT computes in
                another way (attention's output projection, convolutions with groups, tables with a forward of their
                own). Nothing is written then.
            RuntimeError: links were not kept, or were lost.
        """
        self._complete("to_peft()")
        errors = peft_export.to_peft(self._links, Path(directory), r, self.base, base_model)
        self._warn_of_live_link("to_peft()")
        return errors

    @classmethod
    def from_peft(cls, directory: str | os.PathLike[str], *, rounding: str = "nearest") -> "Chain":
        """Make a LoRA adapter in PEFT's format the first link of a chain.

        Args:
            directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
            rounding: how `apply` rounds when it ties the link: ``"nearest"``, ``"stochastic"`` or ``"compensated"``;
                on a quantised base ``"stack"`` or ``"requantize"``.

        Raises:
            ValueError: a file is missing or damaged, or the adapter is more than ``s·B A`` (DoRA, …); says why.
        """
        return cls([peft_import.from_peft(Path(directory), rounding)])

    # on a model

    def apply(self, model: Model, upto: int | None = None, *, check: bool = True) -> Model:
        """Tie the links into a fresh base model as the run did: same order, same rounding.

        The bits are the same on the same device, library versions, kernels and number of threads. Elsewhere the weights
        agree within their rounding.

        Args:
            model: the untouched base model; changed in place.
            upto: only the first ``upto`` links; None for all.
            check: compare all parameters and persistent buffers with the fingerprint of the base model that the links
                were trained on, in one pass over them. A tensor that the links replace as a whole (a trained head) may
                have other values: a warning names it.

        Returns:
            ``model``.

        Raises:
            ValueError: wrong base: a tensor is missing or has another shape, dtype or value, or a layer cannot be tied.
                Nothing is changed then.
            RuntimeError: links were not kept, or were lost.
        """
        self._complete("apply()")
        if upto is not None and not 0 <= upto <= len(self):
            raise ValueError(f"upto={upto} is outside a chain of {len(self)} links")
        links = self._links[:upto]
        replaced = [name for link in links for name in link.trained]
        replay.check(model, self._links, self.base if check else None, replaced=replaced)
        self._warn_of_live_link("apply()")
        with interrupts.deferred():
            replay.tie_links(model, links)
        return model

    def undo(self, model: nn.Module | None = None, base: replay.Base | None = None) -> Link:
        """Take the last link off and return it. With ``model`` and ``base``, take it off the model's weights as well.

        The weights are rebuilt from the base model and the remaining links, because subtracting a link would leave
        rounding errors behind. On a running ChainOptimizer use its own ``undo(base)``.

        Args:
            model: carries the whole chain in its weights (after ``finish()`` or `apply`); changed in place.
            base: the untouched model, or its state dict.

        Raises:
            ValueError: the chain is empty, only one of the two is given, or the base is not the chain's. Nothing is
                changed then.
        """
        if not self._links:
            raise ValueError("an empty chain has no link to undo")
        if (model is None) != (base is None):
            raise ValueError("undo(model, base) needs both: the model to change, and the base to rebuild it from")
        if model is not None and base is not None:
            self._complete("undo(model, base)")
            if base is model:
                raise ValueError("undo(model, base): base is the model itself; give the untouched one")
            replaced = [name for link in self._links[:-1] for name in link.trained]
            replay.check(model, self._links, self.base, base=base, replaced=replaced)
            with interrupts.deferred():
                replay.untie(model, self._links, base)
                replay.tie_links(model, self._links[:-1])
                replay.settle(model, self._links)
        return self._links.pop()

    # diagnostics

    def summary(self) -> ChainSummary:
        """One row per link: step, rank, ``‖ΔW‖``, ``‖ΔW‖/‖W‖``, what rounding lost, loss. It needs no factors.

        `print` shows it as a table; ``to_dict()`` gives JSON values, ``to_frame()`` a `pandas.DataFrame`.

        >>> print(Chain().summary())
        Chain(0 links, ranks [])
        """
        return summary_of(self, repr(self))

    def plot(self) -> Any:
        """Draw the loss at the knots, ``‖ΔW‖/‖W‖`` by kind of layer, the spectrum of the update, and its rank.

        Without factors (``keep_links=False``), or without the first links, it draws what the reports hold. The state of
        pyplot is left alone.

        Returns:
            A `matplotlib.figure.Figure`, which notebooks show.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the chain is empty.
        """
        return plot.figure(self)

    def delta(self, layer: str) -> Tensor:
        """``Σ s B A`` of one layer in float64, out×in, or E×out×in."""
        return torch.stack([factor.delta() for factor in self._factors(layer)]).sum(0)

    def norms(self) -> dict[str, list[float]]:
        """``‖ΔW_k‖`` (Frobenius) per layer, one number per link; 0 if a link does not touch the layer."""
        self._require_kept("norms()")
        return {
            layer: [link.factors[layer].norm() if layer in link.factors else 0.0 for link in self]
            for layer in self.layers()
        }

    def singular_values(self, layer: str) -> Tensor:
        """Singular values of ``Σ s B A`` in float64, largest first, from the factors alone (two QRs)."""
        return spectrum.singular_values(self._factors(layer))

    def effective_rank(self, tolerance: float | None = None) -> dict[str, int]:
        """Rank of each layer's total update.

        Args:
            tolerance: singular values up to this share of the largest count as zero; None for the factors' precision,
                ``eps·max(out, in)`` as in `torch.linalg.matrix_rank`.
        """
        self._complete("effective_rank()")
        return {layer: spectrum.rank(self._factors(layer), tolerance) for layer in self.layers()}

    def overlap(self, first: int, second: int, side: str = "out") -> dict[str, Tensor]:
        """Cosines of the principal angles between two links' subspaces: whether they work in the same directions.

        Args:
            first, second: places in the chain, from 0 (negative ones count from the end).
            side: ``"out"`` compares the column spaces of ΔW, which the links write; ``"in"`` the row spaces, which they
                read.

        Returns:
            Per layer that both links change, the cosines in float64, largest first: 1 is a shared direction, 0 an
            orthogonal one. There are as many as the smaller of the two ranks.
        """
        if side not in ("out", "in"):
            raise ValueError(f"side={side!r} is unknown: choose 'out' or 'in'")
        self._require_kept("overlap()")
        one, two = self._links[first].factors, self._links[second].factors
        return {path: spectrum.cosines(one[path], two[path], side) for path in one if path in two}

    # inside

    def _append(self, link: Link) -> None:
        """Record a link. Its index must be the next one."""
        self._require_next(link.index)
        self._links.append(link if self.keep else Link(link.index, link.seed, {}, {}, link.report))
        self.live = False

    def _require_next(self, index: int) -> None:
        """Raise ValueError if ``index`` is not that of the next link."""
        if index != self.missing + len(self):
            raise ValueError(
                f"link {index} cannot follow a chain of {self.missing + len(self)} links: links go in order. (To take "
                "a link off a running chain, use opt.undo.)"
            )

    def _resume(self, index: int) -> None:
        """Continue as the chain before link ``index``: drop later links, and count absent ones as missing."""
        if self.missing <= index <= self.missing + len(self):
            del self._links[index - self.missing :]
        else:
            self._links.clear()
        self.missing = index - len(self._links)

    def _restore(self, ledger: on_disk.Ledger) -> None:
        """Take over the content of a checkpoint, in place."""
        self._links, self.missing = list(ledger.links), ledger.missing
        self.keep, self.base = ledger.keep, ledger.base

    def _ledger(self) -> on_disk.Ledger:
        """The chain as plain data."""
        return on_disk.Ledger(tuple(self._links), self.missing, self.keep, self.base)

    def _complete(self, call: str = "this") -> tuple[Link, ...]:
        """All links.

        Raises:
            RuntimeError: links were not kept, or the first ones are missing; the message names ``call``.
        """
        self._require_kept(call)
        if self.missing:
            raise RuntimeError(
                f"{call} needs all links, and the chain lacks its first {self.missing}: the checkpoint that the run "
                "was resumed from had dropped them. The model's own weights are complete: save those, or load the "
                "links too (save opt.chain along with the optimizer's state: it has state_dict and load_state_dict)"
            )
        return tuple(self._links)

    def _factors(self, layer: str) -> list[Factor]:
        self._complete("this")
        found = [link.factors[layer] for link in self if layer in link.factors]
        if not found:
            raise ValueError(f"layer {layer!r} is not in the chain; it has {', '.join(self.layers()) or 'none'}")
        return found

    def _warn_of_live_link(self, call: str) -> None:
        if self.live:
            logger.warning(
                "chain.%s has %d tied link%s; the live link, trained since the last knot, is not among them: call "
                "opt.finish() first, or opt.tie() to go on training (opt.save() keeps the live link too)",
                call,
                len(self),
                "" if len(self) == 1 else "s",
            )

    def _require_kept(self, call: str) -> None:
        if not self.keep and len(self):
            raise RuntimeError(f"{call} needs the links, and this chain does not keep them (keep_links=False)")


__all__ = ["Chain", "Factor", "KnotReport", "LayerReport", "Link"]
