"""Pyramidal flow matching as pure functions and small dataclasses of numbers. No models, no I/O."""
