"""One text in the making, as the host knows it: its tokens, its text, and when it ends."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config import SampleConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.sampling.text_stream import StopStream, TextStream


class DrawnRow(NamedTuple):
    """What was drawn for one text in one turn, token by token, as in ``decode.Drawn``."""

    tokens_S: np.ndarray
    logprobs_S: np.ndarray
    top_tokens_SK: np.ndarray
    top_logprobs_SK: np.ndarray
    chosen_SNE: np.ndarray | None


class Text:
    """A prompt and what has been drawn after it. It ends at the end of a document, at a stop, or at its length."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], sample: SampleConfig, number: int, end_token: int
    ):
        """``number`` says which sample of its prompt it is."""
        self.prompt_ids = list(prompt_ids)
        self.sample = sample
        self.number = number
        self.tokens: list[int] = []
        """Drawn so far, without the one that ended the text."""
        self.logprobs: list[float] = []
        """Of each token, the natural logarithm of its probability under the model itself."""
        self.top_logprobs: list[list[tuple[int, float]]] = []
        """The most likely tokens in each one's place and their log-probabilities, as many as the batch tells."""
        self.experts: list[np.ndarray] = []
        """[MoE layers, E] bool for each token, where the batch tells."""
        self.finish_reason: str | None = None
        """None while the text goes on; "stop": the end of a document, or a stop; "length": max_new_tokens."""
        self.num_read = 0
        """Tokens that the model had read, prompt included, when it drew the last one."""
        self._ends = {end_token, *sample.stop_tokens}
        self._text, self._shown = TextStream(tokenizer), StopStream(sample.stop)
        self._pieces: list[str] = []

    @property
    def num_left(self) -> int:
        """Tokens still to draw, at most."""
        return 0 if self.finish_reason else self.sample.max_new_tokens - len(self.tokens)

    def add(self, row: DrawnRow) -> None:
        """Takes what was drawn, up to where the text ends."""
        tokens = row.tokens_S[: self.num_left].tolist()
        size = next((index for index, token in enumerate(tokens) if token in self._ends), len(tokens))
        has_ended = size < len(tokens)
        self.num_read = len(self.prompt_ids) + len(self.tokens) + size - (not has_ended)
        # A stop may end the text at any token; without one, all of them make one piece.
        parts = [[token] for token in tokens[:size]] if self.sample.stop else [tokens[:size]]
        kept = 0
        for part in parts:
            self._pieces.append(self._shown.add(self._text.add(part)))
            kept += len(part)
            if self._shown.is_stopped:
                has_ended = True
                break
        self._keep(row, kept)
        if has_ended or not self.num_left:
            self._pieces.append(self._shown.add(self._text.finish()))
            has_ended = has_ended or self._shown.is_stopped
            self._pieces.append(self._shown.finish())
            self.finish_reason = "stop" if has_ended else "length"

    def _keep(self, row: DrawnRow, size: int) -> None:
        self.tokens += row.tokens_S[:size].tolist()
        self.logprobs += row.logprobs_S[:size].tolist()
        tops = zip(row.top_tokens_SK[:size].tolist(), row.top_logprobs_SK[:size].tolist(), strict=True)
        self.top_logprobs += [list(zip(*top, strict=True)) for top in tops]
        if row.chosen_SNE is not None:
            self.experts += list(row.chosen_SNE[:size])

    def take(self) -> str:
        """The text that has become certain since it was last asked for: whole characters, before any stop."""
        taken, self._pieces = "".join(self._pieces), []
        return taken
