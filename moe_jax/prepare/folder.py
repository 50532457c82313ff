"""From text to token streams on disk, in constant memory: python -m moe_jax.prepare --help.

Two passes: the first reads everything, so that bad input is told before anything is written, and counts; the second
tokenizes in parallel and writes. Block after block is made durable, and the same command after an interruption goes on
behind the last one. Imports no jax.
"""

import contextlib
import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.data.dataset import (
    Corpus,
    PreparedData,
    is_prepared,
    meta_file,
    open_prepared,
    progress_file,
    write_meta,
)
from moe_jax.data.shards import Split, SplitCounts, SplitWriter, file_sha256
from moe_jax.data.tokenizer import Tokenizer, build_tokenizer, fingerprint, load_tokenizer, needs_texts, save_tokenizer
from moe_jax.errors import UserError
from moe_jax.files import atomic_write_text, locked_folder
from moe_jax.prepare.bars import Bars
from moe_jax.prepare.encode import encode_all, in_tasks
from moe_jax.prepare.plan import CorpusPlan, made_from, scan_corpus, tokenizer_texts
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.sources import changed, find_corpora

BLOCK_CHARACTERS = 1 << 26
"""Of the input, after which what was made of it is durable."""
_PARALLEL_CHARACTERS = 1 << 25
"""Less text than this is tokenized sooner than other processes start."""
SPLITS = ("train", "val")


def prepare_folder(config: PrepareConfig, *, is_cache: bool = False) -> PreparedData:
    """Makes or completes the prepared folder ``config.out``. UserError on bad input, before anything is written.

    Where another process is at it, or what is there is damaged, raises UserError; a cache waits, and is made anew.
    """
    out = Path(config.out)
    _check_out(out)
    corpora = find_corpora(config)
    tokenizer = None
    if not needs_texts(config.tokenizer):
        tokenizer = build_tokenizer(config.tokenizer, (), config.delimiters)
    with Bars() as bars:
        plans = [scan_corpus(corpus, config, bars) for corpus in corpora]
        origin = made_from(config, plans)
        with locked_folder(out, "--out", "preparing", wait=is_cache):
            for leftover in _leftovers(out):  # of a kill while a file was written
                (out / leftover).unlink()
            try:
                if meta_file(out).exists():
                    return _prepared_before(out, origin, plans)
                progress = _resume(out, origin)
            except UserError:
                if not is_cache:
                    raise
                progress = None
                meta_file(out).unlink(missing_ok=True)
            if progress is None:
                if tokenizer is None:
                    bars.start(f"building the tokenizer {config.tokenizer}", None)
                    texts = tokenizer_texts(plans, config)
                    tokenizer = build_tokenizer(config.tokenizer, texts, config.delimiters)
                progress = _Progress(out, origin, tokenizer, {})
                save_tokenizer(progress.tokenizer, out / "tokenizer")
                progress.save()
            corpora = tuple(_write_corpus(plan, config, progress, bars) for plan in plans)
            write_meta(out, progress.tokenizer, _with_weights(corpora, plans), origin)
            progress_file(out).unlink()
    return open_prepared(out)


@dataclass
class _Progress:
    """What an unfinished preparation knows of itself."""

    out: Path
    made_from: dict[str, Any]
    tokenizer: Tokenizer
    counts: dict[str, Any]
    """By corpus: the blocks and the counts of each split that are on disk."""

    def save(self) -> None:
        values = {
            "made_from": self.made_from,
            "tokenizer_sha256": fingerprint(self.tokenizer),
            "counts": self.counts,
        }
        atomic_write_text(progress_file(self.out), json.dumps(values))


def _resume(out: Path, origin: dict[str, Any]) -> _Progress | None:
    """What an interrupted preparation left; None where there was none. UserError where it was of something else."""
    file = progress_file(out)
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        progress = _Progress(out, values["made_from"], load_tokenizer(out / "tokenizer"), values["counts"])
        is_same_tokenizer = fingerprint(progress.tokenizer) == values["tokenizer_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is corrupt ({error}); remove the folder and prepare again") from None
    _check_same(progress.made_from, origin, out)
    if not is_same_tokenizer:
        raise UserError(f"the tokenizer in {out} was changed; remove the folder and prepare again")
    return progress


def _leftovers(out: Path) -> list[str]:
    return [name for name in os.listdir(out) if re.fullmatch(r"\.(meta|progress)\.json\.\d+", name)]


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, but {out} is a file; choose another")
    if out.exists() and not is_prepared(out) and set(os.listdir(out)) - {".lock", "tokenizer", *_leftovers(out)}:
        raise UserError(f"--out {out} holds other files; choose a new or an empty folder")


