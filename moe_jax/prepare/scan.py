"""The first pass over a corpus: everything is read and counted, bad input refused, and the held-out text chosen.

Imports no jax.
"""

import dataclasses
import hashlib
import os
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.data.dataset import FORMAT_VERSION, MadeFrom, Split
from moe_jax.errors import UserError
from moe_jax.prepare.plays import PLAYS
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.shares import describe_files
from moe_jax.prepare.sources import CorpusSources, Documents, Piece, Source, changed
from moe_jax.prepare.tokenizer import spec_by_content
from moe_jax.runs.progress import Progress


class InputScan:
    """What one pass over the documents of an input finds out; 16 bytes a document."""

    def __init__(self, seed: int):
        # Seed 0 leaves the names alone, so that a split can be found again by hand.
        self._salt = f"\0{seed}" if seed else ""
        self._sizes, self._ranks = array("Q"), array("Q")
        self._digests, self._sha256s = defaultdict(hashlib.sha256), {}
        self.num_bytes = 0

    def add(self, piece: Piece) -> None:
        encoded = piece.text.encode()
        self.num_bytes += len(encoded)
        digest = self._digests[piece.source]
        digest.update(encoded)
        if piece.is_first:
            name = piece.name.removeprefix(PLAYS) + self._salt
            self._ranks.append(int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big"))
            self._sizes.append(0)
            digest.update(b"\xff")  # never in UTF-8: marks where a document begins
        self._sizes[-1] += len(piece.text)

    @property
    def num_documents(self) -> int:
        return len(self._sizes)

    @property
    def sizes(self) -> np.ndarray:
        """Characters of each document."""
        return np.array(self._sizes, np.uint64)

    @property
    def order(self) -> np.ndarray:
        """Documents in the order in which they are held out: that of the hashes of their names."""
        return np.argsort(np.array(self._ranks, np.uint64), kind="stable")

    def table(self) -> np.ndarray:
        """[documents, 2] what is kept of each, as uint64."""
        return np.column_stack([self.sizes, np.array(self._ranks, np.uint64)])

    def extend(self, table: np.ndarray, sha256s: dict[str, str]) -> None:
        """Adds the documents in the ``table`` of another scan, and the ``sha256`` of its sources."""
        self._sha256s |= sha256s
        self._sizes.frombytes(table[:, 0].tobytes())
        self._ranks.frombytes(table[:, 1].tobytes())

    def sha256(self, source: str) -> str:
        """Of all text of the source of that name."""
        return self._sha256s.get(source) or self._digests[source].hexdigest()


@dataclass(frozen=True)
class HeldOut:
    """What of an input is validated on."""

    is_val: np.ndarray
    """[documents] bool."""
    cut: tuple[int, int] | None = None
    """(document, characters): of this one document the end is held out, after so many characters."""

    def assign(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, Piece]]:
        """("train" or "val", piece) of each piece, where the cut makes two of one."""
        seen = 0
        for piece in pieces:
            if self.cut is None or piece.document != self.cut[0]:
                yield ("val" if self.is_val[piece.document] else "train"), piece
                continue
            kept = self.cut[1] - seen
            seen += len(piece.text)
            left = kept - len(piece.text)
            if left >= 0:
                yield "train", piece._replace(is_last=left == 0, after=piece.after[:left])
            elif kept <= 0:
                yield "val", piece._replace(is_first=kept == 0, before=piece.before[kept:] if kept else "")
            else:
                yield "train", piece._replace(text=piece.text[:kept], is_last=True, after="")
                yield "val", piece._replace(text=piece.text[kept:], is_first=True, before="")


