"""nd_jax: training of the Neodragon mobile text-to-video model in JAX and Flax."""

__version__ = "0.1.0"
