# SPDX-License-Identifier: Apache-2.0
"""What one measurement found, from the time of every token."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TEXT_BINS = 48
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Latency:
    """Mean, median, standard deviation and 99th percentile, in milliseconds."""

    mean: float
    median: float
    std: float
    p99: float

    @classmethod
    def of(cls, seconds: Floats) -> Latency:
        """Statistics of durations; NaN where there are none."""
        if not len(seconds):
            return cls(*[float("nan")] * 4)
        values = 1e3 * seconds
        return cls(
            float(values.mean()),
            float(np.median(values)),
            float(values.std()),
            float(np.percentile(values, 99)),
        )


class Whole(NamedTuple):
    """What a run comes to with all its texts written to their end.

    Attributes:
        seconds: from the first submission to the last token.
        texts: number of them.
        output_tokens: of all texts.
    """

    seconds: float
    texts: int
    output_tokens: int


@dataclass
class Result:
    """One measurement; ``to_json`` gives the key names of ``vllm bench serve``.

    The throughputs of a run that was cut are those of its whole texts, estimated: over
    what was written the prompts would weigh more than in a run to the end.

    Attributes:
        duration: seconds from the first submission to the last token.
        completed: streams that reached the length asked for.
        total_input_tokens: prompt tokens of all streams.
        total_output_tokens: tokens written by all streams.
        steady_output_throughput: tokens a second while all streams write: from the
            last stream's first token to the first stream's last. None where streams
            had to wait for others to end.
        longest_text: tokens of the longest text, prompt and output.
        ttft: time to first token, over streams.
        tpot: mean time per output token after the first, over streams.
        itl: time from token to token, over all tokens (inter-token latency).
        text: for bins of the text length, the median ``itl`` in milliseconds.
        whole: estimate for a run that was cut, None for any other.
        extra: what only some peers know: preemptions, KV blocks, memory, start-up.
    """

    duration: float
    completed: int
    total_input_tokens: int
    total_output_tokens: int
    steady_output_throughput: float | None
    longest_text: int
    ttft: Latency
    tpot: Latency
    itl: Latency
    text: dict[str, list[float]]
    whole: Whole | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def output_throughput(self) -> float:
        """Output tokens a second over whole texts, prefill included."""
        whole = self.whole or self._measured
        return whole.output_tokens / whole.seconds

    @property
    def _measured(self) -> Whole:
        return Whole(self.duration, self.completed, self.total_output_tokens)

    def to_json(self) -> dict[str, Any]:
        """A flat mapping.

        ``extrapolated`` says whether the throughputs are estimates; then
        ``estimated_duration`` is the time of whole texts in seconds, and
        ``duration``, ``completed``, ``total_output_tokens`` and
        ``measured_output_throughput`` are those of the run as it was.
        """
        whole = self.whole or self._measured
        total = self.total_input_tokens + whole.output_tokens
        flat: dict[str, Any] = {
            "duration": self.duration,
            "completed": self.completed,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "request_throughput": whole.texts / whole.seconds,
            "output_throughput": self.output_throughput,
            "total_token_throughput": total / whole.seconds,
            "extrapolated": self.whole is not None,
            "estimated_duration": self.whole and self.whole.seconds,
            "measured_output_throughput": self.total_output_tokens / self.duration,
            "steady_output_throughput": self.steady_output_throughput,
            "longest_text": self.longest_text,
        }
        for name in ("ttft", "tpot", "itl"):
            for statistic, value in asdict(getattr(self, name)).items():
                flat[f"{statistic}_{name}_ms"] = value
        return flat | self.extra | {"itl_by_text": self.text}


class Recorder:
    """Notes the time of every token of every stream.

    Args:
        streams: how many.
        prompt_tokens: of each.
        report: called with the number of tokens written since the last call.
    """

    def __init__(
        self, streams: int, prompt_tokens: int, report: Callable[[int], None]
    ) -> None:
        """Start the clock."""
        self.prompt_tokens = prompt_tokens
        self.report = report
        self.times: list[array[float]] = [array("d") for _ in range(streams)]
        self.all_began: float | None = None
        self.start = time.perf_counter()

    @property
    def writing_seconds(self) -> float:
        """Seconds since the first token of the last stream; 0 before it."""
        return 0.0 if self.all_began is None else time.perf_counter() - self.all_began

    def wrote(self, stream: int, tokens: int = 1, moment: float | None = None) -> None:
        """Note new tokens.

        Args:
            stream: number of the stream that has them.
            tokens: how many.
            moment: seconds of ``time.perf_counter``, the same for all tokens of a step;
                None for now.
        """
        if moment is None:
            moment = time.perf_counter()
        for _ in range(tokens):
            self.times[stream].append(moment)
        if self.all_began is None and all(self.times):
            self.all_began = moment
        self.report(tokens)

    def written(self, stream: int) -> int:
        """Tokens that a stream wrote so far."""
        return len(self.times[stream])

    def result(self, wanted: int, extrapolate: bool = False, **extra: Any) -> Result:
        """Sum up.

        Args:
            wanted: tokens that each stream was to write.
            extrapolate: if the run was cut, estimate what whole texts would give: for
                peers whose tokens cost the same at any length.
            extra: what only some peers know.

        Raises:
            RuntimeError: when no stream wrote a token, or too few for an estimate.
        """
        times = [np.array(stream) for stream in self.times if len(stream)]
        if not times:
            raise RuntimeError("no stream wrote a token")
        steady = self._steady(times)
        gaps = [np.diff(stream) for stream in times]
        return Result(
            duration=max(stream[-1] for stream in times) - self.start,
            completed=sum(len(stream) >= wanted for stream in times),
            total_input_tokens=len(self.times) * self.prompt_tokens,
            total_output_tokens=sum(map(len, times)),
            steady_output_throughput=steady,
            longest_text=self.prompt_tokens + max(map(len, times)),
            ttft=Latency.of(np.array([stream[0] - self.start for stream in times])),
            tpot=Latency.of(np.array([gap.mean() for gap in gaps if len(gap)])),
            itl=Latency.of(np.concatenate(gaps)),
            text=_by_text(gaps, self.prompt_tokens),
            whole=self._whole(times, wanted, steady) if extrapolate else None,
            extra=extra,
        )

    def _steady(self, times: list[Floats]) -> float | None:
        begin = max(stream[0] for stream in times)
        end = min(stream[-1] for stream in times)
        if len(times) < len(self.times) or end <= begin:
            return None
        inside = sum(int(((t > begin) & (t <= end)).sum()) for t in times)
        return inside / float(end - begin) if inside else None

    def _whole(
        self, times: list[Floats], wanted: int, steady: float | None
    ) -> Whole | None:
        """All streams to their first token as it was, the rest at the steady rate."""
        texts = len(self.times)
        if sum(map(len, times)) >= texts * wanted:
            return None
        if steady is None:
            raise RuntimeError("cut before all streams wrote side by side")
        begin = max(stream[0] for stream in times)
        rest = texts * wanted - sum(int((stream <= begin).sum()) for stream in times)
        seconds = float(begin) - self.start + rest / steady
        return Whole(seconds, texts, texts * wanted)


def _by_text(gaps: list[Floats], prompt_tokens: int) -> dict[str, list[float]]:
    """Median gap in bins of the text length at which the token was written."""
    lengths = np.concatenate([np.arange(len(gap)) for gap in gaps]) + prompt_tokens + 2
    values = np.concatenate(gaps)
    if not len(values):
        return {"text_tokens": [], "itl_ms": []}
    edges = np.linspace(lengths.min(), lengths.max() + 1, TEXT_BINS + 1)
    bins = np.digitize(lengths, edges) - 1
    used = np.unique(bins)
    return {
        "text_tokens": [float((edges[b] + edges[b + 1]) / 2) for b in used],
        "itl_ms": [1e3 * float(np.median(values[bins == b])) for b in used],
    }
