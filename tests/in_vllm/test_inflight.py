"""The comparison's cases in a real vLLM: ours is right where hooks are not."""

import common
import pytest

from reflective.benchmarks.inflight import World, chosen, judge
from reflective.benchmarks.inflight import vllm as inflight

PLUGIN, GENERATE, HOOK, FRESH = (inflight.Plugin(common.V2), *inflight.SYSTEMS[2:])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield World(tmp_path_factory.mktemp("world"))
    inflight.STARTED.close()


def found(world, system, *names):
    return [judge(world, system, case) for case in chosen(names)]


def test_the_plugin(world):
    names = ["last-token", "prompt-steps", "tags-twice", "left-padding", "several-of-one", "prompt-cached", "shared-prefix", "stopped"]
    for name, verdict in zip(names, found(world, PLUGIN, *names), strict=True):
        assert verdict.result == "right", (name, verdict)


def test_the_plugin_where_memory_is_short_and_prompts_come_in_pieces(world):
    assert [v.result for v in found(world, PLUGIN, "prefill-in-pieces", "preemption")] == ["right", "right"]


def test_the_model(world):
    assert [v.result for v in found(world, GENERATE, "plain", "prompt-cached", "forks", "stopped")] == ["right"] * 4


def test_hooks(world):
    """Rows put one behind the other are short after a hit in the cache, unless it is not read, and too many after a preemption."""
    assert [v.result for v in found(world, HOOK, "plain", "several-of-one", "prompt-cached")] == ["right", "right", "fails"]
    assert [v.result for v in found(world, FRESH, "prompt-cached", "preemption")] == ["right", "wrong"]
