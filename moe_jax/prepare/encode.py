"""Tokenization in parallel processes, in order and with a bounded number of texts in memory. Imports no jax."""

import errno
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_jax.data.tokenizer import (
    Tokenizer,
    document_end,
    document_start,
    encode_with_specials,
    from_json,
    to_json,
    without_specials,
)
from moe_jax.prepare.sources import Piece

_TASK_CHARACTERS = 1 << 19
_WAITING_TASKS = 3
"""Tasks a process, of which one is computed."""


@dataclass
class Task:
    """Pieces of one split that one process tokenizes."""

    split: str
    block: int
    """Part of the input that the pieces are from: what is made durable at once."""
    texts: list[str] = field(default_factory=list)
    is_first: list[bool] = field(default_factory=list)
    is_last: list[bool] = field(default_factory=list)


@dataclass
class Encoded:
    split: str
    block: int
    ids: np.ndarray
    """Of all pieces, with what stands before and after documents, in the type of the shards."""
    lengths: np.ndarray
    """[pieces] tokens of each."""
    is_last: np.ndarray
    """[pieces] whether a document ends with it."""
    num_characters: int
    num_bytes: int
    num_unknown: int
    """Tokens for text that the tokenizer cannot represent, and pieces that would not come back as they were."""


def in_tasks(pieces: Iterable[tuple[str, Piece]], block_characters: int, first_block: int) -> Iterator[Task]:
    """Groups (split, piece) into tasks; the pieces of the blocks before ``first_block`` are passed over."""
    seen = 0
    tasks: dict[str, Task] = {}
    sizes: dict[str, int] = {}
    block = 0
    for split, piece in pieces:
        if seen // block_characters != block:
            yield from tasks.values()
            tasks, sizes, block = {}, {}, seen // block_characters
        seen += len(piece.text)
        if block < first_block:
            continue
        task = tasks.setdefault(split, Task(split, block))
        task.texts.append(piece.text)
        task.is_first.append(piece.is_first)
        task.is_last.append(piece.is_last)
        sizes[split] = sizes.get(split, 0) + len(piece.text)
        if sizes[split] >= _TASK_CHARACTERS:
            yield tasks.pop(split)
            del sizes[split]
    yield from tasks.values()


def encode(task: Task, tokenizer: Tokenizer, dtype: np.dtype, *, parse_specials: bool) -> Encoded:
    """The tokens of ``task``."""
    start = np.array([document_start(tokenizer)], np.uint32)
    end = np.array([document_end(tokenizer)], np.uint32)
    is_chat = tokenizer.delimiters == "chat"
    arrays, lengths, num_bytes, num_lost = [], [], 0, 0
    for text, is_first, is_last in zip(task.texts, task.is_first, task.is_last, strict=True):
        ids = encode_with_specials(tokenizer, text) if parse_specials else tokenizer.encode(text)
        before, after = int(is_first), int(is_last and is_chat)
        arrays += [start] * before + [ids] + [end] * after
        lengths.append(len(ids) + before + after)
        # The spelling of a special token is no text to predict.
        plain = without_specials(tokenizer, text) if parse_specials else text
        num_bytes += len(plain.encode())
        num_lost += not tokenizer.is_lossless and tokenizer.decode(ids.tolist()) != text
    ids = np.concatenate(arrays).astype(dtype)
    unknown = tokenizer.unknown_id
    return Encoded(
        split=task.split,
        block=task.block,
        ids=ids,
        lengths=np.array(lengths, np.int64),
        is_last=np.array(task.is_last),
        num_characters=sum(map(len, task.texts)),
        num_bytes=num_bytes,
        num_unknown=num_lost + (0 if unknown is None else int(np.count_nonzero(ids == unknown))),
    )


def encode_all(
    tasks: Iterable[Task], tokenizer: Tokenizer, dtype: np.dtype, *, parse_specials: bool, processes: int
) -> Iterator[Encoded]:
    """The tokens of each task in the order of ``tasks``, whatever the number of processes."""
    if processes == 1:
        yield from (encode(task, tokenizer, dtype, parse_specials=parse_specials) for task in tasks)
        return
    settings = (json.dumps(to_json(tokenizer)), dtype.name, parse_specials)
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=settings
    )
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


def _start_worker(tokenizer: str, dtype: str, parse_specials: bool) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = from_json(json.loads(tokenizer), Path("tokenizer")), np.dtype(dtype), parse_specials


def _end_with_parent() -> None:
    """A parent that was killed cannot end this process, which would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(task: Task) -> Encoded:
    tokenizer, dtype, parse_specials = _worker
    return encode(task, tokenizer, dtype, parse_specials=parse_specials)
