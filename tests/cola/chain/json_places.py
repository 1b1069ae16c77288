"""Putting something else in any place of nested JSON."""

import copy


def places(value, path=()):
    """Where in nested JSON something could be put in the place of what is there."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def replaced(value, path, junk):
    """A copy of ``value`` with ``junk`` at ``path``."""
    if not path:
        return junk
    copied = copy.copy(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], junk)
    return copied
