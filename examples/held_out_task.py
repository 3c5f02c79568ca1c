"""Write a task for lm-evaluation-harness from the held-out text of the quick start.

    python examples/held_out_task.py --corpus runs/corpus --model runs/evaluate/model \\
        --output runs/evaluate/task
    lm_eval run --tasks held_out --include_path runs/evaluate/task --model hf \\
        --model_args pretrained=runs/evaluate/model,trust_remote_code=True,max_length=128

The documents are the files of the corpus that no training set has seen, each scored as a whole:
``bits_per_byte`` times ln 2 is Megatron's ``lm loss`` over the same windows. MODEL is what
``megatron-mhc convert --to hf`` wrote; it is given the tokenizer of tools/prepare_corpus.py (one
token a byte, 255 ends a document) where it has none.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_mhc.inputs.refusal import OneLineParser, refuse

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tools'))

from prepare_corpus import EOD, SPLITS  # noqa: E402

END = '<|endoftext|>'
TASK = """\
task: held_out
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
metadata:
  version: 1.0
"""


def documents(corpus: Path, split: str) -> list[str]:
    """The files of a split, which are UTF-8, without the byte that ends them.

    Raises:
        ValueError: ``corpus`` is none that tools/prepare_corpus.py wrote.
    """
    file = corpus / f'{split}.bin'
    if not file.is_file():
        raise ValueError(
            f'--corpus {corpus}: there is no {split}.bin; make one with tools/prepare_corpus.py'
        )
    try:
        texts = [document.decode() for document in file.read_bytes().split(bytes([EOD]))]
    except UnicodeDecodeError as error:
        raise ValueError(
            f'--corpus {corpus}: {split}.bin has tokens that are no bytes of text ({error}); give '
            'one that tools/prepare_corpus.py wrote'
        ) from error
    return [text for text in texts if text]


def write_byte_tokenizer(model: Path) -> None:
    """A tokenizer of transformers whose token ids are the bytes of UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet of GPT-2: bytes that can be printed stand for themselves, the others
    # for characters from 256 on.
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printed]
    symbols = {byte: chr(byte) for byte in printed}
    symbols |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    vocabulary = {symbols[byte]: byte for byte in range(EOD)} | {END: EOD}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(model)


def vocabulary_of(model: Path) -> int:
    """Rows of the embedding; raises ValueError where ``model`` is no folder of transformers'."""
    try:
        return int(json.loads((model / 'config.json').read_text())['vocab_size'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'--model {model}: its config.json cannot be read ({type(error).__name__}: {error}); '
            'give a folder that `megatron-mhc convert --to hf` wrote'
        ) from error


def write(corpus: Path, split: str, model: Path, output: Path) -> int:
    """Tokenizer and task; returns how many documents it has."""
    rows, texts = vocabulary_of(model), documents(corpus, split)
    if not (model / 'tokenizer_config.json').exists():
        if rows <= EOD:
            raise ValueError(
                f'--model {model}: {rows} tokens and no tokenizer, but bytes need {EOD + 1}; copy '
                'the tokenizer that it was trained with into the folder'
            )
        write_byte_tokenizer(model)
    output.mkdir(parents=True, exist_ok=True)
    file = output.resolve() / f'{split}.jsonl'
    file.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    (output / 'held_out.yaml').write_text(TASK.format(documents=json.dumps(str(file))))
    return len(texts)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog='held_out_task.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--corpus', type=Path, required=True, help='of tools/prepare_corpus.py')
    parser.add_argument('--split', choices=SPLITS[1:], default='valid')
    parser.add_argument('--model', type=Path, required=True, help='folder to be evaluated')
    parser.add_argument('--output', type=Path, required=True, help='folder for the task')
    options = parser.parse_args(argv)
    try:
        number = write(options.corpus, options.split, options.model, options.output)
    except (ValueError, OSError) as error:
        refuse(parser.prog, str(error))
    print(f'held_out: {number} documents of {options.corpus}, task in {options.output}')


if __name__ == '__main__':
    main()
