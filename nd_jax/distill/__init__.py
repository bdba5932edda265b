"""The four distillations: pure losses, and a declaration of which roles train. No meshes, checkpoints or logging."""
