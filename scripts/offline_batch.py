#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run a file of prompts of any length through vLLM with sink eviction, resumably.

Each line of the input is a JSON object with one of "prompt" (text), "prompt_token_ids"
(list of integers) or "messages" (a chat); optionally "id" (text or integer, by default
the line's number) and sampling settings ("max_tokens", "temperature", "seed", "stop",
...) that override the command line's, which override the model's own. Other keys are
ignored, with a warning.

Each finished stream is appended to the output at once, as a line of its own; a line
that cannot be run becomes {"id", "line", "error"} and the others go on. A second run
with the same output skips what is finished, by id, and tries again what failed.

    python scripts/offline_batch.py --model models/pocket \\
        --input prompts.jsonl --output out.jsonl --max-tokens 64

Exit status: 0 all lines finished, 1 some failed, 2 unusable arguments, 130 interrupted
(what is finished is kept).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

LineId = str | int
PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
# Checked here because a wrong type or an integer beyond the engine's width gets past
# vLLM's own check and then takes the whole engine down instead of one line.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "max_tokens": (int, 1, INT32_MAX),
    "min_tokens": (int, 0, INT32_MAX),
    "top_k": (int, -1, INT32_MAX),
    "seed": (int, 0, INT64_MAX),
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "repetition_penalty": (float, 0, 1e6),
}
FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
SAMPLING_KEYS = (*NUMBERS, *FLAGS, "stop", "stop_token_ids")


class Job(NamedTuple):
    """One line to run."""

    line: int
    id: LineId
    kind: str
    """Which of ``PROMPT_KEYS`` the prompt is."""
    prompt: Any
    sampling: dict[str, Any]


class Failure(NamedTuple):
    """One line that cannot be run, and why."""

    line: int
    id: LineId
    message: str


class Done(NamedTuple):
    """One line that an earlier run finished."""

    line: int
    id: LineId


class Result(NamedTuple):
    """What a finished stream gave."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int


class RefusedError(Exception):
    """The engine does not take this request; it goes on with the others."""


class UnusableError(Exception):
    """The run as a whole cannot start: wrong arguments or a foreign output file."""


class Engine(Protocol):
    """What the run needs of vLLM."""

    def submit(self, job: Job) -> str:
        """Queue a job and return its request id; raises ``RefusedError``."""

    def step(self) -> list[Result]:
        """Advance all queued requests, return those that finished."""


def parse_job(line: int, job_id: LineId, record: dict[str, Any]) -> Job:
    """Check what a line asks for; raises ``ValueError`` saying what is wrong."""
    given = [key for key in PROMPT_KEYS if record.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of {', '.join(PROMPT_KEYS)} is needed, got "
            f"{', '.join(given) or 'none'}"
        )
    (kind,) = given
    check_prompt(kind, record[kind])
    sampling = {
        key: record[key] for key in SAMPLING_KEYS if record.get(key) is not None
    }
    check_sampling(sampling)
    return Job(line, job_id, kind, record[kind], sampling)


def load_object(raw: bytes) -> dict[str, Any]:
    """Decode a line that must hold one JSON object."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, got {type(record).__name__}")
    return record


def is_id(value: Any) -> bool:
    """Text or an integer; JSON's true and false are ints in Python, but no ids."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def is_int_list(value: Any) -> bool:
    """Whether this is a list of token ids as the engine can hold them."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= INT32_MAX for item in value
    )


def is_message_list(value: Any) -> bool:
    """Whether this looks like a chat; the template judges the contents."""
    return isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) for item in value
    )


def check_prompt(kind: str, prompt: Any) -> None:
    """Refuse a prompt of the wrong type; raises ``ValueError``."""
    if kind == "prompt":
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be text, got {type(prompt).__name__}")
    elif kind == "prompt_token_ids":
        if not prompt or not is_int_list(prompt):
            raise ValueError("prompt_token_ids must be a list of token ids, not empty")
    elif not prompt or not is_message_list(prompt):
        raise ValueError("messages must be a list of objects with a role, not empty")


