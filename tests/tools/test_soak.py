"""A soak in short: the real loop loses a rank, goes on, and its curve is that of a quiet run."""

import sys
from pathlib import Path

from launch import launch

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
sys.path.insert(0, str(TOOLS))

import soak  # noqa: E402


def under_the_zygote(run: Path, words: list[str]) -> None:
    done = launch(soak.RANKS, *words, SOAK_FOLDER=run, TORCHDYNAMO_DISABLE='1')
    with (run / 'train.log').open('a') as log:
        log.write(done.stdout + done.stderr)
        if done.returncode:
            # As torchrun has it. Both end survivors at once, who may have spoken before or not.
            log.write(f'failed (exitcode: {done.returncode})\n')
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def test_a_killed_rank_changes_no_bit_of_the_curve(tmp_path, capsys):
    words = '--schedules dualpipev-w --iterations 30 --save-interval 8 --seed 3 --kill 1 --slow 1'
    status = soak.main(
        [str(tmp_path), *words.split(), '--drop', '0', '--stop', '0'], under_the_zygote
    )
    said = capsys.readouterr().out
    assert status == 0, said
    assert '30 iterations in 2 lives' in said and '1 ranks killed' in said
    # What was lost since the checkpoint ran again, to the same bits.
    assert len(soak.records(tmp_path / 'dualpipev-w-shaken', 3)) > 30
