"""What sample.py does on a terminal."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Literal

from moe_jax.config import SampleConfig
from moe_jax.config.fields import unknown_name
from moe_jax.config.rules import check_sample
from moe_jax.errors import UserError, tell_error
from moe_jax.files import atomic_write_text
from moe_jax.model.decoder import Variables
from moe_jax.runs.layout import RunDirectory
from moe_jax.sampling.engine import Dtype, Generator, load_generator, sample_of
from moe_jax.sampling.text import Text
from moe_jax.sharding.startup import enable_compile_cache
from moe_jax.terminal.prompts import as_text, check_text


def sample_to_terminal(
    run: RunDirectory,
    which: Literal["best", "newest"],
    dtype: Dtype | None,
    prompts: Sequence[str],
    sample: SampleConfig,
    *,
    jsonl: bool,
) -> None:
    """Prints continuations of ``prompts`` and writes them to generated_text.txt.

    With ``jsonl`` a line is printed for each text: an object of prompt, text, tokens, logprobs, finish_reason and
    timing, the seconds in which the model was loaded and in which all texts were generated, compilation included.
    """
    started = time.perf_counter()
    generator, variables = _load(run, which, dtype)
    loaded = time.perf_counter()
    begun = [(prompt, number) for prompt in prompts for number in range(sample.num_samples)]
    texts = [generator.begin(prompt, sample, number) for prompt, number in begun]
    generator.finish(variables, texts)
    samples = [sample_of(prompt, text) for (prompt, _), text in zip(begun, texts, strict=True)]
    timing = {"load_seconds": loaded - started, "generate_seconds": time.perf_counter() - loaded}
    timing = {name: round(seconds, 3) for name, seconds in timing.items()}
    whole = "\n\n---\n\n".join(item.prompt + item.text for item in samples) + "\n"
    lines = (json.dumps(dataclasses.asdict(item) | {"timing": timing}) + "\n" for item in samples)
    sys.stdout.write("".join(lines) if jsonl else whole)
    sys.stdout.flush()
    _keep(run, whole)
    _note_context(generator, texts)


def converse(run: RunDirectory, which: Literal["best", "newest"], dtype: Dtype | None, sample: SampleConfig) -> None:
    """Continues one line of standard input after another, until its end or the line ``exit``.

    A text is printed as it is made, without its prompt, and ends its line; Ctrl-C ends it early. The last one is
    written to generated_text.txt. A prompt that cannot be used is told in one line on standard error. A line such as
    ``/temperature 0.7`` changes a setting, ``/temperature`` shows it, and ``/experts`` the experts of the last answer;
    of a prompt that begins with / write it twice.
    """
    generator, variables = _load(run, which, dtype)
    is_terminal = sys.stdin.isatty()
    if is_terminal and importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # input() has line editing and a history from then on
    last: Text | None = None
    is_told = False
    with _interruption() as interrupted:
        while True:
            try:
                prompt = _ask() if is_terminal else _next_line()
                if prompt is None or prompt.strip() == "exit":
                    return
                if prompt.strip() == "/experts":
                    print(_experts(generator, last))
                    continue
                if prompt.startswith("/") and not prompt.startswith("//"):
                    sample = _with_setting(prompt, sample)
                    continue
                prompt = prompt.removeprefix("/")
                last = generator.begin(prompt, sample)
                interrupted.clear()
                _answer(run, generator, variables, prompt, last, interrupted)
                is_told = is_told or _note_context(generator, [last])
            except UserError as error:
                tell_error(str(error))


def _experts(generator: Generator, text: Text | None) -> str:
    """A line for each token of an answer: the token, and its experts in each MoE layer. Raises UserError."""
    if text is None:
        raise UserError("/experts shows the experts of the last answer, and there is none yet; give a prompt first")
    if not generator.config.moe.num_experts:
        raise UserError("/experts shows which experts tokens used, and this model has none; sample from a sparse one")
    if not text.tokens:
        raise UserError("/experts shows the experts of the last answer, and that is empty; give another prompt")
    names = [json.dumps(generator.tokenizer.decode([token]), ensure_ascii=False) for token in text.tokens]
    width = max(map(len, names))
    lines = [" " * width + "  experts, a column for each MoE layer"]
    for name, chosen_NE in zip(names, text.experts, strict=True):
        layers = ["+".join(map(str, chosen_E.nonzero()[0])) or "-" for chosen_E in chosen_NE]
        lines.append(f"{name:<{width}}  " + "  ".join(layers))
    return "\n".join(lines)


def _with_setting(line: str, sample: SampleConfig) -> SampleConfig:
    """``sample`` as a line such as "/top-k 5" changes it; the setting is shown on standard error. Raises UserError."""
    name, _, text = line.removeprefix("/").strip().partition(" ")
    fixed = ("num_samples", "stop", "stop_tokens")
    known = [item.name for item in dataclasses.fields(sample) if item.name not in fixed]
    field = name.replace("-", "_")
    if field in fixed:
        raise UserError(f"/{name} cannot be changed in a conversation; leave it, and begin another with --{name}")
    if field not in known:
        raise UserError(unknown_name("/", name, ["experts", *(each.replace("_", "-") for each in known)]))
    if text.strip():
        changed: dict[str, Any] = {field: _value(text.strip())}
        sample = check_sample(dataclasses.replace(sample, **changed), lambda each: "/" + each.replace("_", "-"))
    print(f"/{name} is {getattr(sample, field)}", file=sys.stderr)
    return sample


def _value(text: str) -> int | float | str | None:
    """A number or None, or the text itself, which the check of types then refuses."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None if text.lower() == "none" else text


