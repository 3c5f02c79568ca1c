"""``megatron-mhc report``: verdicts, what the page is made of, seeds, and axes that tell."""

from __future__ import annotations

import base64
import csv
import html.parser
import io
import json
import math
import xml.etree.ElementTree

import numpy
import pytest

from megatron_mhc.cli import main as cli
from megatron_mhc.monitor import answer as answers
from megatron_mhc.monitor.checks import LOST
from megatron_mhc.monitor.curves import curves, limits
from megatron_mhc.monitor.draw import draw_panel, extent
from megatron_mhc.monitor.heat_maps import chosen_sublayers, draw_maps
from megatron_mhc.monitor.names import (
    BY_SUBLAYER,
    COMPOSITE,
    COMPOSITE_GAINS,
    COSINE,
    GRADIENT_NORM,
    H_RES,
    LOSS,
    PREFIX,
    RANK,
    ROWS,
    SATURATED,
    SINGLE_GAINS,
    WRITE_SHARE,
)
from megatron_mhc.monitor.page import _files
from megatron_mhc.monitor.panels import PANELS
from megatron_mhc.monitor.picture import new_figure
from megatron_mhc.monitor.runs import Run, read_runs
from megatron_mhc.monitor.verdict import level, line, verdict

STEPS, L, N = (10, 20, 30), 6, 4
SOUND = {RANK: 1.5, WRITE_SHARE: 0.2, **dict.fromkeys((*SINGLE_GAINS, *COMPOSITE_GAINS), 1.0)}


@pytest.fixture
def made():
    """``made(row={(step, sublayer): value})``: a run that is sound but for these."""

    def make(changed=None, name='run', seed='', **options):
        rows = {r: {s: numpy.full(L, SOUND.get(r, 0.0)) for s in STEPS} for r in ROWS}
        for step in STEPS:
            rows[RANK][step][0] = 1.0
        for row, cells in (changed or {}).items():
            for (step, sublayer), value in cells.items():
                rows[row][step][sublayer] = value
        maps = {step: numpy.full((L, N, N), 1 / N) for step in STEPS}
        scalars = {PREFIX + COSINE: {30: 0.5}, LOSS: dict.fromkeys(STEPS, 3.0)}
        scalars |= {PREFIX + row: {s: v.max() for s, v in rows[row].items()} for row in ROWS}
        return Run(name, seed, scalars, options, 30, maps, maps[30], rows)

    return make


def at(steps, *sublayers, value):
    return {(step, sublayer): value for step in steps for sublayer in sublayers}


SINGLE, PRODUCT = SINGLE_GAINS[1], COMPOSITE_GAINS[0]
EVERY = range(L)


