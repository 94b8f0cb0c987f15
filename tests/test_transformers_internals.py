"""What is known of transformers' inside: that it holds with the transformers at hand, and that one module alone knows it."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Cache, DynamicCache, StaticCache

import reflective
from reflective.engines.hf import internals

# Private names, and public ones that a release has renamed.
NAMES = (
    r"past_key_values|cache_params|layer_past|get\(\"cache\"|\[\"cache\"\]|[{,] ?\"cache\": |\(cache=|, cache=\w+[,)]|[\"'.]_compiled_call\b|is_compileable|layer_class_to_replicate|"
    r"\b_attn_implementation|_can_set_attn_implementation|_supports_default_dynamic_cache|_compile_all_devices|"
    r"_true_initial_tokens|requests_in_batch|cuda_graph_booleans|is_gradient_checkpointing|is_activation_checkpointing|"
    r"gradient_checkpointing_(en|dis)able|activation_checkpointing_(en|dis)able|cache_utils|masking_utils"
)
ROOT = Path(reflective.__file__).parent.parent


def test_nobody_else_spells_these_names():
    sources = [p for folder in ("reflective", "kernels", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")]
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the sources are not at hand")
    spelled = {p.name for p in sources if re.search(NAMES, p.read_text())}
    assert spelled == {"internals.py", Path(__file__).name} and len(sources) > 100


def test_the_tested_releases_are_those_that_pyproject_admits_and_the_docs_show():
    assert internals.is_tested()
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the sources are not at hand")
    import compat

    oldest, newest = (".".join(map(str, release)) for release in internals.TESTED)
    bounds = compat.requirements()["transformers"]
    assert bounds == f">={oldest},<{internals.TESTED[1][0] + 1}"
    tested = {row: result["transformers"] for row, result in compat.read().items()}
    assert tested["oldest"].startswith(oldest) and tested["newest"].startswith(newest)
    assert compat.BEGIN + compat.block() + compat.END in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_vl", "bloom", "peft", "wrapped"])
@torch.no_grad()
def test_a_model_is_called_on_a_cache_by_the_name_that_it_takes(kind, recwarn):
    if kind == "bloom":
        net = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=tiny.VOCAB, hidden_size=16, n_layer=2, n_head=2))
    elif kind == "peft":
        peft = pytest.importorskip("peft")
        net = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"]))
    else:
        net = tiny.model("llama" if kind == "wrapped" else kind)
    net = Wrapper(net) if kind == "wrapped" else net.eval()
    ids = torch.randint(5, tiny.VOCAB, (2, 9))
    recwarn.clear()
    whole, first = net(input_ids=ids), net(input_ids=ids[:, :5], use_cache=True)
    cache = internals.cache_of(first)
    assert cache.get_seq_length() == 5
    rest = net(input_ids=ids[:, 5:], **internals.with_cache(net, cache))
    torch.testing.assert_close(rest.logits, whole.logits[:, 5:], rtol=1e-3, atol=1e-3)
    assert internals.cache_of(rest) is cache and cache.get_seq_length() == 9
    assert not [str(w.message) for w in recwarn if issubclass(w.category, FutureWarning)]


class Wrapper(torch.nn.Module):
    """Hands everything on, as DDP does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_cache_is_known_by_what_it_is():
    cache = DynamicCache()
    assert internals.cache_in([None, torch.ones(2), {}, cache, 3]) is cache
    assert internals.cache_of((torch.ones(2), cache)) is cache and internals.cache_of((torch.ones(2),)) is None

    class Annotated(torch.nn.Module):
        def forward(self, input_ids, memory: Cache | None = None):
            pass

    class Named(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None):
            pass

    assert internals.with_cache(Annotated(), cache) == {"memory": cache}
    assert internals.with_cache(Named(), cache) == {"past_key_values": cache}
    with pytest.raises(RuntimeError, match="no forward of Linear takes a cache"):
        internals.cache_argument(torch.nn.Linear(1, 1))


def test_which_caches_count_on_the_device():
    net = tiny.model()
    assert internals.counts_on_device(StaticCache(config=net.config, max_cache_len=8))
    assert not internals.counts_on_device(DynamicCache(config=net.config))


def test_hidden_states_are_known_by_what_they_are():
    states, other = torch.ones(2, 3, 8), torch.ones(2, 3, 4)
    assert internals.state_in("x", 8, (states,), {}) is states
    assert internals.state_in("x", 8, (), {"x": states, "y": torch.ones(2, 3, 8)}) is states
    assert internals.state_in("x", 8, (other,), {"y": states}) is states
    assert internals.state_in("x", 8, (None,), {"y": states, "z": torch.ones(2, 3, 8)}) is None
    assert internals.state_in("x", 8, (other,), {}) is other


def test_checkpointing_is_switched_and_seen(recwarn):
    net = tiny.model()
    assert not internals.checkpoints(net)
    internals.set_checkpointing(net, True)
    assert internals.checkpoints(net)
    internals.set_checkpointing(net, False)
    assert not internals.checkpoints(net)
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]
