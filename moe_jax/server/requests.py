"""From the JSON body of a request to what is to be generated, by OpenAI's completions API. Imports no jax."""

import dataclasses
import json
import re
import secrets
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from moe_jax.config import SampleConfig
from moe_jax.config.bounds import Range
from moe_jax.config.fields import unknown_name
from moe_jax.config.rules import check_sample
from moe_jax.errors import UserError
from moe_jax.files import decode_json

Prompt = str | list[int]
"""Text, or token ids."""

_ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class RequestError(Exception):
    """A request that is answered with an error: ``content`` is OpenAI's error object."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = _ERROR_TYPES.get(status, "invalid_request_error")
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    model: str
    """The name of the one model."""
    vocab_size: int
    max_prompt_tokens: int
    max_output_tokens: int
    max_texts: int
    """Prompts times n."""
    max_body_bytes: int = 2**20


@dataclass(frozen=True)
class CompletionRequest:
    prompts: tuple[Prompt, ...]
    sample: SampleConfig
    logprobs: int | None
    """How many of the most likely tokens are shown beside each token's own log-probability; None: neither."""
    echo: bool
    stream: bool
    include_usage: bool


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


_Text = Annotated[str, Meta(description="a string")]
_Whole = Annotated[int, Meta(description="a whole number")]
_Number = Annotated[float, Meta(description="a number")]
_Flag = Annotated[bool, Meta(description="true or false")]
_Nothing = Annotated[float, Meta(ge=0, le=0, description="0 (it is not supported)")]
_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_UpTo5 = Annotated[int, Meta(ge=0, le=5)]
_Ids = Annotated[list[int], Meta(min_length=1)]
_Stop = Annotated[str, Meta(min_length=1, max_length=1000)]


class _Body(msgspec.Struct):
    """The fields of a completion, with OpenAI's defaults, not the run's; a description completes "must be ..."."""

    model: Annotated[str | None, Meta(description="a string")] = None
    prompt: Annotated[
        str | Annotated[list[str | int | _Ids], Meta(min_length=1)],
        Meta(description="a string, a list of strings, token ids or a list of lists of token ids"),
    ] = ""
    max_tokens: _Whole = 16
    n: _Whole = 1
    best_of: Annotated[int | None, Meta(description="a whole number")] = None
    temperature: Annotated[float, Meta(ge=0, le=2, description="a number in [0, 2]")] = 1.0
    top_p: _Number = 1.0
    top_k: _Whole = 0
    min_p: _Number = 0.0
    repetition_penalty: _Number = 1.0
    stop: Annotated[
        _Stop | Annotated[list[_Stop], Meta(max_length=64)],
        Meta(description="a string of 1 to 1000 characters, or a list of up to 64 of them"),
    ] = []
    stop_token_ids: Annotated[list[int], Meta(description="a list of token ids")] = []
    seed: Annotated[_Int64 | None, Meta(description="a whole number of 64 bits")] = None
    logprobs: Annotated[_UpTo5 | None, Meta(description="a whole number in [0, 5]")] = None
    echo: _Flag = False
    stream: _Flag = False
    stream_options: Annotated[
        _StreamOptions | None, Meta(description="an object with include_usage and include_obfuscation only")
    ] = None
    user: _Text = ""
    presence_penalty: _Nothing = 0
    frequency_penalty: _Nothing = 0
    logit_bias: Annotated[dict, Meta(max_length=0, description="{} (it is not supported)")] = {}
    suffix: Annotated[Literal[""], Meta(description='"" (it is not supported)')] = ""


_SETTINGS = {
    "max_tokens": "max_new_tokens",
    "n": "num_samples",
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
}
"""Fields of a request that are settings of the sampler, and the names of those."""
_FIELDS = {setting: field for field, setting in _SETTINGS.items()}


def parse_completion(body: bytes, limits: Limits) -> CompletionRequest:
    """The request of the JSON ``body``. Raises RequestError, whose param names the field at fault."""
    try:
        values = decode_json(body, dict[str, Any])
    except ValueError as error:
        raise RequestError(f"the body must be a JSON object in UTF-8 ({error}); correct it") from None
    # Only this parser shows a name that is there twice, of which programs keep one or the other.
    json.loads(body, object_pairs_hook=_unique, parse_int=len, parse_float=len)
    return _request(_fields(values, limits), limits)


