# SPDX-License-Identifier: Apache-2.0
"""What the CUDA side relies on in vLLM, so that a new vLLM fails here and not there.

vLLM's modules for GPUs are importable without one; nothing of them is run.
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
    triton_reshape_and_cache_flash,
)
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu import spec_decode
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu_worker import Worker

from sink_paged import platforms
from sink_paged.attention import flash
from sink_paged.attention.triton_backend import (
    SinkTritonAttentionBackend,
    SinkTritonAttentionImpl,
    SinkTritonMetadataBuilder,
)
from sink_paged.config import StreamConfig
from sink_paged.gpu_worker import SinkGPUWorker
from sink_paged.rotary import UnsupportedLayerError
from sink_paged.runner_v2.block_tables import RingBlockTables
from sink_paged.runner_v2.requests import StreamRequestState
from sink_paged.runner_v2.runner import StreamRunner
from sink_paged.runner_v2.sampling import StreamPenalties, StreamPromptLogprobs
from sink_paged.window import SinkWindow
from tests.engines import has_v2_drafter, vllm_since

FLASH = "flash_attn_varlen_func"


def leading(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("ours", "theirs", "names"),
    [
        (SinkGPUWorker, Worker, ["init_device", "load_model", "execute_model",
          "determine_available_memory", "initialize_from_config"]),
        (StreamRunner, v2.GPUModelRunner, ["load_model", "add_requests",
          "prepare_inputs"]),
        (RingBlockTables, BlockTables, ["append_block_ids", "compute_slot_mappings"]),
        (StreamRequestState, RequestState, ["add_request", "apply_staged_writes",
          "remove_request"]),
        (StreamPenalties, PenaltiesState, ["apply_staged_writes"]),
        (StreamPromptLogprobs, PromptLogprobsWorker, ["compute_prompt_logprobs"]),
        (SinkTritonAttentionImpl, TritonAttentionImpl, ["forward",
          "do_kv_cache_update"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)  # fmt: skip
def test_overridden_methods_exist(ours: type, theirs: type, names: list[str]) -> None:
    """With the parameters that ours take by name or place."""
    for name in names:
        mine, stock = (leading(getattr(kind, name)) for kind in (ours, theirs))
        kinds = inspect.signature(getattr(ours, name)).parameters.values()
        passes_on = any(kind.kind is kind.VAR_POSITIONAL for kind in kinds)
        named = [kind.name for kind in kinds if kind.kind is kind.POSITIONAL_OR_KEYWORD]
        assert named[1:2] == stock[1:2] or named == ["self"], name
        if not passes_on:
            assert mine == stock, name


def test_state_of_the_v2_runner() -> None:
    """Fields and attributes that are read or replaced."""
    batch = set(v2.BatchReqState._fields)
    assert {"idx_mapping_np", "num_scheduled_tokens", "has_prefill"} <= batch
    inputs = {field.name for field in dataclasses.fields(InputBatch)}
    assert {"has_prefill", "idx_mapping", "query_start_loc", "num_reqs"} <= inputs
    for kind, attributes in {
        RequestState: ["all_token_ids", "total_len", "prompt_len", "req_id_to_index",
                       "num_computed_tokens_np", "max_num_reqs", "device",
                       "num_speculative_steps"],
        BlockTables: ["block_tables", "num_blocks", "slot_mappings", "block_sizes",
                      "num_kv_cache_groups", "block_table_ptrs", "block_sizes_tensor",
                      "block_table_strides", "device"],
        PenaltiesState: ["prompt_bin_mask", "output_bin_counts", "device",
                         "_new_penalties_reqs"],
        PromptLogprobsWorker: ["uses_prompt_logprobs", "max_num_reqs"],
        BadWordsState: ["req_states"],
        v2.GPUModelRunner: ["req_states", "block_tables", "input_buffers", "sampler",
                            "prompt_logprobs_worker", "kv_cache_config",
                            "max_num_tokens", "max_num_reqs", "speculator"],
    }.items():  # fmt: skip
        source = inspect.getsource(kind)
        for attribute in attributes:
            assert f"self.{attribute}" in source, f"{kind.__name__}.{attribute}"
    assert leading(StagedWriteTensor.stage_write) == ["self", "index", "start", "x"]
    assert leading(StagedWriteTensor.stage_write_elem) == ["self", "index", "x"]


def test_everything_that_reads_a_text_is_known() -> None:
    """Rows hold the last tokens only: a new reader of whole texts would go wrong."""
    root = Path(v2.__file__).parent
    readers = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "all_token_ids" in path.read_text()
    }
    handled = {
        "states.py", "model_runner.py", "input_batch.py", "sample/penalties.py",
        "sample/bad_words.py", "sample/prompt_logprob.py",
    }  # fmt: skip
    refused = {
        name
        for name in (
            "sample/thinking_budget.py", "sample/watermark.py",
            "sample/logits_processor/interface.py", "model_states/mm_pruning.py",
        )
        if (root / name).exists()  # the newer features
    }  # fmt: skip
    drafters = {
        name
        for name in (
            "spec_decode/ngram/speculator.py",
            "spec_decode/speculator.py",  # to watermark, which is refused
        )
        if name in readers
    }
    assert readers == handled | refused | drafters
    assert "if batch_req_state.has_prefill:\n            prepare_prefill_inputs(" in (
        inspect.getsource(v2.GPUModelRunner.prepare_inputs)
    )


def test_the_runner_asks_itself_for_its_caches() -> None:
    """The worker passes the runner's answer on, also when graphs are measured."""
    assert "self.model_runner.get_kv_cache_spec()" in (
        inspect.getsource(Worker.get_kv_cache_spec)
    )


