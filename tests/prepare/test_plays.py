"""The embedded plays, rendered as plain text."""

import re

from moe_jax.prepare.formats import ReadOptions
from moe_jax.prepare.plays import PLAYS, render_play
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.sources import find_corpora

MARKDOWN = """# The Little Play

## ACT I

### SCENE I. A street.

_Enter ADA and
BEN, running_

**ADA**  
Good morrow, Ben. _\\[Aside]_ He's late.  
Why \\--so slow?

**BEN &amp; ADA**  
__\\[Singing]_  
*Heigh* ho!

_Exeunt_
"""  # noqa: W291 - two spaces at the end of a line are Markdown's line break

PLAIN = """The Little Play

ACT I

SCENE I. A street.

[Enter ADA and
BEN, running]

ADA:
Good morrow, Ben. [Aside] He's late.
Why --so slow?

BEN & ADA:
[Singing]
Heigh ho!

[Exeunt]
"""


def test_a_play_is_rendered_as_plain_text():
    assert render_play(MARKDOWN) == PLAIN


def test_the_embedded_plays_are_plain_play_text():
    (corpus,) = find_corpora(PrepareConfig(input=(PLAYS,)))
    plays = ["".join(text for text, _ in source.parts(ReadOptions())) for source in corpus.train]
    assert len(plays) == 38
    text = "".join(plays)
    assert 4_900_000 < len(text) < 5_200_000
    assert not re.search(r"[*_\\#<>|`]|&[a-z]+;|  $", text, re.M)
    assert "\nHAMLET:\nTo be, or not to be: that is the question:\n" in text
    assert len(re.findall(r"^[A-Z][A-Za-z' &]+:$", text, re.M)) > 30_000
