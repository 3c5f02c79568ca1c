"""Pictures of a step: every operation is in them, in its place."""

import json
import sys
import xml.etree.ElementTree as ET

import pytest

from megatron_mhc.schedules.catalog import make_plan
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Kind
from megatron_mhc.schedules.render_rows import label, rows, tick_step
from megatron_mhc.schedules.render_svg import render_svg
from megatron_mhc.schedules.render_text import render_text
from megatron_mhc.schedules.render_trace import render_trace
from megatron_mhc.schedules.render_window import Window, panels, window_of
from megatron_mhc.schedules.simulator import simulate
from megatron_mhc.schedules.times import Times

SVG = '{http://www.w3.org/2000/svg}'


@pytest.fixture(scope='module')
def timeline():
    return simulate(make_plan('dualpipev', 2, 4), Times(hop=0.25))


def test_text_of_a_small_step():
    text = render_text(simulate(make_plan('1f1b', 2, 2)), width=0)
    assert text.splitlines()[2:5] == [
        'rank 0 F0 F1 ......B0--- ...B1---',
        'rank 1 ...F0 B0--- F1 B1--- ......',
        '       0           4           8',
    ]


def test_text_shows_the_second_chunk_small(timeline):
    text = render_text(timeline, width=0)
    assert 'F0' in text and 'f0' in text and 'small letters: the same on chunk 1' in text
    assert '+b' in text and '+B' in text
    four = render_text(simulate(make_plan('interleaved', 2, 4, chunks=4)), width=0)
    assert '7F0' in four and '5F3: forward of microbatch 3 through stage 5' in four
    assert 'chunk 0: stages 0 to 1; chunk 1: stages 2 to 3; ' in four


@pytest.mark.parametrize('width', [40, 80, 200])
def test_text_fits_the_width_and_keeps_both_ends(width):
    timeline = simulate(make_plan('dualpipev', 8, 32))
    lines = render_text(timeline, width).splitlines()
    drawn = [line for line in lines if line.startswith('rank')]
    # The last column is the space after the last operation.
    assert len(drawn) == 8 and max(map(len, drawn)) == width - 1
    assert drawn[0].startswith('rank 0 F0- F1-') and drawn[0].endswith('I31 W31')
    assert len(lines[lines.index(drawn[-1]) + 1]) <= width
    assert all(' ~~ ' in line for line in drawn) and 'left out in between: ' in lines[2]


def test_text_of_all_lanes_shows_hops(timeline):
    lines = render_text(timeline, 0, ('compute', 'comm')).splitlines()
    assert any(line.startswith('rank 0 messages') and 'F' in line for line in lines)


def test_a_short_recompute_does_not_stretch_the_text():
    plan = make_plan('1f1b', 2, 2)
    own = lower(plan, recompute=True, reduce=False)
    text = render_text(simulate(own, Times(recompute=0.01)), 0)
    assert text.splitlines()[3] == 'rank 1 ...F0 B0--- F1 B1--- ......'
    assert 'R recompute' in text


@pytest.mark.parametrize(
    'times', [Times(forward=1e7), Times(hop=1e9), Times(forward=1e15, hop=1e-300, reduce=1e-300)]
)
def test_times_far_apart_are_drawn_all_the_same(times):
    """As many marks, pixels and columns as a reader can follow, whatever the shortest takes."""
    timeline = simulate(make_plan('1f1b', 2, 4), times)
    svg = render_svg(timeline)
    assert len(svg) < 5_000_000 and float(ET.fromstring(svg).get('width')) <= 1_000_000
    for width, most in ((100, 100), (0, 1_000_016)):
        drawn = [s for s in render_text(timeline, width).splitlines() if s.startswith('rank ')]
        assert len(drawn) == 2 and max(map(len, drawn)) <= most
        assert 'F0' in drawn[0] and {len(drawn[0]), len(drawn[1])} & {most, most - 9}


def test_rows_do_not_overlap():
    plan = make_plan('dualpipe', 4, 16)
    timeline = simulate(plan, Times(hop=5))
    found = rows(timeline)
    assert sum(len(row.entries) for row in found) == len(timeline.entries)
    assert any(row.name == 'comm 2' for row in found)
    for row in found:
        pairs = zip(row.entries, row.entries[1:], strict=False)
        assert all(a.end <= b.start + 1e-9 for a, b in pairs)


def test_svg_has_a_box_for_each_operation(timeline):
    root = ET.fromstring(render_svg(timeline))
    titles = [t.text for t in root.iter(f'{SVG}title')]
    assert len(titles) == len(timeline.entries)
    entry = next(e for e in timeline.entries if e.op.kind is Kind.FUSE)
    assert f'{entry.op}  {entry.start:.6g} to {entry.end:.6g}' in titles
    texts = {t.text for t in root.iter(f'{SVG}text')}
    assert {'rank 0', 'rank 1', 'F0', 'f0', 'F forward', 'SEND hop', '0'} <= texts
    assert 'R recompute' not in texts and 'messages' in texts
    assert {'chunk 0: stages 0 to 1', 'chunk 1: stages 2 to 3', 'idle'} <= texts
    assert any(text.startswith('time; the forward of one microbatch') for text in texts)
    right = max(
        float(r.get('x', 0)) + float(r.get('width'))
        for r in root.iter(f'{SVG}rect')
        if '%' not in r.get('width')
    )
    assert right <= float(root.get('width'))