def _prepared_before(out: Path, origin: dict[str, Any], plans: list[CorpusPlan]) -> PreparedData:
    """What is in ``out`` already, perhaps under other weights. UserError where it was made from something else."""
    data = open_prepared(out)
    _check_same(data.made_from, origin, out)
    corpora = _with_weights(data.corpora, plans)
    if corpora != data.corpora:
        write_meta(out, data.tokenizer, corpora, origin)
    return open_prepared(out)


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    if before == now:
        return
    settings = [
        f"{name} was {before['settings'].get(name)}, now {value}"
        for name, value in now["settings"].items()
        if before["settings"].get(name) != value
    ]
    texts = sorted(
        name
        for name in {*before["corpora"], *now["corpora"]}
        if before["corpora"].get(name) != now["corpora"].get(name)
    )
    changes = settings + [f"the input of {name} is another" for name in texts] or ["it is of another version"]
    raise UserError(
        f"--out {out} was prepared from something else: {'; '.join(changes)}; choose another --out, or remove that one"
    )


def _write_corpus(plan: CorpusPlan, config: PrepareConfig, progress: _Progress, bars: Bars) -> Corpus:
    """The second pass over a corpus, from the first block that is not on disk."""
    name, tokenizer = plan.sources.name, progress.tokenizer
    folder = progress.out / name
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    saved = progress.counts.get(name, {"blocks": 0, "splits": {split: {} for split in SPLITS}})
    block = saved["blocks"]
    processes = config.processes or len(os.sched_getaffinity(0))
    if config.processes is None and plan.num_characters < _PARALLEL_CHARACTERS:
        processes = 1

    with contextlib.ExitStack() as stack:
        writers = {}
        for split in SPLITS:
            counts = SplitCounts(**saved["splits"][split])
            writers[split] = SplitWriter(folder, split, dtype, config.shard_tokens, counts)
            stack.callback(writers[split].close)

        def commit(blocks: int) -> None:
            for writer in writers.values():
                writer.commit()
            splits = {split: dataclasses.asdict(writer.counts) for split, writer in writers.items()}
            progress.counts[name] = {"blocks": blocks, "splits": splits}
            progress.save()

        bars.start(f"tokenizing {name}", plan.num_characters, block * BLOCK_CHARACTERS)
        tasks = in_tasks(plan.pieces(config), BLOCK_CHARACTERS, block)
        for encoded in encode_all(tasks, tokenizer, dtype, parse_specials=config.parse_specials, processes=processes):
            if encoded.block != block:
                block = encoded.block
                commit(block)
            writers[encoded.split].write(encoded)
            bars.advance(encoded.num_characters)
        commit(block + 1)
    train, val = (_unsealed(folder, split, dtype, config.shard_tokens, writers[split].counts) for split in SPLITS)
    _check_whole(plan, train, val)
    return Corpus(name, 1.0, _sealed(train), _sealed(val))


def _check_whole(plan: CorpusPlan, train: Split, val: Split) -> None:
    num_documents = plan.num_documents + (plan.held_out.cut is not None)
    if train.num_documents + val.num_documents != num_documents or plan.sources.stamps() != plan.stamps:
        raise changed(plan.sources.name)
    for split in (train, val):
        for file, size in split.files():
            if not file.exists() or file.stat().st_size != size:
                raise UserError(f"{file} was changed while it was made; remove the folder and prepare again")


def _unsealed(folder: Path, split: str, dtype: np.dtype, shard_tokens: int, counts: SplitCounts) -> Split:
    values: dict[str, Any] = dataclasses.asdict(counts)
    del values["open_tokens"]
    return Split(split, folder, dtype.name, shard_tokens, **values, sha256={})


def _sealed(split: Split) -> Split:
    """``split`` with the SHA-256 of its files."""
    return dataclasses.replace(split, sha256={file.name: file_sha256(file) for file, _ in split.files()})


def _with_weights(corpora: tuple[Corpus, ...], plans: list[CorpusPlan]) -> tuple[Corpus, ...]:
    """``corpora`` with the weights that were given, or by their numbers of tokens, as shares of one."""
    weights = [plan.sources.weight or corpus.train.num_tokens for corpus, plan in zip(corpora, plans, strict=True)]
    return tuple(
        dataclasses.replace(corpus, weight=weight / sum(weights))
        for corpus, weight in zip(corpora, weights, strict=True)
    )
