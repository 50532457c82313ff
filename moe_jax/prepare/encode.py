"""Tokenization in parallel processes, in order and with a bounded number of texts in memory. Imports no jax."""

import errno
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_jax.data.hugging_face import HuggingFaceTokenizer
from moe_jax.data.tokenizer import Tokenizer, document_end, document_start, split_specials
from moe_jax.data.tokenizer_file import load_tokenizer
from moe_jax.prepare.sources import AROUND, Piece

_TASK_CHARACTERS = 1 << 19
_WAITING_TASKS = 3
"""Tasks a process, of which one is computed."""

Task = tuple[str, list[Piece]]
"""A split, and pieces of it that one process tokenizes."""


@dataclass
class Encoded:
    split: str
    ids: np.ndarray
    """Of all pieces, with what stands before and after documents, in the type of the shards."""
    documents: np.ndarray
    """[documents + 1, 3] tokens, bytes of text and unknown tokens of each document that ends in it, from the task's
    start on, and of what follows; pieces that would not come back as they were count as unknown tokens, too."""


def in_tasks(pieces: Iterable[tuple[str, Piece]]) -> Iterator[Task]:
    """Groups (split, piece) into tasks; which ones depends on the pieces alone."""
    tasks: dict[str, list[Piece]] = {}
    sizes: dict[str, int] = {}
    for split, piece in pieces:
        tasks.setdefault(split, []).append(piece)
        sizes[split] = sizes.get(split, 0) + len(piece.text)
        if sizes[split] >= _TASK_CHARACTERS:
            del sizes[split]
            yield split, tasks.pop(split)
    yield from tasks.items()


def encode(task: Task, tokenizer: Tokenizer, dtype: np.dtype, *, parse_specials: bool) -> Encoded:
    """The tokens of ``task``."""
    split, pieces = task
    start = np.array([document_start(tokenizer)], np.uint32)
    end = np.array([document_end(tokenizer)], np.uint32)
    is_chat = tokenizer.delimiters == "chat"
    arrays, counts = [], [[0, 0, 0]]
    for piece in pieces:
        ids, plain_bytes, lost = encode_piece(piece, tokenizer, parse_specials=parse_specials)
        before, after = int(piece.is_first), int(piece.is_last and is_chat)
        arrays += [start] * before + [ids] + [end] * after
        counts[-1] = [*map(sum, zip(counts[-1], (len(ids) + before + after, plain_bytes, lost), strict=True))]
        if piece.is_last:
            counts.append([0, 0, 0])
    ids, documents = np.concatenate(arrays).astype(dtype), np.array(counts, np.int64)
    if tokenizer.unknown_id is not None:
        unknown_before = np.append(0, np.cumsum(ids == tokenizer.unknown_id))
        documents[:, 2] += np.diff(unknown_before[np.append(0, np.cumsum(documents[:, 0]))])
    return Encoded(split, ids, documents)


def encode_piece(piece: Piece, tokenizer: Tokenizer, *, parse_specials: bool) -> tuple[np.ndarray, int, int]:
    """(ids, bytes of text, parts that would not come back as they were) of ``piece``."""
    if parse_specials:
        parts = split_specials(tokenizer, piece.text)
        before, after = split_specials(tokenizer, piece.before)[-1], split_specials(tokenizer, piece.after)[0]
    else:
        parts, before, after = [piece.text], piece.before, piece.after
    arrays, num_bytes, num_lost = [], 0, 0
    for index, part in enumerate(parts):
        if index % 2:  # the spelling of a special token, which is no text to predict
            arrays.append(np.array([tokenizer.spellings[part]], np.uint32))
            continue
        num_bytes += len(part.encode())
        if isinstance(tokenizer, HuggingFaceTokenizer):
            # Normalizers and vocabularies without all bytes lose text, and nothing in the file says so.
            left = before if index == 0 else ""
            right = after if index == len(parts) - 1 else ""
            # Where a cut is in a run of one character, the two pieces would not agree on the token that crosses it.
            left = left if left and tokenizer.is_local(left, part[:AROUND].rstrip()) else ""
            right = right if right and tokenizer.is_local(part[-AROUND:].lstrip(), right) else ""
            ids, comes_back = tokenizer.encode_within(left, part, right)
            num_lost += not comes_back
        else:
            ids = tokenizer.encode(part)
        arrays.append(ids.astype(np.uint32, copy=False))
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0], num_bytes, num_lost


def encode_all(
    tasks: Iterable[Task], tokenizer: Tokenizer, folder: Path, dtype: np.dtype, *, parse_specials: bool, processes: int
) -> Iterator[Encoded]:
    """The tokens of each task, in order, by ``tokenizer``, which other processes load from ``folder``."""
    if processes == 1:
        yield from (encode(task, tokenizer, dtype, parse_specials=parse_specials) for task in tasks)
        return
    context, settings = multiprocessing.get_context("spawn"), (folder, dtype, parse_specials)
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=settings)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_encode_in_worker, task))
            if len(waiting) >= processes * _WAITING_TASKS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise OSError(
            errno.ENOMEM,
            "a process that tokenizes was ended from outside, as happens when memory runs out; "
            "run the same command again with fewer --processes",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, np.dtype, bool]


def _start_worker(folder: Path, dtype: np.dtype, parse_specials: bool) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = load_tokenizer(folder), dtype, parse_specials


def _end_with_parent() -> None:
    """A parent that was killed cannot end this process, which would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(task: Task) -> Encoded:
    tokenizer, dtype, parse_specials = _worker
    return encode(task, tokenizer, dtype, parse_specials=parse_specials)
