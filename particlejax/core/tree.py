# SPDX-License-Identifier: Apache-2.0
"""Pytrees by path name, such as 'encoder/blocks/attention/query/kernel', and rules that match
names.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def path_name(path: Sequence[Any]) -> str:
    """A key path of jax.tree_util as a string with slashes."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path name, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of leaves by path name: the inverse of `flatten` for trees of dicts."""
    root: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return root


def map_named(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """A tree of f(path name, leaf)."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f(path_name(path), leaf), tree)


def match(rules: Sequence[tuple[str, Any]], name: str) -> Any:
    """The value of the first rule whose pattern is in `name`; the last rule should match all."""
    return next(value for pattern, value in rules if re.search(pattern, name))


def count(tree: Any) -> int:
    """Number of elements of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