def check_sampling(sampling: dict[str, Any]) -> None:
    """Refuse sampling settings of the wrong type or range; raises ``ValueError``."""
    for key, value in sampling.items():
        if key in NUMBERS:
            kind, low, high = NUMBERS[key]
            is_number = type(value) is int or (kind is float and type(value) is float)
            if not is_number or not low <= value <= high:
                noun = "an integer" if kind is int else "a number"
                raise ValueError(
                    f"{key} must be {noun} from {low} to {high}, got {value!r}"
                )
        elif key in FLAGS and not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
        elif key == "stop_token_ids" and not is_int_list(value):
            raise ValueError(f"{key} must be a list of token ids, got {value!r}")
        elif key == "stop":
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"stop must be text or a list of it, got {value!r}")


class JobReader:
    """Reads the input lazily, in order; knows which ids it has met, and where."""

    def __init__(self, lines: Iterable[bytes], done: set[LineId]) -> None:
        self.lines = lines
        self.done = done
        self.line_of: dict[LineId, int] = {}
        self.ignored: set[str] = set()

    def __iter__(self) -> Iterator[Job | Failure | Done]:
        """Yield one item for each line that is not blank."""
        for line, raw in enumerate(self.lines, 1):
            if raw.strip():
                yield self.read(line, raw)

    def read(self, line: int, raw: bytes) -> Job | Failure | Done:
        """Sort one line into to run, cannot be run, or finished earlier."""
        job_id: LineId = line
        try:
            record = load_object(raw)
            given = record.get("id")
            if given is not None:
                if not is_id(given):
                    raise ValueError(f"id must be text or an integer, got {given!r}")
                job_id = given
            if job_id in self.line_of:
                first = self.line_of[job_id]
                raise ValueError(f"duplicate id {job_id!r}, first on line {first}")
            self.line_of[job_id] = line
            if job_id in self.done:
                return Done(line, job_id)
            job = parse_job(line, job_id, record)
        except ValueError as error:
            return Failure(line, job_id, str(error))
        self.warn_of_ignored(line, record)
        return job

    def warn_of_ignored(self, line: int, record: dict[str, Any]) -> None:
        """Name each key that has no effect once: it may be a misspelt setting."""
        for key in record.keys() - {*PROMPT_KEYS, *SAMPLING_KEYS, "id"} - self.ignored:
            self.ignored.add(key)
            report(f"warning: line {line}: key {key!r} is ignored, here and later")


def count_lines(path: Path) -> int:
    """Lines of the input that are not blank, for the progress bar."""
    with path.open("rb") as file:
        return sum(1 for raw in file if raw.strip())


class Output:
    """The output file: finds what is finished, appends whole lines, sorts at the end.

    Attributes:
        done: ids that earlier runs finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.done: set[LineId] = set()
        if self.path.exists():
            self.recover()
        self.file = self.path.open("ab")

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    def recover(self) -> None:
        """Take over an earlier run's output: drop failures and a half-written line.

        Raises:
            UnusableError: the file holds something that no earlier run wrote.
        """
        if not self.path.is_file():
            raise UnusableError(f"{self.path} is not a regular file")
        kept = total = 0
        keep_all = True
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                total += len(raw)
                if not raw.endswith(b"\n") and could_begin_record(raw):
                    break  # a run was killed while it wrote this line
                record = self.parse_record(number, raw)
                if "error" in record:
                    keep_all = False
                    continue
                self.done.add(record["id"])
                kept += len(raw)
        if not keep_all:
            self.rewrite(self.finished_lines())
        elif kept < total:
            os.truncate(self.path, kept)

    def parse_record(self, number: int, raw: bytes) -> dict[str, Any]:
        """Read one complete line of the output."""
        try:
            record = load_object(raw)
            if is_id(record.get("id")) and type(record.get("line")) is int:
                return record
        except ValueError:
            pass
        raise UnusableError(
            f"line {number} of {self.path} is no record of an earlier run; "
            "name another output"
        )

    def finished_lines(self) -> Iterator[bytes]:
        """Complete lines of finished streams."""
        with self.path.open("rb") as file:
            for raw in file:
                if raw.endswith(b"\n") and "error" not in json.loads(raw):
                    yield raw

    def rewrite(self, lines: Iterable[bytes]) -> None:
        """Replace the file in one step, so that no kill can lose a finished line."""
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and hand it to the system at once."""
        text = json.dumps(record, ensure_ascii=False)
        # A lone surrogate has no UTF-8; its backslash form is what JSON writes for it.
        self.file.write(text.encode("utf-8", "backslashreplace") + b"\n")
        self.file.flush()

    def sort(self, line_of: dict[LineId, int]) -> None:
        """Bring the file into the input's order, holding only offsets in memory."""
        places: list[tuple[int, int, int]] = []
        with self.path.open("rb") as file:
            offset = 0
            for raw in file:
                record = json.loads(raw)
                # The input may have gained lines since an earlier run wrote this one.
                failed = "error" in record
                line = record["line"] if failed else line_of.get(record["id"])
                places.append((line or record["line"], offset, len(raw)))
                offset += len(raw)
            ordered = sorted(places)
            if ordered == places:
                return

            def lines() -> Iterator[bytes]:
                for _, start, length in ordered:
                    file.seek(start)
                    yield file.read(length)

            self.rewrite(lines())
        self.file.close()
        self.file = self.path.open("ab")


