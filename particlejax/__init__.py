# SPDX-License-Identifier: Apache-2.0
"""Video foundation models built on particles, in JAX and Flax: `import particlejax as pj`.

Names are imported when they are used: the package itself costs no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from particlejax import particles
    from particlejax.api import Backbone, Run, Tokens, Trainer, list_models, load_backbone, load_run
    from particlejax.config.fields import Spec
    from particlejax.config.plugins import load as load_plugins
    from particlejax.core.typing import UserError
    from particlejax.data.augment import register_augmentation
    from particlejax.data.sources import register_source
    from particlejax.models.zoo.networks import register_network
    from particlejax.objectives.registry import register_objective
    from particlejax.particles.policies import register_policy

# where each public name stands
_EXPORTS = {
    "Backbone": "api",
    "Run": "api",
    "Tokens": "api",
    "Trainer": "api",
    "list_models": "api",
    "load_backbone": "api",
    "load_run": "api",
    "Spec": "config.fields",
    "load_plugins": "config.plugins:load",
    "UserError": "core.typing",
    "register_augmentation": "data.augment",
    "register_network": "models.zoo.networks",
    "register_objective": "objectives.registry",
    "register_policy": "particles.policies",
    "register_source": "data.sources",
    "particles": "",
}
__all__ = [
    "Backbone",
    "Run",
    "Spec",
    "Tokens",
    "Trainer",
    "UserError",
    "list_models",
    "load_backbone",
    "load_plugins",
    "load_run",
    "particles",
    "register_augmentation",
    "register_network",
    "register_objective",
    "register_policy",
    "register_source",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'particlejax' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    if not module:
        return importlib.import_module(f"particlejax.{name}")
    return getattr(importlib.import_module(f"particlejax.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