def hold_out(
    scan: InputScan, val_fraction: float, val_documents: int | None, corpus: str, *, or_nothing: bool = False
) -> HeldOut:
    """What is held out of the documents in ``scan``: the same whatever the order of files.

    Whole documents, in the order of the hashes of their names: ``val_documents`` of them, or each that brings the
    share of characters nearer to ``val_fraction``, never all. Where that does not come within a factor of two of it,
    as with a single document, the longest one is cut instead and its end held out. UserError where it is too short
    to be cut, unless it may be ``or_nothing``.
    """
    sizes, order = scan.sizes, scan.order
    is_val = np.zeros(len(sizes), bool)
    if val_documents is not None:
        if val_documents >= len(sizes):
            raise UserError(
                f"--val-documents must leave something to train on, got {val_documents} of the {len(sizes)} "
                f"documents of {corpus}; lower it"
            )
        is_val[order[:val_documents]] = True
        return HeldOut(is_val)
    wanted, held = val_fraction * float(sizes.sum()), 0
    left = len(sizes) - 1
    for document in order:
        size = int(sizes[document])
        if left == 0 or held >= wanted:
            break
        if abs(held + size - wanted) < abs(held - wanted):
            held, left = held + size, left - 1
            is_val[document] = True
    if wanted / 2 <= held <= wanted * 2:
        return HeldOut(is_val)
    longest = int(order[np.argmax(sizes[order])])  # of documents of the same length the first in the order
    size = int(sizes[longest])
    if not 0 < round(wanted) < size:
        if or_nothing:
            return HeldOut(is_val)
        raise UserError(
            f"the fraction {val_fraction} to validate on leaves nothing to train on or to validate in the {size} "
            f"characters of the longest document of {corpus}; give more text or change the fraction"
        )
    return HeldOut(np.zeros(len(sizes), bool), (longest, size - round(wanted)))


@dataclass(frozen=True)
class CorpusPlan:
    """A corpus after the first pass."""

    sources: CorpusSources
    stamps: list[tuple[int, int]]
    """Of the sources' files when the pass began: other ones at the end mean that the text is another."""
    scan: InputScan
    val_scan: InputScan
    held_out: HeldOut
    parts: tuple[tuple[tuple[Source, ...], Split, Split], ...] = ()
    """Where parts are joined: the sources of each, its train with what is held out, and its val."""

    def pieces(self, config: PrepareConfig, bar: Progress) -> Iterator[tuple[str, Piece]]:
        """(split, piece) of everything, in the order of the input."""
        documents = Documents(self.sources.train, self.sources.options, config.max_documents)
        val_documents = Documents(self.sources.val, self.sources.options, config.val_documents)
        try:
            yield from self.held_out.assign(self._as_scanned(_shown(documents, bar)))
            yield from (("val", piece) for piece in _shown(val_documents, bar))
        except FileNotFoundError:
            raise changed(self.sources.name) from None

    def _as_scanned(self, documents: Iterable[Piece]) -> Iterator[Piece]:
        for piece in documents:
            if piece.document >= self.scan.num_documents:
                raise changed(self.sources.name)
            yield piece

    @property
    def num_documents(self) -> int:
        return self.scan.num_documents + self.val_scan.num_documents

    @property
    def num_characters(self) -> int:
        return int(self.scan.sizes.sum() + self.val_scan.sizes.sum())

    def origin(self) -> dict[str, object]:
        """What the corpus was made from, for ``MadeFrom``."""
        return {
            "text_key": self.sources.options.text_key,
            "documents": self.num_documents,
            "bytes": self.scan.num_bytes + self.val_scan.num_bytes,
            "sources": [
                {"name": source.name, "split": split, "text_sha256": scan.sha256(source.name)}
                for split, sources, scan in (
                    ("input", self.sources.train, self.scan),
                    ("val_input", self.sources.val, self.val_scan),
                )
                for source in sources
            ],
        }


def _shown(pieces: Iterable[Piece], bar: Progress) -> Iterator[Piece]:
    """``pieces``, counted on ``bar``."""
    done = bar.done
    for piece in pieces:
        yield piece
        done += len(piece.text)
        if done - bar.done >= 1 << 18:  # an update costs more than a short document
            bar.update(done, f"{done / 1e6:,.0f} M characters")


