"""Weights that enter or leave: one table per network, used in both directions, and the folders they live in."""
