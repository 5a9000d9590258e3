# SPDX-License-Identifier: Apache-2.0
"""Patches: declared, checked, revertible; and the diffs that make them unnecessary."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from sink_paged import patches, plugin
from sink_paged.patching import Patch, PatchError, find
from tests.engines import vllm_since

PATCHES = Path(__file__).parents[1] / "patches"
DIFFS = PATCHES / vllm.__version__.partition("+")[0]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """As in any process that has loaded vLLM's plugins."""
    plugin.register()


def call(original, *args):  # type: ignore[no-untyped-def]
    return original(*args)


def make_patch(**changes: object) -> Patch:
    fields: dict[str, object] = {
        "target": "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "parameters": ("cls", "args"),
        "wrapper": call,
        "why": "a test",
        "upstream": "vllm.plugins:no_such_hook",
    }
    return Patch(**(fields | changes))  # type: ignore[arg-type]


def test_register_is_idempotent_and_revertible() -> None:
    originals = {}
    applied = [patch for patch in patches.ALL if patch.applies()]
    mended = {"record_read"} if vllm_since("0.33.0") else set()
    assert applied == [
        patch
        for patch in patches.ALL
        if find(patch.target) and patch.target.rpartition(".")[2] not in mended
    ]
    for patch in applied:
        patch.revert()
        originals[patch.target] = find(patch.target)
    plugin.register()
    wrapped = {patch.target: find(patch.target) for patch in applied}
    plugin.register()
    for patch in applied:
        assert patch.installed()
        assert find(patch.target) == wrapped[patch.target] != originals[patch.target]
        patch.revert()
        assert find(patch.target) == originals[patch.target]
    plugin.register()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"target": "vllm.engine.arg_utils:EngineArgs.gone"}, "does not exist"),
        ({"target": "vllm.engine.no_module:f"}, "does not exist"),
        ({"parameters": ("cls", "other")}, "its parameters are"),
    ],
)
def test_a_changed_vllm_is_refused(change: dict[str, object], problem: str) -> None:
    patches.ALL[2].revert()
    with pytest.raises(PatchError, match=problem) as error:
        make_patch(**change).install()
    assert vllm.__version__ in str(error.value)
    patches.ALL[2].install()


def test_an_unsupported_vllm_says_so_to_the_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And gets no other patch."""
    for patch in patches.ALL:
        patch.revert()
    with monkeypatch.context() as version:
        version.setattr(vllm, "__version__", "0.99.0")
        plugin.register()
        installed = [patch for patch in patches.ALL if patch.installed()]
        assert installed == list(patches.ARGUMENTS)
        model = Path(__file__).parent / "data" / "llama_mha"
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        flags = ["--model", str(model), "--skip-tokenizer-init", "--sink-eviction"]
        engine_args = EngineArgs.from_cli_args(parser.parse_args(flags))
        with pytest.raises(ValueError, match="does not support vLLM 0.99.0"):
            engine_args.create_engine_config()
        version.setenv("SINK_PAGED_ALLOW_UNTESTED_VLLM", "1")
        engine_args.create_engine_config()
    plugin.register()


def test_an_unsupported_vllm_with_other_arguments_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine without the flag does not notice that the package is there."""
    said: list[str] = []
    monkeypatch.setattr(
        "sink_paged.engine.logger.warning",
        lambda message, *values: said.append(message % values),
    )
    changed = make_patch(parameters=("cls", "other"))
    patches.ALL[2].revert()
    with monkeypatch.context() as version:
        version.setattr(vllm, "__version__", "0.99.0")
        version.setattr(patches, "ARGUMENTS", (changed,))
        plugin.register()
    assert len(said) == 1 and "its parameters are" in said[0]
    assert not changed.installed()
    patches.ALL[2].install()


def test_steps_aside_where_vllm_has_the_hook() -> None:
    patches.ALL[2].revert()
    patch = make_patch(upstream="vllm.plugins:load_general_plugins")
    patch.install()
    assert not patch.installed()
    patches.ALL[2].install()


def test_every_patch_has_its_index_entry() -> None:
    index = (PATCHES / "README.md").read_text()
    for patch in (*patches.ALL, *patches.SERVER):
        assert f"`{patch.target}`" in index
    for diff in DIFFS.iterdir():
        assert f"`{diff.stem}`" in index