def scan_corpus(
    corpus: CorpusSources, config: PrepareConfig, bar: Progress, *, or_nothing: bool = False
) -> CorpusPlan:
    """The first pass over a corpus. UserError where something in it cannot be read or has no text."""
    stamps = corpus.stamps()
    train, val = InputScan(config.seed), InputScan(config.seed)
    bar.start(f"reading {corpus.name}", None)
    for scan, sources, limit in (
        (train, corpus.train, config.max_documents),
        (val, corpus.val, config.val_documents),
    ):
        documents = Documents(sources, corpus.options, limit)
        for piece in _shown(documents, bar):
            scan.add(piece)
        for source in documents.empty_sources:
            if source.is_chosen:
                raise UserError(f"{source.path} has no text in it; name a file with something to learn from")
        if config.part is None:
            check_has_text(corpus, sources, scan.num_documents)
        if documents.empty_sources:
            print(f"{len(documents.empty_sources)} files of {corpus.name} without text are left out", file=sys.stderr)
    if said := str(corpus.options.notes):
        print(f"note: {corpus.name}: {said}", file=sys.stderr)
    return CorpusPlan(corpus, stamps, train, val, held_out_of(corpus, train, config, or_nothing=or_nothing))


def held_out_of(corpus: CorpusSources, scan: InputScan, config: PrepareConfig, *, or_nothing: bool = False) -> HeldOut:
    """What ``config`` holds out of the documents in ``scan``: nothing of a part, as that depends on all parts."""
    if corpus.val or config.part is not None:
        return HeldOut(np.zeros(scan.num_documents, bool))
    return hold_out(scan, config.val_fraction, config.val_documents, corpus.name, or_nothing=or_nothing)


def check_has_text(corpus: CorpusSources, sources: tuple[Source, ...], num_documents: int) -> None:
    if sources and not num_documents:
        raise UserError(f"the inputs of {corpus.name} have no text in them; name files with something to learn from")


def made_from(config: PrepareConfig, corpora: list[CorpusSources], origins: dict[str, Any]) -> MadeFrom:
    """All that the files depend on; those of a part depend on all ``corpora``, which say what its share is."""
    settings = dataclasses.asdict(config) | {"tokenizer": spec_by_content(config.tokenizer)}
    for name in ("input", "val_input", "out", "processes", "weights", "text_key", "part", "join"):
        del settings[name]
    if config.part is not None:
        settings |= {"part": config.part, "input": describe_files(corpora)}
    return MadeFrom(FORMAT_VERSION, settings, origins)


def check_same(before: MadeFrom, now: MadeFrom, out: Path) -> None:
    if before == now:
        return
    changes = [
        f"{name} was {before.settings.get(name)}, now {value}"
        for name, value in now.settings.items()
        if before.settings.get(name) != value
    ] + [
        f"the input of {name} is another"
        for name in sorted({*before.corpora, *now.corpora})
        if before.corpora.get(name) != now.corpora.get(name)
    ]
    raise UserError(
        f"--out {out} was prepared from something else: {'; '.join(changes) or 'it is of another version'}; "
        "choose another --out, or remove that one"
    )


def tokenizer_texts(plans: list[CorpusPlan], config: PrepareConfig, bar: Progress) -> Iterator[str]:
    """The training text, or for bpe:VOCAB about ``tokenizer_sample`` characters of it, spread evenly."""
    total = sum(plan.num_characters for plan in plans)
    bar.start(f"building the tokenizer {config.tokenizer}", total)
    share = 1.0 if config.tokenizer == "char" else min(1.0, config.tokenizer_sample / total)
    wanted = taken = 0.0
    for plan in plans:
        for split, piece in plan.pieces(config, bar):
            if split == "train":
                wanted += share * len(piece.text)
                if share == 1.0 or wanted > taken:
                    taken += len(piece.text)
                    yield piece.text
