"""Checkpoints from one residual topology, or from one layout of it, to another."""
