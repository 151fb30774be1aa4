# SPDX-License-Identifier: Apache-2.0
"""Text as token ids: bytes by default, or any tokenizer file of the package `tokenizers`."""

import functools
import os

import numpy as np

from particlejax.config.data import TextSpec
from particlejax.core.errors import UserError, install_line

MASK, _FIRST_ID = 1, 2  # 0 is padding; byte ids start at _FIRST


def vocabulary(spec: TextSpec) -> int:
    """Returns the vocabulary size."""
    return (
        256 + _FIRST_ID
        if spec.tokenizer == "bytes"
        else _load_tokenizer(spec.tokenizer, spec.max_length).get_vocab_size()
    )


def encode(text: str, spec: TextSpec) -> np.ndarray:
    """Returns token ids int32 [n] of a text, n <= `spec.max_length`; tokenizer files add special
    tokens, also when truncating.
    """
    if spec.tokenizer == "bytes":
        return (np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + _FIRST_ID)[
            : spec.max_length
        ]
    return np.array(_load_tokenizer(spec.tokenizer, spec.max_length).encode(text).ids, np.int32)


@functools.cache
def _load_tokenizer(path: str, length: int) -> "object":
    """Loads a tokenizer file, with truncation to `length` tokens and without padding."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"config.data.text.tokenizer={path!r} needs the package tokenizers: run "
            f"`{install_line('text')}`, or use 'bytes'."
        ) from error
    if not os.path.isfile(os.path.expanduser(path)):
        raise UserError(
            f"config.data.text.tokenizer={path!r} does not exist: set it to the path of a "
            "tokenizer.json, or 'bytes'."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(os.path.expanduser(path))
    except Exception as error:  # the package raises Exception itself
        raise UserError(
            f"config.data.text.tokenizer={path!r} is not a tokenizer file ({error}): use a "
            "tokenizer.json, or 'bytes'."
        ) from error
    num_special = tokenizer.num_special_tokens_to_add(False)
    if length <= num_special:
        raise UserError(
            f"config.data.text.max_length={length} leaves no room beside the {num_special} special "
            f"tokens of {path}: use {num_special + 1} or more."
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer
