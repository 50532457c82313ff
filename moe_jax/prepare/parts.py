"""What jobs with --part prepared, as the plan of the folder that one process would make of it. Imports no jax.

A part is a prepared folder of whole files, with what is known of each document beside its tokens. What is held out
depends on all documents, so only the join divides them, and copies their tokens in constant memory.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from moe_jax.data.dataset import Dataset, Split, meta_file, open_dataset
from moe_jax.errors import UserError
from moe_jax.prepare.encode import Encoded
from moe_jax.prepare.scan import CorpusPlan, HeldOut, InputScan, check_has_text, check_same, held_out_of, made_from
from moe_jax.prepare.settings import PrepareConfig, parts_folder
from moe_jax.prepare.shards import documents_file
from moe_jax.prepare.sources import CorpusSources, Documents, Piece
from moe_jax.runs.progress import Progress

_TOKENS_AT_ONCE = 1 << 20


def encoded_of_parts(
    plan: CorpusPlan, encode: Callable[[Iterable[tuple[str, Piece]]], Iterator[Encoded]], bar: Progress
) -> Iterator[Encoded]:
    """The tokens of all parts of a corpus; of a document that is cut, what ``encode`` makes of its pieces."""
    first = 0
    for sources, train, val in plan.parts:
        is_val, start = plan.held_out.is_val[first : first + train.num_documents], 0
        cut, kept = plan.held_out.cut or (-1, 0)
        if first <= cut < first + len(is_val):
            cut, start = cut - first, cut - first + 1
            yield from _copied(train, is_val, slice(cut), bar)
            pieces = (piece for piece in Documents(sources, plan.sources.options, None) if piece.document == cut)
            yield from encode(HeldOut(is_val, (cut, kept)).assign(pieces))
        yield from _copied(train, is_val, slice(start, None), bar)
        yield from _copied(val, np.ones(val.num_documents, bool), slice(None), bar)
        first += len(is_val)


def _copied(split: Split, is_val: np.ndarray, chosen: slice, bar: Progress) -> Iterator[Encoded]:
    """The ``chosen`` documents of ``split``, for "val" where ``is_val`` [documents] says so, else for "train"."""
    table = _read_table(split)
    documents, bounds = table[:, :3].astype(np.int64), np.append(0, np.cumsum(table[:, 0].astype(np.int64)))
    low, high = (int(bounds[at]) for at in chosen.indices(len(table))[:2])
    stream, at_once = split.stream(), min(_TOKENS_AT_ONCE, split.shard_tokens)
    for start in range(low, high, at_once):
        stop = min(start + at_once, high)
        # The documents that begin or go on here, and those of them that end.
        first, ended, last = np.searchsorted(bounds, (start, stop, stop - 1), "right") - (1, 1, 0)
        tokens, ids = np.diff(np.clip(bounds[first : last + 1], start, stop)), stream.read(start, stop)
        for name, of_name in (("train", ~is_val), ("val", is_val)):
            rows = documents[first:ended][of_name[first:ended]]
            yield Encoded(name, ids[np.repeat(of_name[first:last], tokens)], np.vstack([rows, [(0, 0, 0)]]))
        bar.update(bar.done + int(table[first:ended, 3].sum()), f"{bar.done / 1e6:,.0f} M characters")


def _read_table(split: Split) -> np.ndarray:
    """[documents, 5] of ``documents_file``. UserError where it is not as it was written."""
    file = documents_file(split)
    table = np.fromfile(file, np.uint64) if file.exists() else np.zeros(0, np.uint64)
    if table.size == 5 * split.num_documents:
        table = table.reshape(-1, 5)
        if tuple(table[:, :3].sum(axis=0)) == (split.num_tokens, split.num_bytes, split.num_unknown):
            return table
    raise UserError(f"{file} was changed after it was made; remove the folder of that part and prepare it again")


def plans_of_parts(config: PrepareConfig, corpora: list[CorpusSources]) -> list[CorpusPlan]:
    """Of all corpora. UserError where a part is missing, unfinished, damaged, or made from other settings or text."""
    place = parts_folder(Path(config.out))
    names = [name for name in os.listdir(place) if re.fullmatch(r"\d+-of-\d+", name)] if place.exists() else []
    totals = sorted({int(name.partition("-of-")[2]) for name in names})
    if len(totals) != 1:
        raise UserError(
            f"--join needs the parts I/N of one N in {place}, got those of {' and '.join(map(str, totals)) or 'none'}"
            "; prepare them with --part, and remove those of another N"
        )
    configs = [dataclasses.replace(config, part=f"{number}/{totals[0]}") for number in range(1, totals[0] + 1)]
    if missing := [str(each.part) for each in configs if not meta_file(each.folder).exists()]:
        raise UserError(
            f"--join needs every part, but {', '.join(missing)} did not finish; run --part for each, with "
            "the same other flags, then join again"
        )
    parts = [open_dataset(each.folder) for each in configs]
    expected = made_from(configs[0], corpora, {})
    for each, part in zip(configs, parts, strict=True):
        settings = expected.settings | {"part": each.part}
        check_same(part.made_from, dataclasses.replace(part.made_from, settings=settings), each.folder)
    return [_plan_of_parts(at, config, corpora, parts) for at in range(len(corpora))]


def _plan_of_parts(at: int, config: PrepareConfig, corpora: list[CorpusSources], parts: list[Dataset]) -> CorpusPlan:
    corpus, scans, found = corpora[at], (InputScan(config.seed), InputScan(config.seed)), []
    for part in parts:
        splits, origin = (part.corpora[at].train, part.corpora[at].val), part.made_from.corpora[corpus.name]
        names = {source["name"] for source in origin["sources"] if source["split"] == "input"}
        found.append((tuple(source for source in corpus.train if source.name in names), *splits))
        for scan, split, kind in zip(scans, splits, ("input", "val_input"), strict=True):
            sha256s = {
                source["name"]: source["text_sha256"] for source in origin["sources"] if source["split"] == kind
            }
            scan.extend(_read_table(split)[:, 3:], sha256s)
        scans[0].num_bytes += origin["bytes"]
    for scan, sources in zip(scans, (corpus.train, corpus.val), strict=True):
        check_has_text(corpus, sources, scan.num_documents)
    return CorpusPlan(corpus, corpus.stamps(), *scans, held_out_of(corpus, scans[0], config), tuple(found))
