"""Build a byte-level corpus in Megatron's indexed format from text that every machine has.

By default the text is Python's own standard library. Files, not passages, are held out: the
validation and test sets consist of files that the training set has never seen.

    python tools/prepare_corpus.py --output runs/corpus
    python tools/prepare_corpus.py --output runs/notes --source ~/notes --glob '**/*.md'

One token is one byte of UTF-8. UTF-8 never contains the byte 255, which therefore ends a document:
``--tokenizer-type NullTokenizer --vocab-size 256`` (its last token is the end of document).
"""

import argparse
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
import warnings
from pathlib import Path

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.inputs.values import integer

EOD = 255
SPLITS = ('train', 'valid', 'test')
HELD_OUT = 0.05  # fraction of all bytes, for each of valid and test
FORMAT = 1  # raise it when the files written for the same text change
# Large, repetitive, or not there on every machine.
SKIPPED = {'site-packages', 'dist-packages', 'test', 'tests', '__pycache__', 'pydoc_data'}


def read_documents(source: Path, glob: str, max_bytes: int) -> dict[str, bytes]:
    """Files of ``source`` that hold distinct, valid UTF-8, in an order that is random yet fixed.

    The order is that of a hash of the file's name: the same on every machine, and unrelated to
    folders, so that held-out files come from everywhere.

    Raises:
        ValueError: too little text for three splits.
    """
    try:
        names = [p.relative_to(source).as_posix() for p in source.glob(glob) if p.is_file()]
    except (NotImplementedError, ValueError, IndexError) as error:
        raise ValueError(f'--glob {glob!r}: {error}; give a pattern such as **/*.py') from error
    names = [n for n in names if not SKIPPED.intersection(Path(n).parts)]
    documents, seen, total = {}, set(), 0
    for name in sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest()):
        data = (source / name).read_bytes()
        digest = hashlib.sha256(data).digest()
        # A copy of a training file among the held-out ones would flatter the loss.
        if not data or digest in seen or not is_utf8(data):
            continue
        if total + len(data) > max_bytes:
            continue
        seen.add(digest)
        documents[name] = data
        total += len(data)
    if len(documents) < 20:
        raise ValueError(
            f'--source {source} --glob {glob!r}: {len(documents)} usable text files within '
            f'--max-bytes {max_bytes}, but at least 20 are needed to hold some out; name a larger '
            'folder or raise --max-bytes'
        )
    return documents


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def split_by_file(documents: dict[str, bytes]) -> dict[str, list[str]]:
    """The first files, ``HELD_OUT`` of the bytes, are valid, as many test, the rest train."""
    quota = HELD_OUT * sum(map(len, documents.values()))
    splits, names = {split: [] for split in SPLITS}, iter(documents)
    for split in ('valid', 'test'):
        size = 0
        while size < quota:
            name = next(names)
            splits[split].append(name)
            size += len(documents[name])
    splits['train'] = list(names)
    return splits


def describe(documents: dict[str, bytes], splits: dict[str, list[str]]) -> dict:
    """What decides the written bytes; an equal description means that there is nothing to do."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for name, data in documents.items():
        digest.update(f'{name}\0{len(data)}\0'.encode() + data)
    tokens = {s: sum(len(documents[n]) + 1 for n in names) for s, names in splits.items()}
    return {'digest': digest.hexdigest(), 'eod': EOD, 'tokens': tokens, 'files': splits}


def write(output: Path, documents: dict[str, bytes], manifest: dict) -> None:
    """Write every split beside ``output`` first; the manifest comes last and marks it complete."""
    import numpy
    from tqdm import tqdm

    with warnings.catch_warnings():
        # Optional libraries that Megatron looks for play no part in writing files.
        warnings.simplefilter('ignore')
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f'.{output.name}-') as folder:
        scratch = Path(folder)
        with tqdm(total=len(documents), unit='file', desc='corpus', disable=None) as bar:
            for split in SPLITS:
                # One byte a token on disk, too.
                builder = IndexedDatasetBuilder(str(scratch / f'{split}.bin'), dtype=numpy.uint8)
                for name in manifest['files'][split]:
                    tokens = numpy.frombuffer(documents[name] + bytes([EOD]), dtype=numpy.uint8)
                    builder.add_document(tokens, [len(tokens)])
                    bar.update()
                builder.finalize(str(scratch / f'{split}.idx'))
        (scratch / 'manifest.json').write_text(json.dumps(manifest, indent=1))
        output.mkdir(exist_ok=True)
        (output / 'manifest.json').unlink(missing_ok=True)
        # Megatron's sample index belongs to the old files but is keyed by their path alone.
        for stale in ('cache', *SPLITS):
            shutil.rmtree(output / stale, ignore_errors=True)
        for name in (*(f'{s}.{e}' for s in SPLITS for e in ('bin', 'idx')), 'manifest.json'):
            os.replace(scratch / name, output / name)


def prepare(output: Path, source: Path, glob: str = '**/*.py', max_bytes: int = 2**24) -> dict:
    """Build the corpus unless it is there already; return its manifest.

    Raises:
        ValueError: ``source`` is no folder or holds too little, or ``output`` is something else.
    """
    if not source.is_dir():
        raise ValueError(f'--source {source}: no such folder; name one that holds text files')
    marker = output / 'manifest.json'
    ours = [f'{s}.{e}' for s in SPLITS for e in ('bin', 'idx')]
    if output.exists() and not output.is_dir():
        raise ValueError(f'--output {output}: not a folder; name a new one')
    if output.exists() and not marker.exists():
        foreign = {p.name for p in output.iterdir()} - {*ours, *SPLITS, 'cache'}
        if foreign:
            raise ValueError(
                f'--output {output}: holds other files ({sorted(foreign)[0]}), which a corpus must '
                'not be mixed with; name a new folder'
            )
    documents = read_documents(source, glob, max_bytes)
    manifest = describe(documents, split_by_file(documents))
    complete = marker.exists() and all((output / name).exists() for name in ours)
    if complete and digest_of(marker) == manifest['digest']:
        print(f'corpus {output}: up to date')
        return manifest
    write(output, documents, manifest)
    counts = ', '.join(
        f'{split} {len(manifest["files"][split])} files, {manifest["tokens"][split]:,} tokens'
        for split in SPLITS
    )
    print(f'corpus {output}: {counts} (from {source})')
    return manifest


def digest_of(marker: Path) -> str | None:
    """That of the corpus which is there; None where its manifest is damaged: it is written anew."""
    try:
        found = json.loads(marker.read_text())
    except ValueError:
        return None
    return found.get('digest') if isinstance(found, dict) else None


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog='prepare_corpus.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--output', type=Path, required=True, help='folder for {split}.bin, .idx')
    parser.add_argument(
        '--source',
        type=Path,
        default=Path(sysconfig.get_path('stdlib')),
        help="folder of text (default: this Python's standard library)",
    )
    parser.add_argument('--glob', default='**/*.py', help='which files (default: %(default)s)')
    parser.add_argument(
        '--max-bytes',
        type=integer(1, 2**40),
        default=2**24,
        help='leave out files beyond (default: 16 MiB)',
    )
    options = parser.parse_args(argv)
    try:
        prepare(options.output, options.source, options.glob, options.max_bytes)
    except (ValueError, OSError) as error:
        refuse(parser.prog, str(error))


if __name__ == '__main__':
    main()
