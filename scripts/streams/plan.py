# SPDX-License-Identifier: Apache-2.0
"""From what the user asked for to workloads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from streams.workload import Workload

MOST_BATCHED_TOKENS = 2048


def workloads(args: argparse.Namespace, model: str, scratch: str) -> Iterator[Workload]:
    """One repetition: all peers of a window and concurrency next to each other."""
    in_flight = 2 if torch.cuda.is_available() else 1
    for window in args.window:
        for streams in args.concurrency:
            for peer in args.peers:
                yield Workload(
                    peer=peer,
                    model=model,
                    streams=streams,
                    window=window,
                    sink_tokens=args.sink_tokens,
                    prompt_tokens=args.prompt_tokens or window,
                    text_tokens=text_tokens(args, window),
                    pool_tokens=int(args.kv_windows * window),
                    seconds=args.seconds,
                    dtype=args.dtype,
                    eager=args.eager,
                    block_size=args.block_size or block_size(args.kv_windows),
                    max_num_batched_tokens=args.max_num_batched_tokens
                    or batched_tokens(window, args.kv_windows, in_flight),
                    steps_in_flight=in_flight,
                    seed=args.seed,
                    kv_cache_dtype=args.kv_cache_dtype,
                    scratch=scratch,
                )


def text_tokens(args: argparse.Namespace, window: int) -> int:
    """Length at which a text ends."""
    return int(args.length_windows * window)


def block_size(kv_windows: float) -> int:
    """Tokens of a KV block: vLLM's default, on a CPU fewer where the pool is small."""
    if torch.cuda.is_available():
        return 16
    return 32 if kv_windows else 128


def batched_tokens(window: int, kv_windows: float, in_flight: int) -> int:
    """Most tokens in a step: those in flight must fit into the pool beside a window.

    Args:
        window: tokens of one.
        kv_windows: size of the KV pool, in windows; 0 for what the streams need.
        in_flight: steps that are under way at once.
    """
    windows = max(1.0, min(4.0, kv_windows / 2)) if kv_windows else 4.0
    return min(MOST_BATCHED_TOKENS, int(windows * window / in_flight))


def check(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, or None."""
    for window in args.window:
        prompt = args.prompt_tokens or window
        if args.sink_tokens >= window:
            return f"--window {window} must be above --sink-tokens {args.sink_tokens}"
        if text_tokens(args, window) < prompt + 2:
            return (
                f"texts of {args.length_windows:g} windows of {window} tokens end "
                f"before two tokens follow a prompt of {prompt}: raise "
                "--length-windows"
            )
        if args.kv_windows and args.kv_windows < 2:
            return "--kv-windows must be at least 2: a stream, and a chunk of a prompt"
    if min(args.concurrency) < 1:
        return "--concurrency must be at least 1"
    return None
