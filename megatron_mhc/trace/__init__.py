"""Profiler traces: what ran under what."""