def could_begin_record(raw: bytes) -> bool:
    """Whether these bytes begin a record as ``Output.write`` makes it."""
    start = b'{"id": '
    return raw.startswith(start) or start.startswith(raw)


class Tally:
    """Counts of a run, shown on the progress bar."""

    def __init__(self, progress: tqdm[Any]) -> None:
        self.progress = progress
        self.finished = self.failed = self.skipped = self.tokens = 0
        self.started = time.monotonic()

    def restart_clock(self) -> None:
        """Leave the start of the engine out of the rates."""
        self.started = time.monotonic()
        self.progress.unpause()

    def show(self, in_flight: int) -> None:
        """Refresh the bar: tokens read and written a second, by finished streams."""
        rate = self.tokens / max(1e-9, time.monotonic() - self.started)
        self.progress.set_postfix_str(
            f"{rate:.0f} tokens/s, {in_flight} in flight, {self.failed} failed",
            refresh=False,
        )
        seen = self.finished + self.failed + self.skipped
        self.progress.update(seen - self.progress.n)


def run(
    reader: Iterable[Job | Failure | Done],
    start_engine: Callable[[], Engine],
    output: Output,
    tally: Tally,
    *,
    in_flight: int,
    token_ids: bool = False,
    stop: threading.Event | None = None,
) -> None:
    """Keep ``in_flight`` streams in the engine until the input ends or ``stop`` is set.

    The engine is started for the first job, so that a run that has nothing to do is
    quick. Reads on only while a place is free: no more than ``in_flight`` prompts are
    ever held.
    """
    stop = stop or threading.Event()
    engine: Engine | None = None
    flying: dict[str, Job] = {}
    items = iter(reader)
    more = True
    while not stop.is_set():
        while more and len(flying) < in_flight and not stop.is_set():
            item = next(items, None)
            if item is None:
                more = False
            elif isinstance(item, Done):
                tally.skipped += 1
            elif isinstance(item, Failure):
                fail(output, tally, item)
            else:
                if engine is None:
                    engine = start_engine()
                    tally.restart_clock()
                try:
                    flying[engine.submit(item)] = item
                except RefusedError as error:
                    fail(output, tally, Failure(item.line, item.id, str(error)))
            tally.show(len(flying))
        if engine is None or not flying:
            return
        for result in engine.step():
            finish(output, tally, flying.pop(result.request_id), result, token_ids)
        tally.show(len(flying))


