"""The first pass over the text: everything is read and counted, so that bad input is told before anything is written.

Imports no jax.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.data.dataset import FORMAT_VERSION
from moe_jax.data.tokenizer import spec_by_content
from moe_jax.errors import UserError
from moe_jax.prepare.bars import Bars
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.sources import CorpusSources, Documents, Piece, changed
from moe_jax.prepare.split import HeldOut, InputScan, hold_out


@dataclass(frozen=True)
class CorpusPlan:
    """A corpus after the first pass."""

    sources: CorpusSources
    stamps: list[tuple[int, int]]
    """Of the sources' files when the pass began: another one at the end says that the text is another."""
    scan: InputScan
    val_scan: InputScan
    held_out: HeldOut

    def pieces(self, config: PrepareConfig) -> Iterator[tuple[str, Piece]]:
        """(split, piece) of everything, in the order of the input."""
        documents = Documents(self.sources.train, self.sources.options, config.max_documents)
        try:
            yield from self.held_out.assign(self._as_scanned(documents))
            for piece in Documents(self.sources.val, self.sources.options, config.val_documents):
                yield "val", piece
        except FileNotFoundError:
            raise changed(self.sources.name) from None

    def _as_scanned(self, documents: Documents) -> Iterator[Piece]:
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

    @property
    def num_bytes(self) -> int:
        return self.scan.num_bytes + self.val_scan.num_bytes


def scan_corpus(corpus: CorpusSources, config: PrepareConfig, bars: "Bars") -> CorpusPlan:
    """The first pass over a corpus."""
    stamps = corpus.stamps()
    train, val = InputScan(config.seed), InputScan(config.seed)
    for scan, sources, limit in (
        (train, corpus.train, config.max_documents),
        (val, corpus.val, config.val_documents),
    ):
        documents = Documents(sources, corpus.options, limit)
        for piece in documents:
            scan.add(piece)
            bars.count(f"reading {corpus.name}", scan.num_documents, len(piece.text))
        for source in documents.empty_sources:
            if source.is_chosen:
                raise UserError(f"{source.path} has no text in it; name a file with something to learn from")
        if sources and not scan.num_documents:
            raise UserError(
                f"the inputs of {corpus.name} have no text in them; name files with something to learn from"
            )
        if documents.empty_sources:
            bars.say(f"{len(documents.empty_sources)} files of {corpus.name} without text are left out")
    if corpus.val:
        held_out = HeldOut(np.zeros(train.num_documents, bool))
    else:
        held_out = hold_out(train, config.val_fraction, config.val_documents, corpus.name)
    return CorpusPlan(corpus, stamps, train, val, held_out)


def made_from(config: PrepareConfig, plans: list[CorpusPlan]) -> dict[str, Any]:
    """All that the files depend on. Where it is the same, they are."""
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("input", "val_input", "out", "processes", "weights", "text_key")
    }
    settings["tokenizer"] = spec_by_content(config.tokenizer)
    corpora = {
        plan.sources.name: {
            "text_key": plan.sources.options.text_key,
            "documents": plan.num_documents,
            "bytes": plan.num_bytes,
            "text_sha256": {"input": plan.scan.sha256(), "val_input": plan.val_scan.sha256()},
            "sources": [
                {"name": source.name, "split": split, "sha256": source.sha256()}
                for split, sources in (("input", plan.sources.train), ("val_input", plan.sources.val))
                for source in sources
            ],
        }
        for plan in plans
    }
    return {"version": FORMAT_VERSION, "settings": settings, "corpora": corpora}


def tokenizer_texts(plans: list[CorpusPlan], config: PrepareConfig) -> Iterator[str]:
    """The training text, or for bpe:VOCAB about ``tokenizer_sample`` characters of it, spread evenly."""
    total = sum(plan.num_characters for plan in plans)
    share = 1.0 if config.tokenizer == "char" else min(1.0, config.tokenizer_sample / total)
    wanted = taken = 0.0
    for plan in plans:
        for split, piece in plan.pieces(config):
            if split == "train":
                wanted += share * len(piece.text)
                if share == 1.0 or wanted > taken:
                    taken += len(piece.text)
                    yield piece.text
