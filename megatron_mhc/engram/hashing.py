"""Suffix n-grams of token ids to rows of the tables: integer arithmetic on int64 tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mhc.engram.addresses import Addresses
from megatron_mhc.settings.engram import EngramConfig

# In the place of a token that is not there. Real ids begin with 1, so that it is like no other,
# and as 0 x multiplier = 0 it drops out of the exclusive or.
ABSENT = 0


def hash_ngrams(
    ids: Tensor,
    positions: Tensor,
    engram: EngramConfig,
    addresses: Addresses,
    earlier: Tensor | None = None,
) -> Tensor:
    """The row that each token's n-grams have in each table.

    An n-gram's number is the exclusive or of (id x multiplier) over its tokens, and its row in a
    table that number modulo the table's prime (multiplicative-XOR hash, Engram section 2).

    Args:
        ids: compressed token ids >= 1, ``[b, s]``, int64.
        positions: place of each token in its document, ``[b, s]``: an n-gram begins no earlier.
        engram: orders and heads.
        addresses: of the layer.
        earlier: ids of tokens before these, ``[b, any]``.

    Returns:
        ``[b, s, orders * heads]``, rows of the layer's one matrix.
    """
    found, mixed = {}, torch.zeros_like(ids)
    line = ids if earlier is None else torch.cat([earlier, ids], 1)
    line = torch.nn.functional.pad(line, (len(addresses.multipliers), 0), value=ABSENT)
    first = line.shape[1] - ids.shape[1]
    for back, multiplier in enumerate(addresses.multipliers):
        before = line[:, first - back : line.shape[1] - back]
        before = torch.where(positions >= back, before, ABSENT)
        mixed = mixed ^ (before * multiplier)
        found[back + 1] = mixed
    numbers = torch.stack([found[order] for order in engram.ngram_orders], dim=-1)
    numbers = numbers.repeat_interleave(engram.heads, dim=-1)
    moduli, offsets = (ids.new_tensor(values) for values in (addresses.moduli, addresses.offsets))
    return numbers % moduli + offsets