BUSY_READER = """
import sys, time, psutil, zmq
from sink_paged import patches
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.utils.network_utils import get_open_zmq_inproc_path
patch = next(patch for patch in patches.ALL if "SpinCondition" in patch.target)
if sys.argv[1] == "patched":
    patch.install()
else:
    patch.revert()
context = zmq.Context()
address = get_open_zmq_inproc_path()
writer = SpinCondition(False, context, address)
reader = SpinCondition(True, context, address)
def busy():
    writer.notify()
    reader.record_read()
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    busy()
before = psutil.Process().memory_info().rss
for _ in range(200_000):
    busy()
print(psutil.Process().memory_info().rss - before)
"""


def test_a_busy_reader_of_the_message_queue_does_not_grow() -> None:
    """Notified 200,000 times without ever being idle, in a process of its own."""
    patch = next(patch for patch in patches.ALL if "SpinCondition" in patch.target)
    # A vLLM that looks at its socket every two seconds keeps what comes until then.
    before = "0" if patch.applies() else "2.5"

    def grown(how: str) -> int:
        command = [sys.executable, "-c", BUSY_READER, how, before]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1])

    grows = grown("as it is") > 4_000_000
    assert grows == patch.applies(), "whether vLLM needs the patch is not what it says"
    assert grown("patched") < 1_000_000


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_wait_for_a_message_leaves_the_core(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool
) -> None:
    """Elsewhere than on a CPU, cores are many and a poll's microseconds count."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    next(p for p in patches.ALL if p.target.endswith(":sched_yield")).install()
    called = []
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cpu", lambda self: on_cpu)
    monkeypatch.setattr(os, "sched_yield", lambda: called.append("yield"))
    monkeypatch.setattr(time, "sleep", lambda seconds: called.append(f"{seconds} s"))
    shm_broadcast.sched_yield()
    assert called == ["0 s" if on_cpu else "yield"]


CHECK = """
import sys, vllm
from sink_paged import patches, plugin
from sink_paged.config import StreamConfig
plugin.register()
plugin.register()
assert vllm.__file__.startswith(sys.argv[1]), vllm.__file__
wrapped = [patch.target for patch in patches.ALL if patch.installed()]
assert not wrapped, wrapped
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
args = parser.parse_args(
    ["--model", sys.argv[2], "--sink-eviction", "--sink-window", "99"]
)
config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
stream = StreamConfig.load(config.additional_config)
assert stream.window.window_tokens == 99
assert config.model_config.max_model_len == 2**31 - 1
assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[2], skip_tokenizer_init=True, enforce_eager=True,
          kv_cache_memory_bytes=1 << 27, disable_log_stats=False,
          additional_config={"sink_paged": {"sink_token_id": 7}})
prompt = {"prompt_token_ids": [256] + [5] * 299}
for max_tokens, expected in ((3, 3), (None, 255)):
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    output = llm.generate(prompt, params, use_tqdm=False)[0]
    assert output.prompt_token_ids == prompt["prompt_token_ids"]
    assert len(output.outputs[0].token_ids) == expected, output
prompt["prompt_token_ids"] = [7, 5]
params = SamplingParams(max_tokens=1, detokenize=False, prompt_logprobs=0)
given = llm.generate(prompt, params, use_tqdm=False)[0].prompt_logprobs
prompt["prompt_token_ids"] = [5, 5]
added = llm.generate(prompt, params, use_tqdm=False)[0].prompt_logprobs
assert [len(x or ()) for x in given] == [len(x or ()) for x in added] == [0, 1]
assert given != added
counts = {metric.name: metric.value for metric in llm.get_metrics()
          if "sink_paged" in metric.name}
assert counts["vllm:sink_paged_resident_tokens"] == 0
assert counts["vllm:sink_paged_tokens_evicted"] > 300 + 255 - 256
print("works unpatched")
"""


def test_diffs_replace_the_patches(tmp_path: Path) -> None:
    """Applied to a copy of the installed vLLM, nothing is wrapped and all works."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    installed = Path(spec.origin).parent
    copy = tmp_path / "vllm"
    subprocess.run(["cp", "-rs", installed, copy], check=True)
    for diff in sorted(DIFFS.glob("*.patch")):
        name = diff.read_text().splitlines()[0].removeprefix("--- a/")
        target = tmp_path / name
        source = target.resolve()
        target.unlink()
        shutil.copy(source, target)
        for cached in target.parent.glob(f"__pycache__/{target.stem}.*"):
            cached.unlink()
        subprocess.run(["git", "apply", "-p1", diff], cwd=tmp_path, check=True)
    model = Path(__file__).parent / "data" / "llama_mha"
    path = os.pathsep.join([str(tmp_path), str(PATCHES.parent)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, tmp_path, model],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "works unpatched" in done.stdout, done.stdout + done.stderr
