"""Sampling on a terminal: texts printed and kept in generated_text.txt, and the conversation."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.config import SampleConfig
from moe_jax.config.bounds import Utf8
from moe_jax.config.fields import check_type, unknown_name
from moe_jax.config.rules import check_sample
from moe_jax.errors import Interrupted, UserError, tell_error
from moe_jax.files import atomic_write_text
from moe_jax.model.decoder import Variables
from moe_jax.sampling.engine import Engine
from moe_jax.sampling.text import Text
from moe_jax.terminal.prompts import as_text
from moe_jax.training.signals import catch_signals


def print_samples(
    engine: Engine,
    variables: Variables,
    prompts: Mapping[str, str],
    sample: SampleConfig,
    file: Path,
    *,
    load_seconds: float | None = None,
) -> None:
    """Prints continuations of ``prompts``, by their places as of ``read_prompts``, and writes them to ``file``.

    A signal ends all texts where they are; what there is of them is printed and written, and Interrupted raised.
    With ``load_seconds``, those in which the model was loaded, prints a line of JSON for each text: prompt, text,
    tokens, logprobs, finish_reason and timing, those seconds and the ones in which all texts were generated,
    compilation included.
    """
    start = time.perf_counter()
    texts = engine.begin_all(list(prompts.values()), sample, list(prompts))
    _note_unknown(engine, texts)
    with catch_signals(b"stopping after these tokens; a second signal ends the program at once\n") as request:
        samples = engine.finish(variables, texts, lambda: request.exit_code is not None)
    if samples:
        whole = "\n\n---\n\n".join(each.prompt + each.text for each in samples) + "\n"
        _keep(file, whole)  # before it is printed: the terminal, or who reads, may be gone
        if load_seconds is None:
            sys.stdout.write(whole)
        else:
            seconds = {"load_seconds": load_seconds, "generate_seconds": time.perf_counter() - start}
            timing = {"timing": {name: round(value, 3) for name, value in seconds.items()}}
            sys.stdout.writelines(json.dumps(dataclasses.asdict(each) | timing) + "\n" for each in samples)
        sys.stdout.flush()
    _note_context(engine, texts)
    if request.exit_code is not None:
        num_whole = sum(each.finish_reason != "interrupted" for each in samples)
        cut = f"{len(samples) - num_whole} end where they were stopped, {len(texts) - len(samples)} were not begun"
        print(f"interrupted: {num_whole} of {len(texts)} texts are whole, {cut}", file=sys.stderr)
        raise Interrupted(request.exit_code)


def converse(engine: Engine, variables: Variables, sample: SampleConfig, file: Path) -> None:
    """Continues one line of standard input after another, until its end or the line ``exit``.

    A text is printed as it is made, without its prompt, and ends its line; Ctrl-C ends it early. The last one is
    written to ``file``. A prompt that cannot be used is reported in one line on standard error. A line such as
    ``/temperature 0.7`` changes a setting, ``/temperature`` shows it, and ``/experts`` the experts of the last answer;
    a prompt that begins with / is written with two.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal and importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # input() has line editing and a history from then on
    last: Text | None = None
    is_noted = False
    interruptions: list[int] = []
    with _on_ctrl_c(lambda number, _: interruptions.append(number)):  # nothing is interrupted half done
        while True:
            try:
                prompt = _ask() if is_terminal else _next_line()
                if prompt is None or prompt.strip() == "exit":
                    return
                if prompt.strip() == "/experts":
                    print(_experts(engine, last))
                elif prompt.startswith("/") and not prompt.startswith("//"):
                    sample = _with_setting(prompt, sample)
                else:
                    last = engine.begin(prompt.removeprefix("/"), sample)
                    _note_unknown(engine, [last])
                    interruptions.clear()
                    _answer(engine, variables, last, interruptions, file)
                    is_noted = is_noted or _note_context(engine, [last])
            except UserError as error:
                tell_error(str(error))


def _experts(engine: Engine, text: Text | None) -> str:
    """A line for each token of an answer: the token, and its experts in each MoE layer. Raises UserError."""
    if text is None:
        raise UserError("/experts shows the experts of the last answer, and there is none yet; give a prompt first")
    if not engine.config.moe.num_experts:
        raise UserError("/experts shows which experts tokens used, and this model has none; sample from a sparse one")
    if not text.tokens:
        raise UserError("/experts shows the experts of the last answer, and that is empty; give another prompt")
    before = [*(text.own_prompt_ids[-1:] or [None]), *text.tokens]
    spellings = [engine.tokenizer.spell(token, previous) for token, previous in zip(text.tokens, before, strict=False)]
    names = [json.dumps(spelling, ensure_ascii=False).replace("\\\\", "\\") for spelling in spellings]
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


def _answer(engine: Engine, variables: Variables, answer: Text, interruptions: Sequence[int], file: Path) -> None:
    """Prints a text piece by piece, until its end or an interruption, and writes it to ``file``."""
    text = ""
    try:
        for piece in engine.stream(variables, answer, keep_experts=True):
            text += piece
            print(piece, end="", flush=True)
            if interruptions:
                break
        # On a terminal the next question stands apart.
        print(end="\n\n" if sys.stdout.isatty() else "\n", flush=True)
    finally:  # where the terminal, or who reads, is gone too
        _keep(file, answer.prompt + text + "\n")


def _keep(file: Path, text: str) -> None:
    """Writes ``file``; where that fails, the text has been printed all the same."""
    try:
        atomic_write_text(file, text)
    except OSError as error:
        print(f"warning: {file} cannot be written ({error.strerror or error})", file=sys.stderr)


@contextlib.contextmanager
def _on_ctrl_c(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _ask() -> str | None:
    """A line from the terminal; None at its end, or by Ctrl-C where nothing is typed. UserError unless it is text."""
    while True:
        try:
            with _on_ctrl_c(signal.default_int_handler):
                prompt = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            readline = sys.modules.get("readline")
            if readline is None or not readline.get_line_buffer():
                # A key that is held down sends more of them, which are to end nothing half done.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                return None
            continue  # what was typed is dropped, as in a shell
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt must be UTF-8 text, got another byte at {error.start}") from error
        check_type("the prompt", Utf8, prompt)
        return prompt


def _next_line() -> str | None:
    """A line from a pipe or a file; None at its end. UserError unless it is text."""
    with _on_ctrl_c(signal.default_int_handler):
        line = sys.stdin.buffer.readline()
    return as_text(line, "the prompt").rstrip("\r\n") if line else None


def _note_unknown(engine: Engine, texts: Sequence[Text]) -> None:
    unknown = engine.unknown_in(texts)
    if unknown:
        print(f"note: {unknown}", file=sys.stderr)


def _note_context(engine: Engine, texts: Sequence[Text]) -> bool:
    """Reports what happened past the context, and returns whether one of ``texts`` got there."""
    context = engine.config.context_length
    if all(text.num_read <= context for text in texts):
        return False
    what = {
        "rotary": "the oldest tokens left the cache one by one (rotary positions)",
        "learned": "the text was cut to its last half and read anew whenever it was full (learned positions)",
    }
    print(f"note: past the context of {context} tokens {what[engine.config.positions]}", file=sys.stderr)
    return True