@pytest.mark.parametrize(
    ('changed', 'options', 'said'),
    [
        ({}, {}, 'run: healthy at iteration 30: all finite; gains bounded (composite at most 1; '),
        ({}, {}, 'no saturated rows; streams alive (effective rank 1.5 of 4, mean cosine 0.5000)'),
        (
            {'nonfinite-maps': at((20, 30), 3, 4, value=2.0)},
            {},
            'sick at iteration 30: not finite: maps of layer 2 mlp (and 1 more), since iteration '
            '20',
        ),
        (
            {'nonfinite-maps': at((10,), 3, value=1.0)},
            {},
            'watch at iteration 30: not finite: maps of layer 2 mlp, at iteration 10, not any more',
        ),
        (
            {SINGLE: at((20, 30), 2, value=3.5)},
            {},
            'sick at iteration 30: exploding gains: H_res of layer 2 attention has an amax gain '
            'above 3, up to 3.5, since iteration 20',
        ),
        # The products of all before the sublayer that explodes have its gain.
        (
            {PRODUCT: at((30,), 0, 1, 2, value=1e9)},
            {'residual_type': 'hc', 'mhc_alarm_gain': 'None'},
            'the product of all H_res from layer 2 attention (and 2 more) on has an amax gain '
            'above 100, up to 1e+09, since iteration 30',
        ),
        # What is over does not hide what goes on.
        (
            {SINGLE: at((10,), 2, value=9.0), PRODUCT: at((30,), 0, value=50.0)},
            {},
            'sick at iteration 30: exploding gains: the product of all H_res from layer 1 '
            'attention on has an amax gain above 3, up to 50, since iteration 30',
        ),
        ({PRODUCT: at((30,), 0, value=90.0)}, {'residual_type': 'hc'}, 'run: healthy'),
        ({PRODUCT: at((30,), 0, value=2.0)}, {}, 'watch at iteration 30: composite gain 2, above'),
        ({PRODUCT: at((30,), 0, value=2.0)}, {'mhc_alarm_gain': '1.9'}, 'an amax gain above 1.9'),
        (
            {SATURATED: at((20, 30), 5, value=0.25) | {(10, 0): 0.05}},
            {},
            'sick at iteration 30: saturated logits: 25% of the rows of H_res of layer 3 mlp get '
            'no gradient, since iteration 20',
        ),
        ({SATURATED: {(30, 5): 0.05}}, {}, 'watch at iteration 30: saturated logits: 5% of'),
        ({SATURATED: {(20, 5): 0.05}}, {}, 'healthy at iteration 30'),
        (
            {RANK: at((20, 30), 3, 4, value=1.0001)},
            {},
            'sick at iteration 30: collapsed streams: those before layer 2 mlp (and 1 more) have '
            'effective rank 1.0001, below 1.001, after 1.5, since iteration 20',
        ),
        (
            {RANK: at(STEPS, *EVERY, value=1.0)},
            {},
            'sick at iteration 30: collapsed streams: equal before every sublayer, effective rank '
            'at most 1.0000, mean cosine 0.5000, since iteration 10',
        ),
        # One sublayer that reads equal streams, as behind a start that writes to all alike.
        ({RANK: at(STEPS, 1, value=1.0)}, {}, 'healthy at iteration 30'),
        (
            {WRITE_SHARE: at((20, 30), 1, value=LOST / 2)},
            {},
            'write share near 0: layer 1 mlp adds next to nothing, 0.0977% of what it leaves, '
            'since iteration 20',
        ),
        (
            {WRITE_SHARE: at((30,), 1, value=1 - LOST / 2)},
            {},
            'write share near 1: layer 1 mlp drowns the streams that it reads',
        ),
    ],
)
def test_what_is_wrong_where_and_since_when(made, changed, options, said):
    run = made(changed, **options)
    assert said in line(run, verdict(run))


@pytest.mark.parametrize('tag', [LOSS, GRADIENT_NORM])
def test_what_megatron_logs_is_looked_at_without_monitors(made, tag):
    scalars = {LOSS: {1: 2.0, 2: 2.0}} | {tag: {1: 2.0, 2: math.nan}}
    run = Run('run', '', scalars, {}, None, {}, None, {})
    (finding,) = verdict(run)
    assert finding.level == 'sick' and finding.text.endswith('since iteration 2')
    json.dumps(finding.as_dict(), allow_nan=False)


def test_what_is_missing_is_no_trouble(made):
    """HC has no logits; and where everything is NaN, that is what is said."""
    run = made({SATURATED: at(STEPS, *EVERY, value=math.nan)}, residual_type='hc')
    assert level(verdict(run)) == 'healthy'
    assert 'saturation' not in [finding.check for finding in verdict(run)]
    unknown = [row for row in ROWS if not row.startswith('nonfinite')]
    rows = {row: at(STEPS, *EVERY, value=math.nan) for row in unknown}
    rows['nonfinite-streams'] = at(STEPS, *EVERY, value=1.0)
    (finding,) = verdict(made(rows))
    assert finding.text.startswith('not finite: streams of layer 1 attention (and 5 more), since')