def _answer(
    run: RunDirectory, generator: Generator, variables: Variables, prompt: str, answer: Text, interrupted: list[int]
) -> None:
    """Prints a text piece by piece, until its end or an interruption, and writes it to generated_text.txt."""
    text = ""
    for piece in generator.stream(variables, answer, keep_experts=True):
        text += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
        if interrupted:
            break
    # On a terminal the next question stands apart.
    sys.stdout.write("\n\n" if sys.stdout.isatty() else "\n")
    sys.stdout.flush()
    _keep(run, prompt + text + "\n")


def _keep(run: RunDirectory, text: str) -> None:
    """Writes generated_text.txt; where that cannot be, the text has been printed all the same."""
    try:
        atomic_write_text(run.generated_text, text)
    except OSError as error:
        print(f"warning: {run.generated_text} cannot be written ({error.strerror or error})", file=sys.stderr)


@contextlib.contextmanager
def _interruption() -> Iterator[list[int]]:
    """Within it Ctrl-C is noted in the list that it gives, and interrupts nothing half done."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)


def _ask() -> str | None:
    """A line from the terminal; None at its end, or by Ctrl-C where nothing is typed. UserError unless it is text."""
    while True:
        try:
            with _interruptible():
                prompt = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if not _typed():
                # A key that is held down sends more of them, which are to end nothing half done.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                return None
            continue  # what was typed is dropped, as in a shell
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt must be UTF-8 text, got another byte at {error.start}") from error
        check_text(prompt, "the prompt")
        return prompt


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within it Ctrl-C raises KeyboardInterrupt, as it does where nothing else is said."""
    noting = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, noting)


def _typed() -> str:
    """What stands in the line that Ctrl-C left."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline is not None else ""


def _next_line() -> str | None:
    """A line from a pipe or a file; None at its end. UserError unless it is text."""
    with _interruptible():
        line = sys.stdin.buffer.readline()
    return as_text(line, "the prompt").rstrip("\r\n") if line else None


def _load(run: RunDirectory, which: Literal["best", "newest"], dtype: Dtype | None) -> tuple[Generator, Variables]:
    if run.load_config().train.compile_cache:
        enable_compile_cache()
    return load_generator(run, which, dtype)


def _note_context(generator: Generator, texts: Sequence[Text]) -> bool:
    """Says what happened past the context, and whether one of ``texts`` got there."""
    context = generator.config.context_length
    if all(text.num_read <= context for text in texts):
        return False
    what = {
        "rotary": "the oldest tokens left the cache one by one (rotary positions)",
        "learned": "the text was cut to its last half and read anew whenever it was full (learned positions)",
    }
    print(f"note: past the context of {context} tokens {what[generator.config.positions]}", file=sys.stderr)
    return True
