"""From the body of a request to what is to be done, by the rules of OpenAI's completions API. Imports no jax."""

import dataclasses
import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_jax.config import SampleConfig
from moe_jax.config.fields import unknown_name
from moe_jax.config.rules import check_sample
from moe_jax.errors import UserError

Prompt = str | tuple[int, ...]

MAX_STOPS = 4
"""As OpenAI has it."""
_LONGEST_STOP = 1000
"""Characters; a running text is searched for the beginning of each."""
_SAMPLED = {
    "max_tokens": "max_new_tokens",
    "n": "num_samples",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
"""Fields of a request that are settings of the sampler as they stand, and the names of those."""
_OWN_NAMES = {setting: field for field, setting in _SAMPLED.items()} | {"stop_tokens": "stop_token_ids"}
_DEFAULTS = SampleConfig(max_new_tokens=16, temperature=1.0, top_p=1.0)
"""Of OpenAI's API, not of the run: a program that leaves a field out expects those."""
_NEUTRAL: dict[str, Sequence[Any]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
}
"""Fields whose meaning this server does not have, with the values that ask for nothing."""
_FIELDS = (
    *("model", "prompt", "stop", "stop_token_ids", "seed", "stream", "stream_options", "logprobs", "echo", "user"),
    *("best_of", *_SAMPLED, *_NEUTRAL),
)


class RequestError(Exception):
    """A request that is answered with an error; ``headers`` go with the answer."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.headers = message, param, status, code, headers


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    model: str
    """The only model there is."""
    vocab_size: int
    max_prompt_tokens: int
    max_output_tokens: int
    max_texts: int
    """Prompts times n."""


@dataclass(frozen=True)
class CompletionRequest:
    prompts: tuple[Prompt, ...]
    sample: SampleConfig
    logprobs: int | None
    """How many of the most likely tokens are shown beside each one's own log-probability; None: neither."""
    echo: bool
    stream: bool
    include_usage: bool


def parse_completion(body: bytes, limits: Limits) -> CompletionRequest:
    """The request of the JSON ``body``. Raises RequestError, whose param names the field at fault."""
    try:
        return _parse(_read_json(body), limits)
    except RecursionError:
        raise RequestError("the body must be JSON, got too many brackets within each other; take some away") from None


def _parse(values: Any, limits: Limits) -> CompletionRequest:
    if not isinstance(values, dict):
        raise RequestError(f"the body must be a JSON object, got {_shown(values)}; send one")
    for name in values:
        if name not in _FIELDS:
            message = unknown_name("", _cut(name), list(_FIELDS)).replace("setting", "field", 1)
            raise RequestError(message, _cut(name), code="unknown_parameter")
    values = {name: value for name, value in values.items() if value is not None}
    check_model(values.get("model"), limits)
    for name, neutral in _NEUTRAL.items():
        value = values.get(name, neutral[0])
        if type(value) is bool or value not in neutral:
            raise RequestError(f"{name} is not supported; leave it out, or give {json.dumps(neutral[0])}", name)
    prompts = _prompts(values.get("prompt", ""))
    sample = _sample(values, limits)
    if values.get("best_of", sample.num_samples) != sample.num_samples or type(values.get("best_of", 1)) is not int:
        raise RequestError(f"best_of must be n={sample.num_samples}: nothing is ranked; leave it out", "best_of")
    if len(prompts) * sample.num_samples > limits.max_texts:
        raise RequestError(
            f"a request may ask for {limits.max_texts} texts, got {len(prompts)} prompts times "
            f"n={sample.num_samples}; send several requests",
            "n" if sample.num_samples > 1 else "prompt",
        )
    stream, options = _flag(values, "stream"), values.get("stream_options", {})
    if "stream_options" in values and not stream:
        raise RequestError("stream_options needs stream=true; leave it out", "stream_options")
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise RequestError(
            f"stream_options may have include_usage, got {_shown(options)}; give no other", "stream_options"
        )
    echo, logprobs = _flag(values, "echo"), values.get("logprobs")
    if logprobs is not None:
        if type(logprobs) is not int or not 0 <= logprobs <= 5:
            rule = "logprobs must be a whole number in [0, 5]"
            raise RequestError(f"{rule}, got {_shown(logprobs)}; change it", "logprobs")
        if echo:
            raise RequestError("logprobs of an echoed prompt are not supported; leave one of them out", "logprobs")
    if not isinstance(values.get("user", ""), str):
        raise RequestError(f"user must be a string, got {_shown(values['user'])}; leave it out", "user")
    include_usage = _flag({name: value for name, value in options.items() if value is not None}, "include_usage")
    return CompletionRequest(prompts, sample, logprobs, echo, stream, include_usage)


def check_model(name: Any, limits: Limits) -> None:
    """RequestError unless ``name`` is the model that is served."""
    if name is None:
        raise RequestError(f"model is required; give {limits.model!r}", "model")
    if not isinstance(name, str):
        raise RequestError(f"model must be a string, got {_shown(name)}; give {limits.model!r}", "model")
    if name != limits.model:
        message = f"the model {_shown(name)} does not exist; this server has {limits.model!r}"
        raise RequestError(message, "model", status=404, code="model_not_found")


def _read_json(body: bytes) -> Any:
    """The values of ``body``, without numbers that are not finite or of more than 64 bits, and with text only."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_finite, parse_float=_finite, parse_int=_small)
        json.dumps(values, ensure_ascii=False).encode("utf-8")  # \ud800 is JSON, but no text
    except UnicodeEncodeError:
        raise RequestError("the body has half of a surrogate pair, which is no text; leave it out") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"the body must be UTF-8 text, got another byte at {error.start}; encode it so") from None
    except ValueError as error:
        raise RequestError(f"the body must be JSON ({_cut(str(error))}); mend it") from None
    return values


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{_cut(text)} is not a finite number")
    return float(text)


def _small(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{_cut(text)} has more than 64 bits")
    return int(text)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """OpenAI's four forms: a string, strings, token ids, lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if _is_ids(value):
            return (tuple(value),)
        if all(_is_ids(item) for item in value):
            return tuple(tuple(item) for item in value)
    raise RequestError(
        f"prompt must be a string, a list of strings, token ids or a list of lists of them, got {_shown(value)}; "
        "give one of these",
        "prompt",
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _sample(values: dict[str, Any], limits: Limits) -> SampleConfig:
    """The sampler's settings that ``values`` ask for."""
    given: dict[str, Any] = {setting: values[field] for field, setting in _SAMPLED.items() if field in values}
    if type(given.get("top_k")) is int and given["top_k"] in (-1, 0):  # how other servers say: all
        given["top_k"] = None
    stop = values.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(item, str) for item in stop):
        rule = f"stop must be a string or up to {MAX_STOPS}"
        raise RequestError(f"{rule}, got {_shown(values['stop'])}; give no others", "stop")
    longest = max(map(len, stop), default=0)
    if longest > _LONGEST_STOP:
        raise RequestError(f"each of stop may have {_LONGEST_STOP} characters, got {longest}; shorten it", "stop")
    tokens = values.get("stop_token_ids", [])
    if not (tokens == [] or _is_ids(tokens)) or not all(0 <= item < limits.vocab_size for item in tokens):
        rule = f"stop_token_ids must be a list of token ids in [0, {limits.vocab_size - 1}]"
        raise RequestError(f"{rule}, got {_shown(tokens)}; take those of the model's tokenizer", "stop_token_ids")
    seed = values.get("seed", secrets.randbits(32))
    if type(seed) is not int:
        raise RequestError(f"seed must be a whole number, got {_shown(seed)}; give one, or none", "seed")
    # Programs send up to 64 bits, the sampler takes 32.
    given |= {"stop": tuple(stop), "stop_tokens": tuple(sorted(set(tokens))), "seed": seed % 2**32}
    # This server's own limits, narrower than those of the settings.
    _check_range("temperature", values, 0, 2)
    _check_range("max_tokens", values, 1, limits.max_output_tokens)
    _check_range("n", values, 1, limits.max_texts)
    named: list[str] = []

    def name_of(setting: str) -> str:
        named.append(_OWN_NAMES.get(setting, setting))
        return named[-1]

    try:
        return check_sample(dataclasses.replace(_DEFAULTS, **given), name_of)
    except UserError as error:
        message = _cut(str(error), 300)
        raise RequestError(
            message if ";" in message else f"{message}; change it", named[-1] if named else None
        ) from None


def _check_range(name: str, values: dict[str, Any], low: int, high: int) -> None:
    """RequestError where ``name`` is a number out of range; what is none is told with the other settings."""
    value = values.get(name, low)
    if type(value) in (int, float) and not low <= value <= high:
        remedy = "lower it" if value > high else "raise it"
        raise RequestError(f"{name} must be in [{low}, {high}], got {value}; {remedy}", name)


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.get(name, False)
    if type(value) is not bool:
        raise RequestError(f"{name} must be true or false, got {_shown(value)}; give one of them", name)
    return value


def _shown(value: Any) -> str:
    return _cut(json.dumps(value, ensure_ascii=False))


def _cut(text: str, size: int = 80) -> str:
    """``text``, which comes from a client, at a length that can be shown."""
    return text if len(text) <= size else text[: size - 3] + "..."
