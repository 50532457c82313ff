"""From text to a prepared folder, in constant memory.

Two passes: the first reads and counts everything, so that bad input is reported before anything is written; the second
tokenizes in parallel and writes. Every so many tasks what was made is on disk for good, and the same command after an
interruption goes on behind it. Imports no jax.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from moe_jax.data.dataset import (
    FORMAT_VERSION,
    Corpus,
    CorpusMeta,
    Dataset,
    MadeFrom,
    Meta,
    Natural,
    TokenizerMeta,
    data_fingerprint,
    is_dataset,
    meta_file,
    open_dataset,
    progress_file,
    read_list,
    remember_checked,
)
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizer_file import fingerprint, load_tokenizer, save_tokenizer
from moe_jax.errors import UserError
from moe_jax.files import atomic_write_text, locked_folder
from moe_jax.prepare.encode import Encoded, encode_all, in_tasks
from moe_jax.prepare.parts import encoded_of_parts, plans_of_parts
from moe_jax.prepare.scan import CorpusPlan, check_same, made_from, scan_corpus, tokenizer_texts
from moe_jax.prepare.settings import PrepareConfig, parts_folder
from moe_jax.prepare.shards import SplitCounts, SplitWriter
from moe_jax.prepare.shares import share_of_part
from moe_jax.prepare.sources import Piece, changed, find_corpora
from moe_jax.prepare.tokenizer import build_tokenizer, needs_texts
from moe_jax.runs.progress import Progress

COMMIT_TASKS = 128
"""Tasks, of half a million characters each, after which what was made of them is durable."""
_PARALLEL_CHARACTERS = 1 << 25
"""Less text than this is tokenized sooner than other processes start."""


@dataclass
class Done:
    """What of a corpus is on disk."""

    tasks: Natural = 0
    train: SplitCounts = dataclasses.field(default_factory=SplitCounts)
    val: SplitCounts = dataclasses.field(default_factory=SplitCounts)


@dataclass
class _Unfinished:
    """What an unfinished preparation knows of itself."""

    made_from: MadeFrom
    tokenizer_sha256: str
    done: dict[str, Done]
    """By corpus."""

    def save(self, out: Path) -> None:
        atomic_write_text(progress_file(out), json.dumps(msgspec.to_builtins(self)))


def prepare_folder(config: PrepareConfig, *, is_cache: bool = False, or_nothing: bool = False) -> Dataset:
    """Makes or completes the prepared folder ``config.out``. UserError on bad input, before anything is written.

    If another process works in it, or it is damaged, raises UserError; a cache waits, and is made again.
    ``or_nothing``: a text too short to hold something out, which can be scored but not trained on, is prepared too.
    """
    out, home = config.folder, Path(config.out)
    if config.part is not None and is_dataset(home):
        raise UserError(f"--out {home} is prepared already, or being joined: complete that, or choose another")
    is_of_parts = config.part is not None or config.join
    _check_out(home, {parts_folder(home).name} if is_of_parts else set())
    if config.part is not None:
        _check_out(out)
    corpora = find_corpora(config)
    if config.join and meta_file(out).exists():
        data = open_dataset(out)
        check_same(data.made_from, made_from(config, corpora, data.made_from.corpora), out)
        shutil.rmtree(parts_folder(out), ignore_errors=True)  # of a join that was killed while it did that
        return data
    tokenizer = None
    if not needs_texts(config.tokenizer):
        tokenizer = build_tokenizer(config.tokenizer, (), config.delimiters)
    with Progress(Console(stderr=True)) as bar:
        if config.join:
            plans = plans_of_parts(config, corpora)
        else:
            shares = share_of_part(corpora, config.part)
            plans = [scan_corpus(corpus, config, bar, or_nothing=or_nothing) for corpus in shares]
        origin = made_from(config, corpora, {plan.sources.name: plan.origin() for plan in plans})
        with locked_folder(out, "--out" if config.part is None else "--part", "preparing", wait=is_cache):
            for leftover in _leftovers(out):  # of a kill while a file was written
                (out / leftover).unlink()
            try:
                if meta_file(out).exists():
                    return _prepared_before(out, origin, plans)
                unfinished = _resume(out, origin)
            except UserError:
                if not is_cache:
                    raise
                unfinished = None
                meta_file(out).unlink(missing_ok=True)
            if unfinished is None:
                if tokenizer is None:
                    texts = tokenizer_texts(plans, config, bar)
                    tokenizer = build_tokenizer(config.tokenizer, texts, config.delimiters)
                unfinished = _Unfinished(origin, fingerprint(tokenizer), {})
                save_tokenizer(tokenizer, out / "tokenizer")
                unfinished.save(out)
            tokenizer = load_tokenizer(out / "tokenizer")
            written = [_write_corpus(plan, config, tokenizer, unfinished, bar) for plan in plans]
            write_meta(out, tokenizer, _with_weights(written, plans), origin)
            progress_file(out).unlink()
            if config.join:
                shutil.rmtree(parts_folder(out), ignore_errors=True)
    return open_dataset(out)


def _check_out(out: Path, more: Set[str] = frozenset()) -> None:
    """UserError where ``out`` is no folder, or holds what no preparation writes but for the names ``more``."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, but {out} is a file; choose another")
    known = {".lock", "tokenizer", *more}
    if out.exists() and not is_dataset(out) and set(os.listdir(out)) - {*known, *_leftovers(out)}:
        raise UserError(f"--out {out} holds other files; choose a new or an empty folder")


