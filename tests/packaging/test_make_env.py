"""``tools/make_env.sh``: whose package an environment holds is not changed silently."""

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(tmp_path):
    """``environment(checkout)``: one without pip, so that nothing can be installed into it."""

    def make(checkout: Path) -> Path:
        folder = tmp_path / 'environment'
        venv.create(folder, with_pip=False, symlinks=True)
        (site,) = folder.glob('lib/python3.*/site-packages')
        info = site / 'megatron_mhc-0.1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(
            'Metadata-Version: 2.1\nName: megatron-mhc\nVersion: 0.1.0\n'
        )
        origin = {'dir_info': {'editable': True}, 'url': checkout.as_uri()}
        (info / 'direct_url.json').write_text(json.dumps(origin))
        return folder

    return make


def make_env(environment: Path) -> subprocess.CompletedProcess:
    # Another copy on the path must not be taken for what is installed.
    return subprocess.run(
        [ROOT / 'tools' / 'make_env.sh', environment],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_an_environment_of_another_checkout_is_refused(environment, tmp_path):
    other = tmp_path / 'other checkout'
    (other / 'megatron_mhc').mkdir(parents=True)
    folder = environment(other)
    done = make_env(folder)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    for part in (f'VENV={folder}', f'from {other},', f'not from {ROOT}:', 'name another VENV'):
        assert part in line
    assert f'{folder}/bin/python -m pip uninstall --yes megatron-mhc' in line
    assert folder.is_dir()


@pytest.mark.parametrize('gone', [True, False])
def test_an_environment_of_this_checkout_or_a_lost_one_is_updated(environment, tmp_path, gone):
    done = make_env(environment(tmp_path / 'moved away' if gone else ROOT))
    assert 'No module named pip' in done.stderr and 'has megatron-mhc' not in done.stderr
