"""The hash against Python's unbounded integers, the same in every process, and the token map."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch

from megatron_mhc.engram.addresses import LARGEST, ROW_BLOCKS, addresses, moduli, rows
from megatron_mhc.engram.hashing import hash_ngrams
from megatron_mhc.engram.token_map import token_map
from megatron_mhc.settings.engram import EngramConfig

ENGRAM = EngramConfig((2, 15), (2, 3, 5), 4, 1000, 24, seed=3)
VOCABULARY = 129_280


def reference(ids, positions, engram, where):
    """Rows of one sequence, in integers that cannot overflow."""
    found = []
    for t in range(len(ids)):
        row = []
        for index, order in enumerate(engram.ngram_orders):
            number = 0
            for back in range(min(order, positions[t] + 1)):
                number ^= ids[t - back] * where.multipliers[back]
            assert 0 <= number <= LARGEST
            for head in range(engram.heads):
                table = index * engram.heads + head
                row.append(number % where.moduli[table] + sum(where.moduli[:table]))
        found.append(row)
    return found


@pytest.mark.parametrize('layer', [2, 15])
@pytest.mark.parametrize('vocabulary', [VOCABULARY, 7, 2**40])
def test_hash_is_that_of_unbounded_integers(random_seed, layer, vocabulary):
    where = addresses(ENGRAM, layer, vocabulary)
    ids = torch.randint(1, vocabulary + 1, (3, 40))
    ids[0, 7] = vocabulary
    positions = torch.stack(
        [torch.arange(40), torch.arange(40) % 11, torch.cat([torch.arange(3), torch.arange(37)])]
    )
    got = hash_ngrams(ids, positions, ENGRAM, where)
    for sequence in range(3):
        expected = reference(ids[sequence].tolist(), positions[sequence].tolist(), ENGRAM, where)
        assert got[sequence].tolist() == expected
    tops = torch.tensor([*where.offsets[1:], sum(where.moduli)])
    assert (got < tops).all() and (got >= torch.tensor(where.offsets)).all()


def test_moduli_are_the_next_primes_and_rows_do_not_depend_on_ranks():
    def prime(n):
        return all(n % d for d in range(2, math.isqrt(n) + 1))

    found = moduli(1000, 12)
    assert found == tuple(n for n in range(1000, found[-1] + 1) if prime(n))
    assert moduli(2, 4) == (2, 3, 5, 7)
    assert rows(ENGRAM) % ROW_BLOCKS == 0 and 0 <= rows(ENGRAM) - sum(found) < ROW_BLOCKS


def test_every_default_is_the_papers():
    engram = EngramConfig((2, 15))
    assert (engram.ngram_orders, engram.heads, engram.dim, engram.lr_mult) == ((2, 3), 8, 1280, 5)
    parameters = 2 * rows(engram) * engram.row_width
    assert parameters == pytest.approx(5.7e9, rel=0.02)


def test_a_token_changes_the_n_grams_that_contain_it_and_no_other(random_seed):
    where = addresses(ENGRAM, 2, VOCABULARY)
    ids, positions = torch.randint(1, 1000, (1, 20)), torch.arange(20)[None]
    other = ids.clone()
    other[0, 9] += 1
    changed = hash_ngrams(ids, positions, ENGRAM, where) != hash_ngrams(
        other, positions, ENGRAM, where
    )
    for index, order in enumerate(ENGRAM.ngram_orders):
        touched = changed[0, :, index * 4 : index * 4 + 4].any(-1).nonzero().flatten().tolist()
        assert touched == list(range(9, 9 + order))


def test_layers_orders_of_tokens_and_seeds_hash_differently():
    ids, positions = torch.tensor([[5, 9], [9, 5]]), torch.arange(2)[None]

    def bigrams(layer, engram=ENGRAM):
        return hash_ngrams(ids, positions, engram, addresses(engram, layer, VOCABULARY))[:, 1, :4]

    found = bigrams(2)
    assert (found[0] != found[1]).all()
    assert (found != bigrams(15)).all()
    other = EngramConfig((2, 15), (2, 3, 5), 4, 1000, 24, seed=4)
    assert (found != bigrams(2, other)).all()


PRINT = """
import json, torch
from megatron_mhc.engram.addresses import addresses
from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.engram.hashing import hash_ngrams
torch.manual_seed(1)
engram = EngramConfig((2, 15), (2, 3, 5), 4, 1000, 24, seed=3)
ids = torch.arange(1, 31).view(1, 30) * 4001
where = addresses(engram, 15, 129280)
print(json.dumps([where, hash_ngrams(ids, torch.arange(30)[None], engram, where).tolist()]))
"""


def test_other_processes_hash_alike(capsys):
    """With other seeds of Python's own hash and of torch; and these numbers are for ever."""
    done = subprocess.run(
        [sys.executable, '-c', PRINT],
        env=os.environ | {'PYTHONHASHSEED': '1'},
        capture_output=True,
        text=True,
        check=True,
    )
    exec(PRINT, {})
    assert done.stdout == capsys.readouterr().out
    where, found = json.loads(done.stdout)
    assert where[0][:2] == [48808016287177, 15220718622731]
    assert found[0][29][:6] == [609, 1839, 2522, 3864, 4846, 6087]


def tokenizer(*texts, library='huggingface'):
    return types.SimpleNamespace(
        library=library, vocab_size=len(texts), detokenize=lambda ids: texts[ids[0]]
    )


def test_equivalent_texts_share_an_id():
    texts = ('the', ' The', 'THE', 'then', ' ', '  ', '', '\ufffd', ' \ufffd', 'ﬁ', 'FI', '①', '1')
    mapped = token_map(tokenizer(*texts), 15)
    assert mapped.tolist() == [1, 1, 1, 4, 5, 6, 7, 8, 9, 10, 10, 12, 12, 14, 15]


def test_tokens_without_texts_stay_themselves(capsys):
    own = list(range(1, 9))
    for given in (None, tokenizer('1', '1', library='null-text'), tokenizer('', ' ', library='x')):
        assert token_map(given, 8).tolist() == own
    said = capsys.readouterr().out
    assert 'null-text has no texts' in said and 'x decodes none of them' in said


@pytest.mark.parametrize(('library', 'left'), [('byte-level', 300 - 26), ('null-text', 300)])
def test_megatrons_own_tokenizers(library, left):
    """Bytes of capital letters are those of small ones; special ids cannot be decoded."""
    from megatron.core.tokenizers import MegatronTokenizer

    made = MegatronTokenizer.from_pretrained(metadata_path={'library': library}, vocab_size=260)
    assert token_map(made, 300).unique().numel() == left


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'layers': ()}, '--engram-layers : wanted distinct integers from 1'),
        ({'layers': (0, 2)}, '--engram-layers 0 2: wanted'),
        ({'layers': (2, 2)}, '--engram-layers 2 2: wanted'),
        ({'ngram_orders': (1, 2)}, '--engram-ngram-orders 1 2: wanted'),
        ({'heads': 0}, '--engram-heads 0: wanted an integer from 1'),
        ({'table_size': 1}, '--engram-table-size 1: wanted an integer from 2'),
        ({'seed': -1}, '--engram-seed -1: wanted an integer from 0'),
        ({'lr_mult': float('nan')}, '--engram-lr-mult nan: wanted a finite'),
        ({'dim': 1281}, '--engram-dim 1281: not a multiple .* 2 orders x 8 heads = 16 .* use 1296'),
    ],
)
def test_wrong_values_name_their_flag(settings, message):
    with pytest.raises(ValueError, match=message):
        EngramConfig(**{'layers': (2, 15), **settings})
