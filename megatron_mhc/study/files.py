"""The files that a study writes: tables, flags, pictures, launch scripts."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mhc.study.curves_picture import curves_picture
from megatron_mhc.study.picture import picture
from megatron_mhc.study.points import pareto
from megatron_mhc.study.report import Answer
from megatron_mhc.study.scaling import rows, several

CSV, PARETO, PICTURE, FLAGS = 'points.csv', 'pareto.csv', 'study.png', 'flags-n{}.sh'
CURVES_CSV, CURVES = 'scaling.csv', 'scaling.png'


def require_matplotlib() -> None:
    """Raise RuntimeError where nothing can be drawn."""
    if importlib.util.find_spec('matplotlib') is None:
        raise RuntimeError(
            '--output: drawing needs matplotlib, which is not installed; pip install matplotlib'
        )


def make_folder(flag: str, folder: Path) -> None:
    """Make sure that there is a folder to write to, before anything is computed.

    Raises:
        ValueError: there cannot be; names ``flag``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f'{PICTURE}.part'
        part.write_bytes(b'')
        part.unlink()
    except OSError as error:
        raise ValueError(f'{flag} {folder}: {error.strerror}; name another folder') from error


def write_study(folder: Path, answer: Answer) -> None:
    """Write tables, flags and pictures to ``folder``; those of curves where there are several GPUs.

    Raises:
        ValueError: the folder cannot be written.
    """
    study, found = answer.study, [curve for curves in answer.curves for curve in curves]
    front = [point for points in study.streams.values() for point in pareto(points)]
    contents: dict[str, str | bytes] = {
        CSV: as_csv([point.as_dict() for point in study.points]),
        PARETO: as_csv([point.as_dict() for point in front]),
        **{FLAGS.format(n): f'{text}\n' for n, text in answer.flags.items()},
        PICTURE: picture(study, answer.hardware, answer.title),
    }
    if several(found):
        contents[CURVES_CSV] = as_csv(rows(found, answer.budget))
        contents[CURVES] = curves_picture(found, answer.title)
    write('--output', folder, contents)


def write(flag: str, folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files to ``folder``, each at once or not at all; scripts can be run.

    Raises:
        ValueError: the folder cannot be written; names ``flag``.
    """
    try:
        for name, content in contents.items():
            part = folder / f'{name}.part'
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            if content[:2] == '#!':
                part.chmod(0o755)
            os.replace(part, folder / name)
    except OSError as error:
        raise ValueError(f'{flag} {folder}: {error.strerror}; name another folder') from error


def as_csv(lines: list[dict[str, Any]]) -> str:
    """A head and a line for each; empty where there is none."""
    file = io.StringIO()
    if lines:
        writer = csv.DictWriter(file, lines[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(lines)
    return file.getvalue()
