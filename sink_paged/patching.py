# SPDX-License-Identifier: Apache-2.0
"""Patches of vLLM: declared, checked, idempotent, revertible.

A patch wraps one function or method that vLLM gives no hook for. It refuses to install
when the target has vanished or changed its parameters, and steps aside when vLLM
itself carries the change (the diffs in ``patches/`` leave a marker).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

logger = init_logger(__name__)

UPSTREAM_MARKER = "__sink_paged_hook__"
"""Attribute of a module that already contains the change of ``patches/``."""


class PatchError(RuntimeError):
    """A vLLM function that the extension must wrap is not what it expects."""


@dataclass(frozen=True)
class Patch:
    """One wrapped function of vLLM.

    Attributes:
        target: ``module:qualified.name`` of the function or method.
        parameters: names its first parameters must have, in order.
        wrapper: called as ``wrapper(original, *args, **kwargs)``.
        why: what has no hook, in a line.
    """

    target: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    why: str

    def install(self) -> None:
        """Wrap the target; does nothing when it is wrapped already.

        Raises:
            PatchError: when the target is missing or has other parameters.
        """
        owner, name = self._owner()
        raw = inspect.getattr_static(owner, name, None)
        original = getattr(raw, "__func__", raw)
        if original is None or not callable(original):
            raise PatchError(self._message("it does not exist"))
        if getattr(original, "__sink_paged_patch__", None) is not None:
            return
        module = importlib.import_module(self.target.partition(":")[0])
        if self.target in getattr(module, UPSTREAM_MARKER, ()):
            logger.info("vLLM carries %s itself: patch not installed", self.target)
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
        raw = inspect.getattr_static(owner, name)
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
        module_name, _, qualified = self.target.partition(":")
        *path, name = qualified.split(".")
        try:
            owner: Any = importlib.import_module(module_name)
            for part in path:
                owner = getattr(owner, part)
        except (ImportError, AttributeError) as error:
            raise PatchError(self._message(str(error))) from error
        return owner, name

    def _message(self, problem: str) -> str:
        import vllm

        return (
            f"sink_paged cannot hook {self.target} of vLLM {vllm.__version__} "
            f"({self.why}): {problem}"
        )