def test_trace_is_a_process_a_rank_and_a_thread_a_lane(timeline):
    trace = json.loads(render_trace(timeline))
    events = [e for e in trace['traceEvents'] if e['ph'] == 'X']
    assert len(events) == len(timeline.entries)
    names = {
        (e['name'], e['pid'], e['tid']): e['args']['name']
        for e in trace['traceEvents']
        if e['name'] in ('process_name', 'thread_name')
    }
    assert names['process_name', 1, 0] == 'rank 1'
    assert names['thread_name', 1, 0] == 'compute' and names['thread_name', 1, 1] == 'comm'
    last = max(events, key=lambda e: e['ts'] + e['dur'])
    assert last['ts'] + last['dur'] == pytest.approx(1000 * timeline.makespan)
    assert {e['pid'] for e in events} == {0, 1}
    send = next(e for e in events if e['name'] == '0SEND_F0')
    assert send['args'] == {'stage': 0, 'direction': 0, 'microbatch': 0, 'to rank': 1}
    assert trace['otherData'] == {'schedule': 'dualpipev', 'pp': 2, 'microbatches': 4}


def test_png_is_a_picture(timeline):
    pytest.importorskip('matplotlib')
    from megatron_mhc.commands.schedule_png import render_png

    png = render_png(timeline)
    assert png[:8] == b'\x89PNG\r\n\x1a\n' and len(png) > 5_000
    long = simulate(make_plan('1f1b', 2, 64))
    wide, narrow = (int.from_bytes(render_png(long, None, w)[16:20]) for w in (2400, 1500))
    assert 1400 < narrow <= 1500 and 2300 < wide <= 2400
    part = render_png(long, Window(0, 4))
    assert int.from_bytes(part[16:20]) < 1500


def test_a_png_of_too_many_ranks_is_refused(timeline, monkeypatch):
    pytest.importorskip('matplotlib')
    from megatron_mhc.commands import schedule_png

    monkeypatch.setattr(schedule_png, '_LARGEST', 200)
    with pytest.raises(ValueError, match='pixels high, at most 200; take --format svg'):
        schedule_png.render_png(timeline)


def boxes(svg):
    """What each operation's box says under the pointer, and where it begins and ends."""
    return [
        (rect[0].text, float(rect.get('x')), float(rect.get('x')) + float(rect.get('width')))
        for rect in ET.fromstring(svg).iter(f'{SVG}rect')
        if len(rect)
    ]


def test_a_window_has_what_runs_in_it_and_no_more():
    timeline = simulate(make_plan('1f1b', 2, 4))
    window = Window(3.5, 6.25)
    found = boxes(render_svg(timeline, window=window))
    inside = [e for e in timeline.entries if e.start < 6.25 and e.end > 3.5 and e.end > e.start]
    said = {about for about, *_ in found}
    assert {f'{e.op}  {e.start:.6g} to {e.end:.6g}' for e in inside} <= said
    assert len(found) < len(timeline.entries)
    # 20 pixels a unit, from the margin on.
    assert {left for _, left, _ in found} >= {86.0}
    assert max(right for *_, right in found) == pytest.approx(86 + 20 * 2.75)
    texts = ET.fromstring(render_svg(timeline, window=window)).itertext()
    assert 'shown: 3.5 to 6.25 of 0 to 15' in texts
    lines = render_text(timeline, 0, window=window).splitlines()
    assert lines[2] == 'shown: 3.5 to 6.25 of 0 to 15'
    assert lines[3:5] == ['rank 0 ..B0---', 'rank 1 B0F1B1-']
    names = {e['name'] for e in json.loads(render_trace(timeline, window))['traceEvents']}
    assert '1B1' in names and '0F0' not in names


def test_a_long_picture_loses_its_middle_and_says_so():
    timeline = simulate(make_plan('1f1b', 4, 32))
    svg = render_svg(timeline, widest=800)
    root = ET.fromstring(svg)
    assert float(root.get('width')) <= 800
    said = 'shown: 0 to 13.5 and 91.5 to 105 of 0 to 105; left out in between: 13.5 to 91.5'
    assert said in root.itertext()
    found = boxes(svg)
    assert any(about.startswith('0F0 ') for about, *_ in found)
    assert any(about.startswith('0B31 ') for about, *_ in found)
    assert not any(about.startswith('0F20 ') for about, *_ in found)
    assert panels(Window(0, 10), 10) == [Window(0, 10)]


@pytest.mark.parametrize('start, end, words', [(24, None, '--from 24'), (3, 3, '--to 3')])
def test_an_empty_window_is_refused(start, end, words):
    with pytest.raises(ValueError, match=words):
        window_of(simulate(make_plan('1f1b', 2, 7)), start, end)


def test_later_chunks_are_darker():
    svg = render_svg(simulate(make_plan('interleaved', 2, 2, chunks=3)))
    rects = [rect for rect in ET.fromstring(svg).iter(f'{SVG}rect') if not len(rect)]
    shades = {rect.get('fill-opacity') for rect in rects if rect.get('fill') == '#7fb8e6'}
    assert shades == {'0.45', '0.725', None}


def test_png_without_matplotlib_says_what_to_do(timeline, monkeypatch):
    from megatron_mhc.commands.schedule_png import render_png

    monkeypatch.setitem(sys.modules, 'matplotlib.backends.backend_agg', None)
    with pytest.raises(RuntimeError, match='pip install matplotlib, or take --format svg'):
        render_png(timeline)


def test_text_never_shows_half_a_number():
    timeline = simulate(make_plan('dualpipev', 8, 32))
    whole = {label(timeline.plan, e.op) for e in timeline.entries}
    for width in range(60, 90):
        for line in render_text(timeline, width).splitlines()[3:11]:
            assert line.startswith('rank ')
            words = {word.strip('.-') for word in line.split()[2:] if word != '~~'}
            assert words - {''} <= whole


@pytest.mark.parametrize('makespan, step', [(1, 0.1), (9, 1), (12, 1), (103, 10), (0.5, 0.05)])
def test_ticks_are_round(makespan, step):
    assert tick_step(makespan) == pytest.approx(step)
