# SPDX-License-Identifier: Apache-2.0
"""Patches of vLLM: declared, checked, idempotent, revertible.

A patch wraps one function or method that vLLM gives no hook for. It refuses to install
when the target has vanished or changed its parameters, and steps aside when vLLM has
the hook (as the diffs in ``patches/`` would give it).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import vllm
from packaging.version import Version
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")  # vLLM shows its own loggers only


class PatchError(RuntimeError):
    """A vLLM function that the extension must wrap is not what it expects."""


def find(path: str) -> Any | None:
    """What is at ``module:qualified.name``, or the module; None where there is none."""
    module_name, _, qualified = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError:
        return None
    for name in filter(None, qualified.split(".")):
        found = getattr(found, name, None)
    return found


def find_first(*paths: str) -> Any:
    """What is at the first of ``paths`` that leads to something, see `find`.

    Raises:
        PatchError: none of them does.
    """
    for path in paths:
        found = find(path)
        if found is not None:
            return found
    raise PatchError(f"vLLM {vllm.__version__} has none of {', '.join(paths)}")


@dataclass(frozen=True)
class Patch:
    """One wrapped function of vLLM.

    Attributes:
        target: ``module:qualified.name`` of the function or method.
        parameters: names its first parameters must have, in order.
        wrapper: called as ``wrapper(original, *args, **kwargs)``.
        why: what has no hook, in a line.
        upstream: ``module:qualified.name`` that exists where vLLM has the hook.
        since: the first vLLM that needs the patch; older ones lack the target.
        before: the first vLLM that needs it no longer, if there is one.
    """

    target: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    why: str
    upstream: str
    since: str = "0"
    before: str | None = None

    def applies(self) -> bool:
        """Whether this vLLM needs the patch."""
        base = Version(Version(vllm.__version__).base_version)
        mended = self.before is not None and base >= Version(self.before)
        return base >= Version(self.since) and not mended

    def install(self) -> None:
        """Wrap the target, unless it is wrapped or vLLM has the hook.

        Raises:
            PatchError: when the target is missing or has other parameters.
        """
        if not self.applies():
            return
        if find(self.upstream) is not None:
            logger.debug("vLLM has %s: %s is not patched", self.upstream, self.target)
            return
        owner, name = self._owner()
        raw = inspect.getattr_static(owner, name, None)
        original = getattr(raw, "__func__", raw)
        if original is None or not callable(original):
            raise PatchError(self._message("it does not exist"))
        if getattr(original, "__sink_paged_patch__", None) is not None:
            return
        actual = tuple(inspect.signature(original).parameters)
        if actual[: len(self.parameters)] != self.parameters:
            raise PatchError(self._message(f"its parameters are {actual}"))
        wrapper = self.wrapper

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        wrapped.__sink_paged_patch__ = self  # type: ignore[attr-defined]
        wrapped.__sink_paged_raw__ = raw  # type: ignore[attr-defined]
        kind = type(raw) if isinstance(raw, (classmethod, staticmethod)) else None
        setattr(owner, name, kind(wrapped) if kind else wrapped)

    def revert(self) -> None:
        """Put the original back (tests)."""
        owner, name = self._owner()
        raw = inspect.getattr_static(owner, name, None)
        original = getattr(getattr(raw, "__func__", raw), "__sink_paged_raw__", None)
        if original is not None:
            setattr(owner, name, original)

    def installed(self) -> bool:
        """Whether the target is wrapped now."""
        owner, name = self._owner()
        raw = inspect.getattr_static(owner, name, None)
        patch = getattr(getattr(raw, "__func__", raw), "__sink_paged_patch__", None)
        return patch is not None

    def _owner(self) -> tuple[Any, str]:
        module, _, qualified = self.target.partition(":")
        parents, _, name = qualified.rpartition(".")
        path = f"{module}:{parents}" if parents else module
        owner = find(path)
        if owner is None:
            raise PatchError(self._message(f"{path} does not exist"))
        return owner, name

    def _message(self, problem: str) -> str:
        return (
            f"sink_paged cannot hook {self.target} of vLLM {vllm.__version__} "
            f"({self.why}): {problem}"
        )
