"""From a run directory to texts: ``moe_jax.load(workdir).generate(prompts)``, and the engine of an opened run."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from moe_jax.config import SampleConfig
from moe_jax.config.bounds import Utf8
from moe_jax.config.fields import check_type, unknown_name
from moe_jax.config.rules import check_sample
from moe_jax.errors import UserError
from moe_jax.model.decoder import Decoder, Tokens, Variables, initial_expert_bias
from moe_jax.model.machine import this_machine
from moe_jax.model.moe.backends import for_machine
from moe_jax.runs.opened import OpenedRun, open_run
from moe_jax.sampling.engine import Dtype, Engine
from moe_jax.sampling.text import Sample
from moe_jax.sharding.startup import start_jax


class Settings(TypedDict, total=False):
    """Those of ``sample.py``; None, or left out: as the run was configured."""

    num_samples: int | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    """The vocabulary's size or more keeps all tokens."""
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: Sequence[str] | None
    stop_tokens: Sequence[int] | None
    seed: int | None


class Model:
    """A trained model in memory, and how its run samples."""

    def __init__(self, engine: Engine, variables: Variables, defaults: SampleConfig):
        self._engine, self._variables, self._defaults = engine, variables, defaults

    def generate(self, prompts: Sequence[str], **settings: Unpack[Settings]) -> list[Sample]:
        """Continuations of each prompt, in order: ``num_samples`` of the first, then of the next; "" is from nothing.

        Prompts of any lengths are computed together. Raises UserError for a setting that does not exist or is out of
        bounds, and for prompts that are not a list of texts or too long. Warns of characters that the tokenizer does
        not know, and of many samples that only the run's settings ask for.
        """
        sample = _with_settings(self._defaults, settings)
        if settings.get("num_samples") is None and sample.num_samples > 16:
            many = f"{sample.num_samples:,} samples of a prompt, as the run's settings say; num_samples=1 makes one"
            warnings.warn(many, stacklevel=2)
        prompts = _plain(prompts)
        if not isinstance(prompts, list | tuple):
            raise UserError(f"prompts must be a list of texts, got {prompts!r}; write generate([text])")
        places = [f"prompts[{index}]" for index in range(len(prompts))]
        for place, prompt in zip(places, prompts, strict=True):
            check_type(place, Utf8, prompt)
        texts = self._engine.begin_all(prompts, sample, places)
        unknown = self._engine.unknown_in(texts)
        if unknown:
            warnings.warn(unknown, stacklevel=2)
        return self._engine.finish(self._variables, texts)


def _plain(value: Any) -> Any:
    """``value`` with numbers, texts and arrays of numpy as Python's own."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _with_settings(defaults: SampleConfig, settings: Settings) -> SampleConfig:
    kinds = {"stop": "texts", "stop_tokens": "token ids"}
    given: dict[str, Any] = {name: _plain(value) for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if name not in Settings.__annotations__:
            raise UserError(unknown_name("", name, list(Settings.__annotations__)))
        if name in kinds:
            if not isinstance(value, list | tuple):
                raise UserError(f"{name} must be a list of {kinds[name]}, got {value!r}; write {name}=[...]")
            given[name] = tuple(value)
    return check_sample(dataclasses.replace(defaults, **given), str)


def load_model(workdir: str | Path, checkpoint: Literal["best", "newest"], dtype: Dtype | None) -> Model:
    """The model of ``moe_jax.load``. Raises UserError, and EnvironmentFault where jax finds no device."""
    check_type("checkpoint", Literal["best", "newest"], checkpoint)
    check_type("dtype", Dtype | None, dtype)
    opened = open_run(Path(workdir), checkpoint)
    start_jax(compile_cache=False)
    return Model(*load_engine(opened, dtype), opened.config.sample)


def load_engine(opened: OpenedRun, dtype: Dtype | None = None) -> tuple[Engine, Variables]:
    """The engine of a run, finished or in training, and the opened checkpoint's variables, prepared for it.

    ``dtype`` of activations and matrices, None: as the run was trained. Raises UserError.
    """
    engine = Engine(opened.config, opened.tokenizer, this_machine(), dtype)
    return engine, engine.prepare(load_variables(opened))


def load_variables(opened: OpenedRun) -> Variables:
    """The opened checkpoint's variables, as the training decoder takes them, on one device. Raises UserError."""
    model = for_machine(opened.config.model, 1, train=False, machine=this_machine(), as_set=False)
    decoder = Decoder(model, opened.tokenizer.vocab_size)

    def initial() -> dict[str, Any]:
        boxed = decoder.init(jax.random.key(0), Tokens(jnp.zeros((1, 2), jnp.int32)))["params"]
        return Variables(nn.unbox(boxed), initial_expert_bias(decoder.config)).to_items()

    device = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), jax.eval_shape(initial)
    )
    return Variables.from_items(opened.restore(abstract))
