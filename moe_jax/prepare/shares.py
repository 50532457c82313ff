"""Which files are whose, where several jobs prepare a part each: the same for all of them. Imports no jax."""

import dataclasses
import hashlib
import itertools
import json
import os

from moe_jax.prepare.sources import HUB, CorpusSources


def describe_files(corpora: list[CorpusSources]) -> str:
    """Equal for two processes that find the same names, sizes and times of change of files, in the same order."""
    found = [
        (
            corpus.name,
            corpus.options.text_key,
            corpus.stamps(),
            *([s.name for s in of] for of in (corpus.train, corpus.val)),
        )
        for corpus in corpora
    ]
    stamps = [stamp for corpus in corpora for stamp in corpus.stamps()]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return f"{len(stamps):,} files of {sum(size for size, _ in stamps):,} bytes ({digest[:16]})"


def share_of_part(corpora: list[CorpusSources], part: str | None) -> list[CorpusSources]:
    """What of ``corpora`` the part "I/N" prepares, or None, the only one: whole sources, about an Nth of the bytes."""
    index, number = map(int, (part or "1/1").split("/"))
    sources = [source for corpus in corpora for source in (*corpus.train, *corpus.val)]
    # A data set of the hub has no size before it is read; one byte for each source spreads them too.
    sizes = [1 if source.path.startswith(HUB) else 1 + os.stat(source.path).st_size for source in sources]
    ends = zip(itertools.accumulate(sizes), sizes, strict=True)
    # A source belongs to the part that its middle lies in.
    is_mine = iter([(2 * end - size) * number // (2 * sum(sizes)) == index - 1 for end, size in ends])
    return [
        dataclasses.replace(
            corpus,
            train=tuple(source for source in corpus.train if next(is_mine)),
            val=tuple(source for source in corpus.val if next(is_mine)),
        )
        for corpus in corpora
    ]
