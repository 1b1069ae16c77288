"""What the hub is asked: nothing for a folder, nothing with `--offline`, and else once and briefly.

The hub's own clients try again for half a minute before they give up, also for a name that is only misspelt.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

_SECONDS = 5.0
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def go_offline() -> None:
    """Turn the hub off for this process and those that it starts: only what is cached is used."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    # the libraries read the variables when they are imported
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        from datasets import config

        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = True


def require_model(name: str, known: Iterable[str] = ()) -> None:
    """Refuse a model that is neither a folder, nor on the hub, nor cached; without a folder the hub is asked once.

    If the hub does not answer, and the model is cached, this process goes offline.

    Args:
        name: a path, or a name on the hub.
        known: other names that the caller takes, to suggest in the message.

    Raises:
        OSError: there is no such model, or the hub does not answer or refuses access.
    """
    if Path(name).is_dir():
        return
    if Path(name).exists():
        raise NotADirectoryError(f"model={name!r} is a file: give the folder that holds config.json")
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise FileNotFoundError(f"model={name!r}: there is no such folder{_near(name, known)}")
    from huggingface_hub import try_to_load_from_cache

    said = _refusal(name, "model")
    if said is None:
        return
    words, final = said
    if not final and isinstance(try_to_load_from_cache(name, "config.json"), str):
        go_offline()
        return
    if not final:
        words += f", and no copy is cached: give a folder, or run `hf download {name}` where there is a network"
    raise OSError(f"model={name!r} is no folder here; {words}{_near(name, known)}")


def prefer_cache(name: str) -> None:
    """Go offline if the hub does not answer for a data set: then its cached copy is used, or refused at once."""
    said = _refusal(name, "dataset")
    if said is not None and not said[1]:
        go_offline()


def _refusal(name: str, kind: str) -> tuple[str, bool] | None:
    """Ask the hub for a repository, once.

    Returns:
        None if it is there; else why not, and whether the hub itself says so.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "offline the hub is not asked", False
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except GatedRepoError:
        return "the hub's copy is gated: accept its licence there, and log in by `hf auth login`", True
    except RepositoryNotFoundError:
        return "the hub has none of that name (a private one needs `hf auth login`)", True
    except Exception as error:  # of the HTTP library, which differs between versions of the hub's client
        return f"the hub does not answer ({type(error).__name__}: {error})".splitlines()[0], False
    return None


def _near(name: str, known: Iterable[str]) -> str:
    """A suggestion: a name that the caller knows, or a neighbouring folder of nearly this name."""
    parent = Path(name).parent
    folders = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    found = difflib.get_close_matches(str(Path(name)), [*known, *folders], n=1)
    return f"; did you mean {found[0]}?" if found else ""
