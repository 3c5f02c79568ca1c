"""Paths in a checkpoint are read under every name that a release of Python has for them."""

import io
import pathlib
import pickle
import zipfile

import pytest
import torch

from megatron_mhc.checkpoints.plain import load_metadata, plain_load

PATH = pathlib.PosixPath('/a/b')
NAMES = {'3.12': b'cpathlib\nPosixPath\n', '3.13': b'cpathlib._local\nPosixPath\n'}
(OWN,) = (name for name in NAMES.values() if name in pickle.dumps(PATH, 2))


@pytest.fixture(params=NAMES)
def name(request) -> bytes:
    return NAMES[request.param]


def test_of_arguments(name, tmp_path):
    """What ``torch.save`` writes, with the class under ``name``."""
    written = io.BytesIO()
    torch.save({'path': PATH}, written)
    with (
        zipfile.ZipFile(written) as old,
        zipfile.ZipFile(tmp_path / 'common.pt', 'w', zipfile.ZIP_STORED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry).replace(OWN, name))
    assert plain_load(tmp_path / 'common.pt') == {'path': PATH}


def test_of_metadata(name, tmp_path):
    from torch.distributed.checkpoint.metadata import Metadata

    metadata = Metadata({}, {}, {'/a/b': PATH})
    (tmp_path / '.metadata').write_bytes(pickle.dumps(metadata, 2).replace(OWN, name))
    assert load_metadata(tmp_path / '.metadata').storage_data == {'/a/b': PATH}
