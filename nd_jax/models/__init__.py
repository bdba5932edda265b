"""Networks as `flax.linen` modules with frozen configs. No I/O, no meshes."""
