"""Seconds of the residual connections of one sublayer: measured by the bench, or from bytes."""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import NamedTuple

from megatron_mhc.kernels.traffic import Traffic, kernel_forms, our_forms, paper_forms
from megatron_mhc.settings.residual import ResidualConfig
from megatron_mhc.study.hardware import Hardware

# Of ``tools/bench``: its headline, per sublayer, as the layers use the kernels.
OP, CONTENDER, FORWARD, BACKWARD = 'layer', 'triton', 'fwd', 'bwd'
# Bytes of a stream's value -> the dtype whose times count; those of bf16 serve fp16 too.
DTYPES = {2: 'bf16', 4: 'fp32'}
MODES = ('graph', 'eager')


class Sublayer(NamedTuple):
    """Seconds of one sublayer's residual connection, forward and backward."""

    forward: float
    backward: float


class BytesModel:
    """What our kernels read and write (``kernels.traffic``) at a share of memory bandwidth.

    One sublayer is a fused edge: F_post,res of the sublayer before, then mapping and F_pre. Where
    that of the MLP is hidden, every second sublayer has only the rest. A plain residual connection
    is an addition, in the backward one of gradients.

    Args:
        hardware: its memory bandwidth, and how much of F_post,res it hides.
    """

    def __init__(self, hardware: Hardware) -> None:
        self.bandwidth, self.hidden_post = hardware.bandwidth, hardware.post_overlap
        self.source = f'bytes at {hardware.kernel_efficiency:.0%} of {hardware.memory_gb_s:g} GB/s'

    def sublayer(
        self,
        residual: ResidualConfig,
        hidden: int,
        tokens: int,
        value_bytes: int = 2,
        overlaps: bool = True,
    ) -> Sublayer:
        """Seconds for T tokens of width C.

        Args:
            residual: n and what it is.
            hidden: C.
            tokens: T.
            value_bytes: of a stream's value.
            overlaps: whether streams can run side by side, so that F_post,res can be hidden.
        """
        kind = residual.residual_type if residual.has_streams else 'standard'
        whole, rest = (
            [one.bytes(tokens, hidden, value_bytes) / self.bandwidth for one in forms]
            for forms in _forms(kind, residual.streams)
        )
        half = self.hidden_post / 2 if overlaps else 0.0
        return Sublayer(*(w - half * (w - r) for w, r in zip(whole, rest, strict=True)))


@functools.cache
def _forms(kind: str, n: int) -> tuple[tuple[Traffic, Traffic], tuple[Traffic, Traffic]]:
    """Traffic forward and backward, whole and without F_post,res."""
    if kind == 'standard':
        plain = paper_forms(1)['plain residual']
        return (plain, plain), (plain, plain)
    forms = our_forms(n)
    kernels = kernel_forms(n)
    if kind == 'hc':
        # A model: the maps' reads by mHC, Table 2, the rest by our kernels, pass by pass; torch
        # computes the maps, and moves more.
        maps = paper_forms(n)['HC: maps']
        post = kernels['post_res_forward'], kernels['post_res_backward WRITE_DX']
        back = forms['mapping backward'] + forms['F_pre backward']
        rest = maps + forms['F_pre'], back
        return (rest[0] + post[0], forms['backward op by op']), rest
    whole = forms['forward at the fused edge'], forms['backward at the fused edge']
    rest = (
        kernels['projection'] + kernels['maps_forward HAS_U'],
        kernels['maps_backward HAS_U'] + kernels['read_backward HAS_G HAS_U'],
    )
    return whole, rest


class Measured:
    """Times of a ``results.csv`` of ``tools/bench``; plain residual connections from bytes.

    Args:
        path: the CSV.
        hardware: for what the bench does not time.

    Raises:
        ValueError: no such file, or no times of whole layers in it.
    """

    def __init__(self, path: Path, hardware: Hardware) -> None:
        self.path, self.bytes = path, BytesModel(hardware)
        self.source = f'measured, {path}'
        # (C, n, dtype) -> tokens -> seconds of the two directions.
        self.times: dict[tuple[int, int, str], dict[int, dict[str, float]]] = {}
        for mode in MODES[::-1]:
            for row in self._rows():
                if row['mode'] == mode:
                    point = int(row['hidden']), int(row['streams']), row['dtype']
                    times = self.times.setdefault(point, {}).setdefault(int(row['tokens']), {})
                    times[row['direction']] = float(row['median_us']) * 1e-6
        self.times = {
            point: {t: both for t, both in found.items() if {FORWARD, BACKWARD} <= both.keys()}
            for point, found in self.times.items()
        }
        if not any(self.times.values()):
            raise ValueError(
                f'--kernel-times {path}: no row of op {OP}, contender {CONTENDER}, '
                f'{" or ".join(DTYPES.values())}, fwd and bwd, on a GPU; measure with make bench'
            )

    def _rows(self) -> list[dict[str, str]]:
        wanted = {'op': OP, 'contender': CONTENDER, 'status': 'ok'}
        try:
            with self.path.open(newline='') as file:
                rows = [
                    row
                    for row in csv.DictReader(file)
                    if all(row[key] == value for key, value in wanted.items())
                    and row['dtype'] in DTYPES.values()
                ]
            for row in rows:
                if not float(row['median_us']) > 0 or not int(row['tokens']) > 0:
                    raise ValueError('a time or number of tokens that is not above 0')
        except OSError as error:
            raise ValueError(f'--kernel-times {self.path}: {error.strerror}') from error
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(
                f'--kernel-times {self.path}: not a results.csv of tools/bench ({error}); give one '
                'that make bench wrote'
            ) from error
        return rows

    def sublayer(
        self,
        residual: ResidualConfig,
        hidden: int,
        tokens: int,
        value_bytes: int = 2,
        overlaps: bool = True,
    ) -> Sublayer:
        """Seconds for T tokens of width C: in proportion to the nearest T that was measured.

        Raises:
            ValueError: this C and n were not measured in the dtype of the model.
        """
        if residual.residual_type != 'mhc' and residual.has_streams:
            raise ValueError(
                f'--kernel-times {self.path}: times of mhc, but the model is '
                f'{residual.residual_type}; drop the flag'
            )
        if not residual.has_streams:
            return self.bytes.sublayer(residual, hidden, tokens, value_bytes)
        n, dtype = residual.streams, DTYPES[value_bytes]
        found = self.times.get((hidden, n, dtype))
        if not found:
            raise ValueError(
                f'--kernel-times {self.path}: nothing for hidden size {hidden} and {n} streams in '
                f"{dtype}; measure with make bench ARGS='--ops layer --hidden-sizes {hidden} "
                f"--num-streams {n} --dtype {dtype}', or drop the flag"
            )
        nearest = min(found, key=lambda measured: abs(measured - tokens))
        both, scale = found[nearest], tokens / nearest
        return Sublayer(both[FORWARD] * scale, both[BACKWARD] * scale)
