# SPDX-License-Identifier: Apache-2.0
"""vLLM's entry point, called in each of its processes.

vLLM swallows errors raised while this module is imported, but not those raised by
``register``: imports that can fail stay inside the function.
"""

from __future__ import annotations


def register() -> None:
    """Register cache spec, attention backend and models; install the patches.

    All of it stays inert until an engine's ``additional_config`` has ``sink_paged``,
    but the models that vLLM lacks: any engine may serve those.

    Raises:
        PatchError: when a vLLM that is supported lacks a function that must be wrapped.
    """
    from sink_paged import engine, patches

    try:
        engine.check_vllm_version()
    except engine.UnsupportedSettingError:
        # Asked for sink eviction, an engine says that this vLLM is not supported; an
        # engine without it must not notice that the package is there.
        from sink_paged.patching import PatchError

        for patch in patches.ARGUMENTS:
            try:
                patch.install()
            except PatchError as error:
                engine.logger.warning("sink_paged is of no use here: %s", error)
        return

    from vllm.v1.attention.backends.registry import (
        AttentionBackendEnum,
        register_backend,
    )

    from sink_paged import kv_cache, models
    from sink_paged.hooks import HOOKS
    from sink_paged.patching import find
    from sink_paged.platforms import find_platform

    register_hooks = find(patches.ENGINE_HOOKS)
    if register_hooks is not None:
        register_hooks(HOOKS)
    for patch in patches.ALL:
        patch.install()
    kv_cache.register()
    models.register()
    platform = find_platform()
    if platform is not None:
        register_backend(AttentionBackendEnum.CUSTOM, platform.backend)