def finish(
    output: Output, tally: Tally, job: Job, result: Result, token_ids: bool
) -> None:
    """Write what a stream gave; a stream that the engine gave up counts as failed."""
    if result.finish_reason in ("error", "abort"):
        message = f"the engine gave this request up ({result.finish_reason})"
        return fail(output, tally, Failure(job.line, job.id, message))
    record: dict[str, Any] = {"id": job.id, "line": job.line, "text": result.text}
    if token_ids:
        record["token_ids"] = result.token_ids
    record |= {
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": len(result.token_ids),
        "cached_tokens": result.cached_tokens,
    }
    output.write(record)
    tally.finished += 1
    tally.tokens += result.prompt_tokens + len(result.token_ids)


def fail(output: Output, tally: Tally, failure: Failure) -> None:
    """Report a line that failed, on stderr and in the output."""
    report(f"line {failure.line}: {failure.message}")
    output.write({"id": failure.id, "line": failure.line, "error": failure.message})
    tally.failed += 1


def report(message: str) -> None:
    """Write a line to stderr without tearing the progress bar."""
    safe = message.encode("utf-8", "backslashreplace").decode()
    tqdm.write(safe, file=sys.stderr)


class VllmEngine:
    """vLLM's offline API behind the ``Engine`` protocol.

    ``LLM.enqueue`` takes one request without waiting, ``LLMEngine.step`` advances all.
    """

    def __init__(self, settings: dict[str, Any], sampling: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**settings)
        model_config = self.llm.llm_engine.vllm_config.model_config
        self.sampling = {**model_config.get_diff_sampling_param(), **sampling}

    def submit(self, job: Job) -> str:
        """Queue a job; whatever vLLM finds wrong with it concerns this job alone."""
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            params = SamplingParams(**{**self.sampling, **job.sampling})
            if job.kind == "messages":
                ids = self.llm.enqueue_chat([job.prompt], params, use_tqdm=False)
            else:
                prompt = {job.kind: job.prompt}
                ids = self.llm.enqueue([prompt], params, use_tqdm=False)
        except EngineDeadError:
            raise
        except Exception as error:  # of many kinds: templates, tokenizers, checks
            raise RefusedError(str(error) or type(error).__name__) from error
        # vLLM answers with the number it gave plus a random suffix; outputs carry the
        # number alone.
        return str(ids[0]).partition("-")[0]

    def step(self) -> list[Result]:
        """Advance the engine by one step."""
        return [
            Result(
                request_id=output.request_id,
                text=output.outputs[0].text,
                token_ids=list(output.outputs[0].token_ids),
                finish_reason=output.outputs[0].finish_reason,
                prompt_tokens=len(output.prompt_token_ids or ()),
                cached_tokens=output.num_cached_tokens or 0,
            )
            for output in self.llm.llm_engine.step()
            if output.finished
        ]


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``: only what the user set, and the streams."""
    settings: dict[str, Any] = {"model": args.model, "max_num_seqs": args.batch_size}
    for name in ("max_model_len", "dtype"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if args.enforce_eager:
        settings["enforce_eager"] = True
    settings |= dict(args.engine_arg)
    if not args.stock:
        sink = {"sink_tokens": args.sink_tokens, "window_tokens": args.sink_window}
        settings["additional_config"] = {
            **settings.get("additional_config", {}),
            "sink_paged": {k: v for k, v in sink.items() if v is not None},
        }
    return settings


def check_plugin() -> None:
    """Refuse to run without the plugin: vLLM would silently ignore the setting."""
    names = [e.name for e in entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if "sink_paged" not in names:
        raise UnusableError(
            "the package sink_paged is not installed in this Python (pip install -e .)"
        )
    if allowed is not None and "sink_paged" not in allowed.split(","):
        raise UnusableError("VLLM_PLUGINS is set and does not name sink_paged")


def start_engine(
    settings: dict[str, Any], sampling: dict[str, Any], stop: threading.Event
) -> Engine:
    """Start vLLM; whatever prevents that is a matter of the arguments."""
    try:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            settings = {"kv_cache_memory_bytes": cpu_kv_cache_bytes(), **settings}
        return VllmEngine(settings, sampling)
    except Exception as error:
        if stop.is_set():  # the interrupt reached vLLM's own processes first
            raise KeyboardInterrupt from error
        raise UnusableError(f"vLLM did not start: {error}") from error


def cpu_kv_cache_bytes() -> int | None:
    """A quarter of the free memory: vLLM's CPU default takes 92 % of all, or fails."""
    import psutil

    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    return max(2**30, int(psutil.virtual_memory().available) // 4)


def engine_arg(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE; the value is JSON where it can be read so, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.replace("-", "_").isidentifier():
        raise argparse.ArgumentTypeError(f"NAME=VALUE is needed, got {text!r}")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a checkpoint, or a model's name")
    add("--input", type=Path, required=True, help="JSON lines to run")
    add("--output", type=Path, required=True, help="JSON lines written; resumed")
    add("--sink-tokens", type=int, help="first tokens that stay (default 4)")
    add("--sink-window", type=int, help="recent tokens that stay (default: what fits)")
    add("--stock", action="store_true", help="vLLM without sink eviction, to compare")
    add("--max-model-len", type=int, help="resident tokens (default: trained length)")
    add("--max-tokens", type=int, default=256, help="for lines that name none (256)")
    add("--temperature", type=float)
    add("--top-p", type=float)
    add("--seed", type=int, help="of the sampling, for lines that name none")
    add("--dtype")
    add("--enforce-eager", action="store_true", help="no torch.compile: starts sooner")
    add("--batch-size", type=int, default=64, help="streams in flight (64)")
    add("--keep-order", action="store_true", help="order the output like the input")
    add("--token-ids", action="store_true", help="write the token ids of the outputs")
    add(
        "--engine-arg",
        type=engine_arg,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of vllm.LLM, e.g. block_size=32; repeatable",
    )
    args = parser.parse_args(argv)
    try:
        check_sampling(default_sampling(args))
        check_arguments(args)
    except (ValueError, UnusableError) as error:
        parser.error(str(error))
    return args


def default_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling settings that the command line gives."""
    names = ("max_tokens", "temperature", "top_p", "seed")
    return {n: getattr(args, n) for n in names if getattr(args, n) is not None}


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work; raises ``ValueError`` or ``UnusableError``."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if not args.input.is_file():
        raise ValueError(f"--input {args.input} is not a file")
    if not args.output.resolve().parent.is_dir():
        raise ValueError(f"--output: no folder {args.output.resolve().parent}")
    if args.output.exists() and args.output.samefile(args.input):
        raise ValueError("--output is the input file")
    if args.stock and (args.sink_tokens, args.sink_window) != (None, None):
        raise ValueError("--stock has no sinks and no window")
    if not args.stock:
        check_plugin()


def stop_on_signals(stop: threading.Event) -> None:
    """The first Ctrl-C or TERM ends the run after this step, the next at once."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def run_file(args: argparse.Namespace, stop: threading.Event) -> int:
    """Run the input file; returns the exit status."""
    settings, sampling = engine_settings(args), default_sampling(args)
    with (
        Output(args.output) as output,
        args.input.open("rb") as lines,
        tqdm(total=count_lines(args.input), unit="line", dynamic_ncols=True) as bar,
    ):
        reader, tally = JobReader(lines, output.done), Tally(bar)
        failed_with: BaseException | None = None
        try:
            run(
                reader,
                lambda: start_engine(settings, sampling, stop),
                output,
                tally,
                in_flight=args.batch_size,
                token_ids=args.token_ids,
                stop=stop,
            )
        except UnusableError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            failed_with = error
        if args.keep_order:
            output.sort(reader.line_of)
    interrupted = stop.is_set() or isinstance(failed_with, KeyboardInterrupt)
    report(
        f"{'interrupted: ' if interrupted else ''}{tally.finished} finished, "
        f"{tally.failed} failed, {tally.skipped} finished earlier"
    )
    if interrupted:
        return 130
    if failed_with is not None:
        report(f"error: the engine failed: {failed_with!r}; run again to resume")
        return 1
    return 1 if tally.failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    stop = threading.Event()
    stop_on_signals(stop)
    try:
        return run_file(args, stop)
    except UnusableError as error:
        report(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
