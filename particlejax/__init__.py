"""particlejax: video foundation models built on particles, in JAX and Flax."""

__version__ = "0.1.0"
