"""The tokenizer of a run that had one of Hugging Face's, beside its weights."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from megatron_mhc.convert.source import require


def write_tokenizer(args: argparse.Namespace, folder: pathlib.Path) -> tuple[str, dict[str, Any]]:
    """Copy it, without a download.

    Returns:
        What was done, in one line; and the token ids that ``generate`` starts and stops at.
    """
    kind, model = getattr(args, 'tokenizer_type', None), getattr(args, 'tokenizer_model', None)
    if kind != 'HuggingFaceTokenizer' or not model:
        return f'no tokenizer: the run had {kind}, which transformers does not read', {}
    transformers = require('transformers', 'transformers')
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # Its readers raise whatever they meet.
        reason = (str(error).splitlines() or ['no message'])[0]
        return f'no tokenizer: {model} cannot be read on this machine ({reason}); copy it there', {}
    tokenizer.save_pretrained(folder)
    ends = {'bos_token_id': tokenizer.bos_token_id, 'eos_token_id': tokenizer.eos_token_id}
    return f'tokenizer: {model}', {name: end for name, end in ends.items() if end is not None}
