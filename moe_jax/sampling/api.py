"""A trained model as Python code uses it: ``moe_jax.load(workdir).generate(prompts)``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moe_jax.config import SampleConfig
from moe_jax.config.rules import check_sample
from moe_jax.errors import UserError
from moe_jax.model.decoder import Variables
from moe_jax.runs.layout import RunDirectory
from moe_jax.sampling.engine import Dtype, Generator, Sample, load_generator
from moe_jax.terminal.prompts import check_text


class Model:
    """The generator of a run, its parameters and how the run samples."""

    def __init__(self, generator: Generator, variables: Variables, defaults: SampleConfig):
        self._generator, self._variables, self._defaults = generator, variables, defaults

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_samples: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[str] | None = None,
        stop_tokens: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> list[Sample]:
        """Continuations of each prompt, in order: ``num_samples`` of the first, then of the next; "" is from nothing.

        The settings are those of ``sample.py``, and None is as the run was configured; a ``top_k`` of the vocabulary's
        size or more keeps all tokens. Prompts of any lengths are computed together. Raises UserError for a setting out
        of range, and for prompts that are no list of texts or too long.
        """
        for name, listed, kind in (("stop", stop, "texts"), ("stop_tokens", stop_tokens, "token ids")):
            if listed is not None and not isinstance(listed, list | tuple):
                raise UserError(f"{name} must be a list of {kind}, got {listed!r}; write {name}=[...]")
        given: dict[str, Any] = {
            "num_samples": num_samples,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "stop": None if stop is None else tuple(stop),
            "stop_tokens": None if stop_tokens is None else tuple(stop_tokens),
            "seed": seed,
        }
        changed = {name: value for name, value in given.items() if value is not None}
        sample = check_sample(dataclasses.replace(self._defaults, **changed), lambda name: name)
        if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"prompts must be a list of texts, got {prompts!r}; write generate([text])")
        for index, prompt in enumerate(prompts):
            check_text(prompt, f"prompts[{index}]")
        return self._generator.generate_all(self._variables, prompts, sample)


def load_model(workdir: str | Path, checkpoint: Literal["best", "newest"], dtype: Dtype | None) -> Model:
    """The model of ``moe_jax.load``. Raises UserError."""
    if checkpoint not in ("best", "newest"):
        raise UserError(f"checkpoint must be best or newest, got {checkpoint!r}; choose one")
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype must be float32, bfloat16 or None, got {dtype!r}; choose one")
    run = RunDirectory(Path(workdir))
    return Model(*load_generator(run, checkpoint, dtype), run.load_config().sample)