def test_the_cache_is_written_by_vllms_kernel() -> None:
    names = ["key", "value", "key_cache", "value_cache", "slot_mapping",
             "kv_cache_dtype", "k_scale", "v_scale"]  # fmt: skip
    if vllm_since("0.33.0"):
        names.append("interleaved_v_pack_factor")  # 0 by default, for ROCm
    assert leading(triton_reshape_and_cache_flash) == names
    source = inspect.getsource(TritonAttentionImpl.do_kv_cache_update)
    assert "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)" in source


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_e5m2"])
def test_the_cuda_platform_takes_the_backend(
    sliding: bool, kv_cache_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a patch: it is what ``CUSTOM`` stands for, and the check lets it by."""
    # A build for the CPU lacks what the platform's module loads.
    for name in ("vllm._C", "vllm._C_stable_libtorch"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    from vllm.platforms.cuda import CudaPlatformBase

    monkeypatch.setattr(
        CudaPlatformBase,
        "get_device_capability",
        classmethod(lambda cls, device_id=0: DeviceCapability(9, 0)),
    )
    custom = registry.AttentionBackendEnum.CUSTOM
    monkeypatch.setitem(registry._ATTN_OVERRIDES, custom, platforms.CUDA.backend)
    config = AttentionSelectorConfig(
        head_size=128,
        dtype=torch.bfloat16,
        kv_cache_dtype=kv_cache_dtype,
        block_size=16,
        has_sink=True,
        has_sliding_window=sliding,
    )
    path = CudaPlatformBase.get_attn_backend_cls(custom, config)
    assert path == platforms.CUDA.backend
    for head_size in (32, 64, 80, 96, 112, 128, 256):
        assert SinkTritonAttentionBackend.supports_head_size(head_size)
    assert not SinkTritonAttentionBackend.supports_head_size(100)


@pytest.mark.parametrize(
    ("capability", "kv_cache_dtype", "needed"),
    [
        ((7, 5), "auto", "8.0"),
        ((8, 0), "auto", None),
        ((8, 6), "fp8", "8.9"),
        ((8, 9), "fp8", None),
    ],
)
def test_gpus_too_old_are_refused(
    capability: tuple[int, int],
    kv_cache_dtype: str,
    needed: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = StreamConfig(SinkWindow(4, 60), resident_tokens=65).store({})
    with set_current_vllm_config(VllmConfig(additional_config=config)):
        layer = SinkTritonAttentionImpl(8, 64, 0.125, kv_cache_dtype=kv_cache_dtype)
    found = classmethod(lambda cls, device_id=0: DeviceCapability(*capability))
    monkeypatch.setattr(type(current_platform), "get_device_capability", found)
    refused = pytest.raises(UnsupportedLayerError, match=f"compute capability {needed}")
    with refused if needed else nullcontext():
        layer.check_supported()


def test_any_batch_may_be_captured() -> None:
    assert SinkTritonMetadataBuilder._cudagraph_support is AttentionCGSupport.ALWAYS
    worker = platforms.CUDA.worker.rpartition(".")
    assert SinkGPUWorker.__module__ == worker[0]
    assert SinkGPUWorker.__name__ == worker[2]


def test_flash_attention_takes_what_it_is_given() -> None:
    """Its module cannot be imported here: the extension is for CUDA."""
    path = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    functions = {
        node.name: node.args
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    taken = {argument.arg for argument in functions[FLASH].args}
    call = ast.parse(textwrap.dedent(inspect.getsource(flash.attend_window)))
    (given,) = (
        node
        for node in ast.walk(call)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == FLASH
    )
    assert [argument.arg for argument in functions[FLASH].args[:3]] == ["q", "k", "v"]
    assert {keyword.arg for keyword in given.keywords} <= taken
    assert functions["is_fa_version_supported"].args[0].arg == "fa_version"


def test_runner_v2_has_the_drafters_from_their_versions_on() -> None:
    """The older ones take model runner V1 by themselves, or refuse."""
    source = inspect.getsource(spec_decode.init_speculator)
    assert ("uses_draft_model()" in source) is has_v2_drafter("draft_model")
    assert ("use_ngram()" in source) is has_v2_drafter("ngram")
    declined = inspect.getsource(VllmConfig._get_v2_model_runner_unsupported_features)
    assert ('"ngram"' in declined) is not has_v2_drafter("ngram")


def test_draft_models_of_the_v2_runner() -> None:
    """What is set and read of them, and how they call the model."""
    if not has_v2_drafter("draft_model"):
        return
    source = inspect.getsource(DraftModelSpeculator.__init__)
    for attribute in ("max_model_len", "draft_max_seq_len", "draft_model_config"):
        is_property = attribute == "max_model_len" and vllm_since("0.33.0")
        assert (f"self.{attribute} = " in source) != is_property
        assert hasattr(DraftModelSpeculator, attribute) == is_property
    assert "self.model = " in inspect.getsource(DraftModelSpeculator.load_model)
    assert "_build_attn_metadata" in vars(DraftModelSpeculator)
    names = ("StandaloneARSpeculator", "PlainDraftModelSpeculator")
    (name,) = (
        name for name in names if name in inspect.getsource(spec_decode.init_speculator)
    )
    folder = Path(spec_decode.__file__).parent
    (path,) = (
        path for path in folder.rglob("*.py") if f"class {name}" in path.read_text()
    )
    source = path.read_text()
    assert f"class {name}(DraftModelSpeculator)" in source
    assert "num_extra_query_per_req = 1" in source  # a token more of each request
    assert "input_ids=input_ids,\n                positions=positions," in source
    assert source.count("block_tables.compute_slot_mappings(") == 2


def test_n_grams_of_the_v2_runner() -> None:
    """How rows, their lengths and the longest row reach the kernels."""
    if not has_v2_drafter("ngram"):
        return
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

    from sink_paged.runner_v2.ngram import StreamNgramSpeculator

    assert leading(NgramGPUSpeculator.__init__) == [
        "self", "vllm_config", "device", "req_states",
    ]  # fmt: skip
    stock, mine = (
        inspect.signature(kind.propose).parameters
        for kind in (NgramGPUSpeculator, StreamNgramSpeculator)
    )
    assert list(stock)[:2] == list(mine)[:2] == ["self", "input_batch"]
    assert "dummy_run" in stock
    source = inspect.getsource(NgramGPUSpeculator)
    for used in (
        "self.max_model_len: int = vllm_config.model_config.max_model_len",
        "token_ids = req_states.all_token_ids.gpu",
        "token_ids.stride(0)",
        "req_states.total_len.gpu",
        "self.num_speculative_steps",
    ):
        assert used in source
    assert "self.speculator = init_speculator(" in (
        inspect.getsource(v2.GPUModelRunner.__init__)
    )