def _unique(pairs: list[tuple[str, Any]]) -> None:
    name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 1)
    if count > 1:
        raise RequestError(f"{_cut(name)} is given {count} times; give it once", _cut(name))


def _fields(values: dict[str, Any], limits: Limits) -> _Body:
    known = _Body.__struct_fields__
    values = _without_nulls(values)
    for name in map(_cut, values):
        if name not in known:
            message = unknown_name("", name, list(known)).replace("setting", "field", 1)
            raise RequestError(message, name, code="unknown_parameter")
    if isinstance(options := values.get("stream_options"), dict):
        values["stream_options"] = _without_nulls(options)
    # Who names no max_tokens gets the default, or less where the server allows less.
    values.setdefault("max_tokens", min(16, limits.max_output_tokens))
    try:
        return msgspec.convert(values, _Body)
    except msgspec.ValidationError as error:
        name = re.findall(r" at `\$\.(\w+)[^`]*`\Z", str(error))[0]  # at its end: what comes before may quote a client
        raise _mistake(name, _rule(name), values[name]) from None


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """A null asks for nothing, whatever its name."""
    return {name: value for name, value in values.items() if value is not None}


def _rule(name: str) -> str:
    """What the field ``name`` must be."""
    return typing.get_type_hints(_Body, include_extras=True)[name].__metadata__[-1].description


def _request(body: _Body, limits: Limits) -> CompletionRequest:
    check_model(body.model, limits)
    prompts, sample = _prompts(body.prompt), _sample(body, limits)
    if body.best_of not in (None, body.n):
        raise RequestError(f"best_of must be n={body.n}: nothing is ranked; leave it out", "best_of")
    if len(prompts) * body.n > limits.max_texts:
        raise RequestError(
            f"a request may ask for {limits.max_texts} texts, got {len(prompts)} prompts times n={body.n}; "
            "send several requests",
            "n" if body.n > 1 else "prompt",
        )
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true; leave it out", "stream_options")
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return CompletionRequest(prompts, sample, body.logprobs, body.echo, body.stream, include_usage)


def check_model(name: str | None, limits: Limits) -> None:
    """RequestError unless ``name`` is the model that is served."""
    if name is None:
        raise RequestError(f"model is required; give {limits.model!r}", "model")
    if name != limits.model:
        message = f"the model {_shown(name)} does not exist; this server has {limits.model!r}"
        raise RequestError(message, "model", status=404, code="model_not_found")


def _prompts(value: str | list[Any]) -> tuple[Prompt, ...]:
    """OpenAI's four forms: a string, strings, token ids, lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if len({type(item) for item in value}) > 1:
        raise _mistake("prompt", _rule("prompt"), value)
    return (value,) if isinstance(value[0], int) else tuple(value)


def _sample(body: _Body, limits: Limits) -> SampleConfig:
    """The sampler's settings that ``body`` asks for."""
    settings = {setting: getattr(body, field) for field, setting in _SETTINGS.items()}
    if body.top_k in (-1, 0):  # how other servers say: all
        settings["top_k"] = None
    if not all(0 <= token < limits.vocab_size for token in body.stop_token_ids):
        raise _mistake("stop_token_ids", f"token ids in [0, {limits.vocab_size - 1}]", body.stop_token_ids)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    stop_tokens = tuple(sorted(set(body.stop_token_ids)))
    # Programs send up to 64 bits, the sampler takes 32.
    seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
    try:
        Range(0, limits.max_output_tokens)("max_tokens", body.max_tokens)
        Range(1, limits.max_texts)("n", body.n)
        sample = SampleConfig(**settings, stop=stop, stop_tokens=stop_tokens, seed=seed)
        # Who asks for no tokens wants the prompt scored; a text of none is no setting of a run.
        least = dataclasses.replace(sample, max_new_tokens=max(1, body.max_tokens))
        check_sample(least, lambda setting: _FIELDS.get(setting, setting))
        return sample
    except UserError as error:
        message = _cut(str(error), 300)
        raise RequestError(message if ";" in message else f"{message}; change it", message.split()[0]) from None


def _mistake(name: str, rule: str, value: Any) -> RequestError:
    return RequestError(f"{name} must be {rule}, got {_shown(value)}; change it", name)


def _shown(value: Any) -> str:
    return _cut(json.dumps(value, ensure_ascii=False))


def _cut(text: str, size: int = 80) -> str:
    """``text``, which comes from a client, at a length that can be shown."""
    return text if len(text) <= size else text[: size - 3] + "..."
