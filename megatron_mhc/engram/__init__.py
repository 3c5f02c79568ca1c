"""Engram conditional memory (arXiv 2601.07372): hashed n-gram tables that layers read."""
