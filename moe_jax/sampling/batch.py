"""Continuous batching: each text has a row of the batch from its prompt to its end, and others come and go."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import SampleConfig
from moe_jax.model.decoder import Variables
from moe_jax.sampling.decode import MAX_STEPS, DecodeState, Drawn, Programs, Rows
from moe_jax.sampling.score import SCORED
from moe_jax.sampling.text import Text, tops

STREAM_STEPS = 8
"""Tokens drawn at a time for a reader: few enough to read along, many enough to hide the cost of a call."""
_PREFILL = 8
"""Prompts read at a time, at most: attention among them takes memory."""
_SHORTEST = 16
"""Prompts are padded to a power of two, this or more, so that those of many lengths share few compiled programs."""
_NOBODY = SampleConfig(temperature=0.0, top_p=1.0)
"""How a row without a text is drawn: no processor runs for its sake."""


class Batch:
    """The rows of texts under way. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        programs: Programs,
        variables: Variables,
        sizes: Sequence[int],
        *,
        num_top: int = 0,
        keep_experts: bool = False,
    ):
        """``variables`` are unstacked, as ``programs`` takes them.

        ``sizes`` are rising numbers of rows for which programs are compiled; the batch has the least that holds its
        texts. ``num_top`` most likely tokens are reported beside each drawn one, and with ``keep_experts`` each one's
        experts.
        """
        self._programs, self._variables, self._sizes = programs, variables, tuple(sizes)
        self._reported = {"num_top": num_top, "keep_experts": keep_experts}
        self._texts: list[Text | None] = [None] * self._sizes[0]
        self.state: DecodeState = programs.empty_state(self._sizes[0], variables)
        self._rows: Rows | None = None

    @property
    def texts(self) -> list[Text]:
        """Those that have not ended, in the order of their rows."""
        return [text for text in self._texts if text is not None]

    @property
    def num_free(self) -> int:
        """Texts that can still be admitted."""
        return self._sizes[-1] - len(self.texts)

    def admit(self, texts: Sequence[Text]) -> None:
        """Reads the prompts of ``texts``, at most ``num_free``, and gives each a row."""
        self._resize(len(self.texts) + len(texts))
        free = [row for row, text in enumerate(self._texts) if text is None]
        chosen = list(zip(free, texts, strict=False))
        for start in range(0, len(chosen), _PREFILL):
            part = chosen[start : start + _PREFILL]
            self._read([(row, text.prompt_ids, text.num_prefix) for row, text in part])
        for row, text in chosen:
            self._texts[row] = text
            if text.scores_prompt:
                self._score(text)
        self._rows = None

    def advance(self, steps: int = MAX_STEPS) -> None:
        """Draws up to ``steps`` tokens more for each text; those that end with them leave the batch."""
        if not self.texts:
            return
        steps = min(steps, MAX_STEPS, *self._room())
        drawn = self._draw(steps)
        for row, text in enumerate(self._texts):
            if text is not None:
                text.add(drawn, row, steps)
                if text.finish_reason:
                    self._leave(row)
        self._begin_windows()
        self._resize(len(self.texts))

    def remove(self, text: Text) -> None:
        """Takes a text that nobody waits for out of the batch."""
        self._leave(next(row for row, other in enumerate(self._texts) if other is text))

    def warm_up(self) -> None:
        """Compiles what texts of any length and number need, one prompt read at a time, before the first one comes."""
        for size in self._sizes:
            self._resize(size)
            self._draw(1)
            for length in {min(_SHORTEST << power, self._context) for power in range(self._context.bit_length())}:
                self._read([(size, [0] * length, 0)])
        self._score(None)
        self._resize(0)

    @property
    def _context(self) -> int:
        return self._programs.config.context_length

    def _draw(self, steps: int) -> Drawn:
        """Up to ``steps`` more tokens in every row that has a text, as arrays of the host."""
        if self._rows is None:
            self._rows = _rows(self._texts, self._programs.vocab_size)
        index_B = np.array([text.length if text else 0 for text in self._texts], np.int32)
        left_B = np.array([text.num_left if text else 0 for text in self._texts], np.int32)
        drawn, self.state = self._programs.decode(
            self._variables, self.state, self._rows, index_B, left_B, np.int32(steps), **self._reported
        )
        return jax.device_get(drawn)

    def _leave(self, row: int) -> None:
        self._texts[row] = None
        self._rows = None

    def _room(self) -> list[int]:
        """Of each text with learned positions, the tokens that can be drawn in its window: one more than positions."""
        if self._programs.config.positions != "learned":
            return []
        return [self._context + 1 - (text.length - text.window_start) for text in self.texts]

    def _begin_windows(self) -> None:
        """Where learned positions are used up, cuts the text to its last half-window, which is read again."""
        if self._programs.config.positions != "learned":
            return
        for row, text in enumerate(self._texts):
            if text is not None and text.length - text.window_start > self._context:
                window = (text.prompt_ids + text.tokens)[-max(1, self._context // 2) :]
                self._read([(row, window, None)])
                if text.experts:
                    # What had no position of its own is read within the new window, where nobody counts its rows.
                    text.experts[-1] = np.zeros_like(text.experts[-1])
                text.window_start = text.length - len(window)

    def _read(self, chosen: Sequence[tuple[int, list[int], int | None]]) -> None:
        """Prefills (row, tokens, how many of them precede the text; None: the text is in its row already)."""
        P = _power_of_two(len(chosen))
        longest = max(_SHORTEST, *(len(tokens) for _, tokens, _ in chosen))
        text_PL = np.zeros((P, min(self._context, _power_of_two(longest))), np.int32)
        length_P, row_P = np.ones(P, np.int32), np.full(P, len(self._texts), np.int32)
        num_prefix_P, is_new_P = np.zeros(P, np.int32), np.ones(P, bool)
        for index, (row, tokens, num_prefix) in enumerate(chosen):
            text_PL[index, : len(tokens)] = tokens
            length_P[index], row_P[index] = len(tokens), row
            num_prefix_P[index], is_new_P[index] = num_prefix or 0, num_prefix is not None
        self.state = self._programs.prefill(
            self._variables, self.state, text_PL, length_P, row_P, num_prefix_P, is_new_P
        )

    def _score(self, text: Text | None) -> None:
        """Gives ``text`` the log-probabilities of its prompt's tokens; None: compiles what that needs."""
        ids = text.prompt_ids if text else [0, 0]
        caches = self._programs.empty_caches(self._variables)
        for start in range(0, len(ids) - 1, SCORED):
            part = ids[start : start + SCORED + 1]
            ids_L = np.zeros(SCORED + 1, np.int32)
            ids_L[: len(part)] = part
            size = len(part) - 1
            scored, caches = self._programs.score(
                self._variables, caches, ids_L, np.int32(start), np.int32(size), num_top=self._reported["num_top"]
            )
            if text:
                # What is before the text, and its first token, which nothing of it stands before, has none.
                first = max(0, text.num_prefix - start)
                logprobs_L, top_tokens_LK, top_logprobs_LK = (each[first:size] for each in jax.device_get(scored))
                text.prompt_logprobs += logprobs_L.tolist()
                text.prompt_top_logprobs += tops(top_tokens_LK, top_logprobs_LK)

    def _resize(self, num_texts: int) -> None:
        """Gives the batch the least size that holds so many texts, a size after the other."""
        wanted = next(index for index, size in enumerate(self._sizes) if size >= num_texts)
        while (size := len(self._texts)) != self._sizes[wanted]:
            here = self._sizes.index(size)
            new_size = self._sizes[here + 1 if wanted > here else here - 1]
            order = sorted(range(size), key=lambda row: self._texts[row] is None)[:new_size]
            row_B = np.array(order + [0] * (new_size - len(order)), np.int32)
            self.state = self._programs.take_rows(self.state, row_B)
            self._texts = [self._texts[row] for row in order] + [None] * (new_size - len(order))
            self._rows = None


def _rows(texts: Sequence[Text | None], vocab_size: int) -> Rows:
    samples = [text.sample if text else _NOBODY for text in texts]
    # A prompt has up to 2**16 samples, so no two texts of a call have one number, and the first prompt's are its
    # samples'. What of it does not fit 32 bits goes into the seed.
    numbers = [(text.index << 16) + text.number if text else 0 for text in texts]
    seeds = [(sample.seed + (number >> 32)) % 2**32 for sample, number in zip(samples, numbers, strict=True)]
    return Rows(
        seed_B=jnp.asarray(seeds, jnp.uint32),
        sample_B=jnp.asarray([number % 2**32 for number in numbers], jnp.uint32),
        temperature_B=jnp.asarray([_temperature(sample) for sample in samples], jnp.float32),
        top_k_B=jnp.asarray([sample.top_k or vocab_size for sample in samples], jnp.int32),
        top_p_B=jnp.asarray([sample.top_p for sample in samples], jnp.float32),
        min_p_B=jnp.asarray([sample.min_p for sample in samples], jnp.float32),
        repetition_penalty_B=jnp.asarray([sample.repetition_penalty for sample in samples], jnp.float32),
    )


def _temperature(sample: SampleConfig) -> float:
    """0, the most likely token, also for what leaves no other one, or would divide the logits by next to nothing."""
    return 0.0 if sample.temperature < 0.001 or sample.top_p < 1e-6 else sample.temperature


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
