"""Hyper-connections, and the layers and blocks that carry n streams."""
