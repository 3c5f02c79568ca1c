"""Multiway dynamic dense connections (MUDD, arXiv 2502.12170): ``--residual-type mudd``."""
