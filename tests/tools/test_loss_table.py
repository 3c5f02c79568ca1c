"""What ``make compare`` says of several seeds, and the figures that the README has of it."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

import loss_table  # noqa: E402
import plot_losses  # noqa: E402

SHIPPED = ROOT / 'examples' / 'compare.json'


def seed(*validation: float) -> dict:
    curve = {10 * i: loss for i, loss in enumerate(validation, 1)}
    return {plot_losses.TRAIN: curve, plot_losses.VALID: curve}


def test_differences_are_paired_by_seed():
    """Seeds differ by 1, and what hc has less only by 0.2: the pairs know it to 0.1 / sqrt(2)."""
    runs = {'standard': [seed(5, 3), seed(6, 4)], 'hc': [seed(5, 2.9), seed(6, 3.7)]}
    head, base, hc, note = loss_table.comparison(runs)
    assert head.split() == ['residual', 'last', 'validation', 'less', "standard's"]
    assert base.split() == ['standard', '3.500', '0']
    assert hc.split() == ['hc', '3.300', '-0.200', '±', '0.100']
    assert '2 seeds' in note
    assert loss_table.mean_and_error([1.0, 2.0, 3.0])[1] == pytest.approx(1 / math.sqrt(3))


def test_one_seed_has_no_error():
    *_, hc, note = loss_table.comparison({'standard': [seed(3)], 'hc': [seed(2)]})
    assert hc.split() == ['hc', '2.000', '-1.000'] and 'no error is known' in note


def test_curves_of_seeds_are_drawn_with_their_differences(tmp_path):
    """A seed that stopped early counts where it has a loss."""
    runs = {'standard': [seed(5, 4, 3), seed(5, 4)], 'mhc': [seed(5, 3), seed(5, 3)]}
    plot_losses.plot(runs, tmp_path / 'x.png', 'title', 'losses of a test')
    assert source(tmp_path / 'x.png') == 'losses of a test'
    assert plot_losses.mean_curve([{1: 2.0, 2: 4.0}, {1: 4.0}]) == {1: 3.0}


def source(picture: Path) -> str:
    from PIL import Image

    with Image.open(picture) as image:
        return image.info['Title']


def test_the_readme_has_the_figures_of_its_picture():
    runs = json.loads(
        SHIPPED.read_text(),
        object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()},
    )
    assert list(runs) == ['standard', 'hc', 'mhc'] and all(
        len(seeds) > 1 for seeds in runs.values()
    )
    assert '\n'.join(loss_table.comparison(runs)) in (ROOT / 'README.md').read_text()
    assert source(SHIPPED.with_suffix('.png')) == loss_table.source_of(SHIPPED)
