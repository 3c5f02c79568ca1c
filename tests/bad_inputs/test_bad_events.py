"""``megatron-mhc report`` on what a killed run leaves, and on names that look like formulas."""

from __future__ import annotations

import io
import random
import shutil

import pytest
import torch
from one_line import check, in_time, said

from megatron_mhc.cli import main
from megatron_mhc.monitor.curves import curves
from megatron_mhc.monitor.draw import draw_panel
from megatron_mhc.monitor.heat_maps import draw_maps
from megatron_mhc.monitor.names import BY_SUBLAYER, COMPOSITE, GRADIENT_NORM, H_RES, LOSS, ROWS
from megatron_mhc.monitor.panels import PANELS
from megatron_mhc.monitor.picture import new_figure
from megatron_mhc.monitor.runs import read_run, read_runs
from megatron_mhc.monitor.verdict import line, verdict


@pytest.fixture(scope='module')
def events(tmp_path_factory):
    """The event file of a run with two reports, in the order in which they are written."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp('whole')
    maps = torch.eye(2).expand(4, 2, 2)
    with SummaryWriter(str(folder)) as writer:
        for iteration in (1, 2):
            writer.add_scalar(LOSS, 5.0 / iteration, iteration)
            writer.add_scalar(GRADIENT_NORM, float('nan'), iteration)
            rows = torch.ones(len(ROWS), 4)
            for tag, tensor in ((H_RES, maps), (COMPOSITE, maps), (BY_SUBLAYER, rows)):
                writer.add_tensor(tag, tensor, iteration)
    (file,) = folder.iterdir()
    return file


def cut(events, folder, size: int):
    (folder / events.name).write_bytes(events.read_bytes()[:size])
    return folder


def test_a_file_cut_anywhere_is_read_as_far_as_it_is_whole(events, tmp_path, random_seed):
    size, seen = events.stat().st_size, set()
    whole = read_run(events.parent, 'whole')
    assert whole.iteration == 2 and list(whole.h_res) == [1, 2] and len(whole.composite) == 4
    for at in [size - 1, *random.Random(random_seed).sample(range(1, size), 60)]:
        with in_time():
            try:
                run = read_run(cut(events, tmp_path, at), 'cut')
            except ValueError as error:
                assert str(error).startswith(f'LOGDIR {tmp_path}: ') and '; ' in str(error)
                seen.add('refused')
                continue
        # The maps, the rows by sublayer and the iteration that they are of belong together.
        assert run.iteration in (None, 1, 2)
        assert [*run.h_res] == [*range(1, (run.iteration or 0) + 1)]
        assert bool(run.by_sublayer) == (run.composite is not None) == bool(run.h_res)
        seen.add(run.iteration)
    assert {None, 1, 'refused'} <= seen


def test_damaged_bytes_are_no_traceback(events, tmp_path, random_seed):
    draw = random.Random(random_seed)
    for _ in range(40):
        data = bytearray(events.read_bytes())
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
        (tmp_path / events.name).write_bytes(bytes(data))
        with in_time():
            try:
                read_run(tmp_path, 'damaged')
            except ValueError as error:
                assert '\n' not in str(error) and '; ' in str(error)


def test_a_run_whose_maps_were_cut_off(events, tmp_path):
    first = events.read_bytes().index(COMPOSITE.encode())
    run = read_run(cut(events, tmp_path, first), 'cut')
    # The gradient norm is not a number from the beginning.
    wanted = 'sick at iteration 1: not finite: the gradient norm, since iteration 1; there is no'
    assert wanted in line(run, verdict(run))


NAMES = (r'$\frac{x$', '$', '_x', r'\frac{', '100 %', '{', '<b>&"x')


def test_names_are_drawn_as_they_are(events):
    """In legends, where a name may not be left out either, and in the titles of maps."""
    groups = {name: [read_run(events.parent, name)] for name in NAMES}
    gap, figure = PANELS[1], new_figure(5, 4)
    draw_panel(figure.gca(), gap, curves(gap, groups), groups)
    figure.savefig(io.BytesIO(), format='svg')
    shown = [text.get_text() for text in figure.gca().get_legend().get_texts()]
    assert [text.replace(r'\$', '$').strip() for text in shown] == list(NAMES)
    for (run,) in groups.values():
        figure = new_figure(5, 2)
        draw_maps(figure, run, [3])
        figure.savefig(io.BytesIO(), format='svg')


def test_a_name_is_one_line_that_can_be_encoded(events, tmp_path):
    folder = shutil.copytree(events.parent, tmp_path / '\x1b[1m\n=')
    for word in (f'={folder}', f'\udc80={events.parent}'):
        ((name, (run,)),) = read_runs([word]).items()
        assert run.label == name and name.isprintable() and name.encode()
        assert line(run, verdict(run)).startswith(f'{name}: ')


@pytest.mark.parametrize(
    ('line', 'names'),
    [
        ('--sublayers 4', ('--sublayers', '4')),
        ('--sublayers -1', ('--sublayers', '-1')),
        ('-o x', ('--output', 'x')),
        ('-o x.doc', ('--output', 'x.doc')),
        ('-o /no/such/x.png', ('--output', '/no/such/x.png')),
        ('-o .', ('--output', '.')),
    ],
)
def test_what_cannot_be_drawn_is_refused(events, line, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(main, said(f'report a={events.parent} {line}', *names))
