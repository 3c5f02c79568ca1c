"""``megatron-mhc kernels``: what its topics need is torch and Triton, so they are loaded here."""

from __future__ import annotations

import argparse

from megatron_mhc.commands import kernels_accuracy, kernels_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The topics of ``megatron-mhc kernels``."""
    topics = parser.add_subparsers(dest='topic', required=True)
    kernels_report.add_parser(topics)
    kernels_accuracy.add_parser(topics)
