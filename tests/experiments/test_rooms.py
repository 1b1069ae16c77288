"""The rooms of the experiments: a module imports from its own room and from lower ones, and no room knows a peer."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: lower rooms first; rooms of one floor do not import one another
FLOORS = [["hub"], ["files", "command_line", "hardware", "memory", "report", "smollm", "tasks", "peft_adapter"],
          ["tiny", "sweep", "methods"], ["models"], ["paper", "study", "bench"], ["frontier", "gpu"],
          ["__main__"]]  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room(module):
    return module.split(".")[1]


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("*.py")), ids=lambda path: path.stem)
def test_imports_point_downward(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts in [("experiments", "__init__")] or parts[1] == "examples":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "experiments":
            for alias in node.names:
                other = room(f"{node.module}.{alias.name}")
                assert other == parts[1] or FLOOR[other] < FLOOR[parts[1]], f"{parts[1]} imports {other}"
