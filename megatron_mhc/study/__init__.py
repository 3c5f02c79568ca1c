"""Layouts at scale: which one trains fastest, and what fits."""