def write_run(folder, loss, rows=None):
    """The events of one run, as the monitors write them."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        writer.add_text('residual_type', 'mhc')
        for step in STEPS:
            writer.add_scalar(LOSS, loss / step, step)
            writer.add_scalar(GRADIENT_NORM, 1.0, step)
            for row, value in SOUND.items():
                writer.add_scalar(PREFIX + row, value, step)
            table = torch.tensor([[(SOUND | (rows or {})).get(row, 0.0)] * L for row in ROWS])
            maps = torch.full((L, N, N), 1 / N)
            for tag, tensor in ((H_RES, maps), (COMPOSITE, maps), (BY_SUBLAYER, table)):
                writer.add_tensor(tag, tensor, step)
    return folder


@pytest.fixture(scope='module')
def seeds(tmp_path_factory):
    """As ``tools/quickstart.py compare`` lays them out; one seed of mhc is saturated."""
    folder = tmp_path_factory.mktemp('compare')
    for name, seed, loss, rows in (
        ('standard', 1, 60.0, None),
        ('standard', 2, 90.0, None),
        ('mhc', 2, 60.0, None),
        ('mhc', 10, 120.0, {SATURATED: 0.5}),
    ):
        write_run(folder / name / f'seed-{seed}' / 'tensorboard', loss, rows)
    return folder


def test_seeds_become_one_curve_with_a_band(seeds):
    groups = read_runs([f'base={seeds}/standard', f'{seeds}/mhc/seed-10/tensorboard'])
    groups |= read_runs([f'{seeds}/mhc'])
    names = ['base', f'{seeds}/mhc']
    assert [[(r.name, r.seed) for r in runs] for runs in groups.values()] == [
        [(names[0], 'seed-1'), (names[0], 'seed-2')],
        # By number.
        [(names[1], 'seed-2'), (names[1], 'seed-10')],
    ]
    loss, gap = (curves(panel, groups) for panel in PANELS[:2])
    assert [(c.name, c.seeds, c.steps) for c in loss] == [(name, 2, [*STEPS]) for name in names]
    assert (loss[1].mean[0], loss[1].low[0], loss[1].high[0]) == (9.0, 6.0, 12.0)
    # Seed 2 is compared with seed 2, seed 10 with the mean.
    assert (gap[1].low[0], gap[1].high[0]) == (6.0 - 9.0, 12.0 - 7.5)


def test_seeds_are_named_apart(seeds):
    one = f'{seeds}/mhc/seed-2'
    assert read_runs([one]).keys() == {f'{seeds}/mhc'}
    with pytest.raises(ValueError, match='there is a run .*seed-2.* already; name it otherwise'):
        read_runs([one, f'{one}/tensorboard'])


def test_a_folder_with_an_equals_sign_is_a_folder(seeds, tmp_path, monkeypatch):
    (tmp_path / 'lr=3').symlink_to(seeds / 'mhc')
    monkeypatch.chdir(tmp_path)
    assert read_runs(['lr=3']).keys() == {'lr=3'}
    assert read_runs(['high=lr=3']).keys() == {'high'}


class Page(html.parser.HTMLParser):
    """What a page refers to, and its text; raises where tags are not closed in order."""

    VOID = ('meta', 'img', 'br')

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.downloads, self.tags, self.text = [], [], {}, set(), ''
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attributes)
        assert not any(name.startswith('on') for name in found)
        self.addresses += [found[name] for name in ('src', 'href') if name in found]
        if tag == 'a':
            self.downloads[found['download']] = found['href']

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def content(address: str) -> str:
    head, _, data = address.partition(';base64,')
    assert head.startswith('data:')
    return base64.b64decode(data).decode()


def test_the_page_is_whole_in_itself(seeds, tmp_path, capsys, monkeypatch):
    """Markup in a name stays text; pictures, numbers and verdicts are within the page."""
    judged = []
    monkeypatch.setattr(answers, 'verdict', lambda run: judged.append(run.label) or verdict(run))
    name, output = '<b>&"x</title><script>', tmp_path / 'page.html'
    with pytest.raises(SystemExit) as end:
        cli(['report', f'{seeds}/standard', f'{name}={seeds}/mhc', '-o', str(output), '--json'])
    answer = json.loads(capsys.readouterr().out)
    assert len(judged) == len({*judged}) == 4
    # A sick run is no failure of the command.
    assert end.value.code == 0 and answer['page'] == str(output)
    page = Page(output.read_text())
    assert {'script', 'b', 'link', 'iframe', 'object'}.isdisjoint(page.tags)
    assert name in page.text and 'band is from the smallest to the largest' in page.text
    assert all(address.startswith('data:') for address in page.addresses)
    pictures = [content(a) for a in page.addresses if a.startswith('data:image/svg+xml')]
    drawn = [panel for panel in PANELS if curves(panel, read_runs([str(seeds / 'mhc')]))]
    # The gap as well; and maps and entries of two names.
    assert len(pictures) == len(drawn) + 1 + 2 * 2
    for picture in pictures:
        assert xml.etree.ElementTree.fromstring(picture).tag.endswith('svg')
    for panel in drawn:
        assert panel.healthy.format(base=f'{seeds}/standard') in page.text
    sick, sound = answer['runs'][3], answer['runs'][2]
    assert (sick['name'], sick['seed'], sick['level']) == (name, 'seed-10', 'sick')
    assert sound['level'] == 'healthy' and json.loads(content(page.downloads['verdicts.json']))
    finding = sick['findings'][0]
    assert (finding['check'], finding['since'], finding['layer'], finding['value']) == (
        *('saturation', 10, 'layer 1 attention', 0.5),
    )
    assert finding['text'] in page.text
    files = {n.rpartition('-')[2]: a for n, a in page.downloads.items() if n.startswith('<b>')}
    rows = list(csv.DictReader(io.StringIO(content(files['scalars.csv']))))
    assert [(row['iteration'], float(row[LOSS])) for row in rows] == [
        ('10', 12.0),
        ('20', 6.0),
        ('30', 4.0),
    ]


def test_a_tag_is_no_formula(made, tmp_path):
    run = made()
    run.scalars['=HYPERLINK("x")'] = dict.fromkeys(STEPS, -1.0)
    head, first, *_ = csv.reader(io.StringIO(content(_files(run)['scalars.csv'])))
    assert (head[-1], first[-1]) == ('\'=HYPERLINK("x")', '-1')


def panel_of(title):
    (found,) = (panel for panel in PANELS if panel.title.startswith(title))
    return found


def test_rounding_noise_stays_flat_and_hc_is_drawn_to_its_top(made):
    composite = panel_of('gain of the composite')
    noise = made({PRODUCT: at(STEPS, *EVERY, value=1.0000001)})
    axes = new_figure(5, 4).gca()
    draw_panel(axes, composite, curves(composite, {'run': [noise]}), {'run': [noise]})
    low, high = axes.get_ylim()
    assert axes.get_ylabel() == 'amax gain' and axes.get_yscale() == 'log'
    # The lines of the paper and of the alarm are within, and what is noise is less than a pixel.
    assert low < 0.95 and 3 < high < 10
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ['run', '1.6, most in the mHC paper', 'alarm at 3']
    wild = made({PRODUCT: at((30,), 0, value=1e9)}, residual_type='hc')
    axes = new_figure(5, 4).gca()
    draw_panel(axes, composite, curves(composite, {'run': [wild]}), {'run': [wild]})
    assert axes.get_ylim()[1] > 1e9
    assert limits(composite, {'run': [wild]}) == {100.0: 'alarm at 100'}


def test_an_axis_has_room_and_a_least_length():
    assert extent([3.0, 3.0], log=False) == pytest.approx((2.97, 3.03))
    low, high = extent([1.0, 1.0000001], log=True)
    assert high / low > 2 and low < 1 < high
    assert extent([], log=True) == (0.1, 10)


def test_maps_have_a_colour_bar_that_reaches_their_largest_entry(made):
    run = made()
    run = run._replace(composite=run.composite * 4e9)
    figure = new_figure(10, 3)
    draw_maps(figure, run, [0, 5])
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.norm.vmax for image in images] == [1.0, 1.0, 1e9]
    # Two scales, a bar each.
    assert len(figure.axes) == len(images) + 2
    reds = images[2].norm(numpy.array([1e3, 1e9]))
    assert 0.5 < reds[0] < reds[1] == 1


def test_maps_of_a_sublayer_in_trouble_are_drawn(made):
    run = made({SATURATED: {(30, 4): 1.0}})
    assert chosen_sublayers(run, None, verdict(run)) == [0, 3, 4, 5]
    assert chosen_sublayers(run, [2], verdict(run)) == [2]


def test_one_run_has_no_gap_to_itself(made):
    gap = panel_of('loss less that of')
    assert curves(gap, {'run': [made()]}) == []
    assert curves(gap, {'run': [made()], 'other': [made(name='other')]})
