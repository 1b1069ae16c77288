"""Sphinx: how `make docs` builds the site. Every code cell is run, and any warning or error fails the build."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

from cola import __version__  # noqa: E402

project = "Chain of LoRA"
author = "the maintainers"
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "myst_nb",
    "repository",
    "command_help",
    "folded_tables",
]
exclude_patterns = ["_build", "_extensions"]
html_theme = "furo"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"Chain of LoRA {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_in_temp = True  # pages save chains and checkpoints
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell, far above what any needs
nb_execution_show_tb = True
nb_merge_streams = True
# cells print what they do in a script, but no progress bars and no notices of other libraries
os.environ.update(
    TQDM_DISABLE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    DS_ACCELERATOR="cpu",
    PYTHONWARNINGS="ignore:IProgress not found,ignore::UserWarning,ignore::FutureWarning",
)

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "py:obj"
copybutton_exclude = ".linenos, .gp, .go"


def reachable(url: str) -> bool:
    """Whether an inventory answers within three seconds; a build without network goes without links to it."""
    try:
        with urlopen(Request(f"{url}objects.inv", method="HEAD", headers={"User-Agent": "sphinx"}), timeout=3):
            return True
    except (URLError, TimeoutError, OSError):
        return False


inventories = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "transformers": "https://huggingface.co/docs/transformers/main/en/",
    "peft": "https://huggingface.co/docs/peft/main/en/",
}
with ThreadPoolExecutor() as pool:
    found = dict(zip(inventories, pool.map(reachable, inventories.values())))
intersphinx_mapping = {name: (url, None) for name, url in inventories.items() if found[name]}
