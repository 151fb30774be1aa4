# SPDX-License-Identifier: Apache-2.0
"""Particles as a standalone library, without Flax, Orbax, TFDS or PyAV."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from particlejax.particles.functional import pack, paint, patchify
    from particlejax.particles.policies import register_policy
    from particlejax.particles.types import Particles

# module of each public name
_EXPORTS = {
    "Particles": "types",
    "pack": "functional",
    "paint": "functional",
    "patchify": "functional",
    "register_policy": "policies",
}
__all__ = ["Particles", "pack", "paint", "patchify", "register_policy"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'particlejax.particles' has no attribute {name!r}")
    return getattr(importlib.import_module(f"particlejax.particles.{_EXPORTS[name]}"), name)