def _leftovers(out: Path) -> list[str]:
    return [name for name in os.listdir(out) if re.fullmatch(r"\.(meta|progress)\.json\.\d+", name)]


def _resume(out: Path, origin: MadeFrom) -> _Unfinished | None:
    """What an interrupted preparation left; None if there was none. UserError if it was one of something else."""
    if not progress_file(out).exists():
        return None
    unfinished = read_list(progress_file(out), _Unfinished, "remove the folder and prepare again")
    check_same(unfinished.made_from, origin, out)
    if fingerprint(load_tokenizer(out / "tokenizer")) != unfinished.tokenizer_sha256:
        raise UserError(f"the tokenizer in {out} was changed; remove the folder and prepare again")
    return unfinished


def _prepared_before(out: Path, origin: MadeFrom, plans: list[CorpusPlan]) -> Dataset:
    """What is in ``out`` already, perhaps under other weights. UserError where it was made from something else."""
    data = open_dataset(out)
    check_same(data.made_from, origin, out)
    corpora = _with_weights(data.corpora, plans)
    if corpora != list(data.corpora):
        write_meta(out, data.tokenizer, corpora, origin)
    return open_dataset(out)


def _write_corpus(
    plan: CorpusPlan, config: PrepareConfig, tokenizer: Tokenizer, unfinished: _Unfinished, bar: Progress
) -> Corpus:
    """The second pass over a corpus, from the first task whose tokens are not on disk."""
    out, name = config.folder, plan.sources.name
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    done = Done() if config.join else unfinished.done.setdefault(name, Done())
    processes = config.processes or _available_cores()
    if config.processes is None and plan.num_characters < _PARALLEL_CHARACTERS:
        processes = 1
    bar.start(f"tokenizing {name}", plan.num_characters)
    settings = {"parse_specials": config.parse_specials, "processes": processes}

    def encode_pieces(pieces: Iterable[tuple[str, Piece]], behind: int = 0) -> Iterator[Encoded]:
        tasks = itertools.islice(in_tasks(pieces), behind, None)
        return encode_all(tasks, tokenizer, out / "tokenizer", dtype, **settings)

    if config.join:
        whole = encoded_of_parts(plan, encode_pieces, bar)
    else:
        whole = encode_pieces(plan.pieces(config, bar), done.tasks)
    tables = (plan.scan.table(), plan.val_scan.table()) if config.part is not None else (None, None)
    with contextlib.ExitStack() as stack:
        writers = {}
        for split, counts, table in zip(("train", "val"), (done.train, done.val), tables, strict=True):
            writers[split] = SplitWriter(out / name, split, dtype, config.shard_tokens, counts, table)
            stack.callback(writers[split].close)

        def commit() -> None:
            for writer in writers.values():
                writer.commit()
            if not config.join:  # begins again: its tasks are not those of one process
                unfinished.save(out)

        for encoded in whole:
            writers[encoded.split].write(encoded)
            done.tasks += 1
            if done.tasks % COMMIT_TASKS == 0:
                commit()
        commit()
    num_documents = plan.num_documents + (plan.held_out.cut is not None)
    if done.train.num_documents + done.val.num_documents != num_documents or plan.sources.stamps() != plan.stamps:
        raise changed(name)
    return Corpus(name, 1.0, writers["train"].sealed(), writers["val"].sealed())


def _available_cores() -> int:
    """Those that this process may run on, where the machine tells, as Linux does; else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_weights(corpora: Iterable[Corpus], plans: list[CorpusPlan]) -> list[Corpus]:
    """``corpora`` with the weights that were given, or by their numbers of tokens, as shares of one."""
    both = list(zip(corpora, plans, strict=True))
    # A part may have no token of a corpus; its weights count for nothing.
    weights = [plan.sources.weight or corpus.train.num_tokens or 1 for corpus, plan in both]
    return [
        dataclasses.replace(corpus, weight=weight / sum(weights))
        for (corpus, _), weight in zip(both, weights, strict=True)
    ]


def write_meta(folder: Path, tokenizer: Tokenizer, corpora: list[Corpus], origin: MadeFrom) -> None:
    """Makes ``folder`` a prepared one: all its other files are whole."""
    meta = Meta(
        FORMAT_VERSION,
        data_fingerprint(tokenizer, corpora),
        TokenizerMeta(tokenizer.name, tokenizer.vocab_size, fingerprint(tokenizer)),
        [CorpusMeta(corpus.name, corpus.weight, corpus.train.meta(), corpus.val.meta()) for corpus in corpora],
        origin,
    )
    atomic_write_text(meta_file(folder), json.dumps(msgspec.to_builtins(meta), indent=2) + "\n")
    remember_checked(meta.fingerprint, corpora)
