"""How tokens are drawn, against transformers' processors: from logits, by a function that can be traced whole, and by ``generate``."""

import itertools

import numpy as np
import pytest
import torch
from test_search import QUESTIONS, STEPS, Scripted, reflective_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from reflective.engines.base import Sampling
from reflective.engines.hf.sampling import Rules, Uses, _leading, chances, draw, log_probs_of, pick
from reflective.search.candidates import SAMPLING_DEFAULTS, Ask, SamplingSettings
from reflective.search.strategies import by_name

V, ENDS = 211, (2, 7)
PLAIN = Sampling((0,), 1.0, 1.0)
WAYS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_k": 3},
    {"top_k": 1},
    {"top_k": 10 * V},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 1.4},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5, "temperature": 0.0},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8, "temperature": 0.0},
    {"presence_penalty": -1.0, "frequency_penalty": -0.3, "repetition_penalty": 1.2},
    {"logit_bias": ((5, 4.5), (9, -100.0), (V - 1, 2.0))},
    {"logit_bias": ((11, 100.0),), "temperature": 0.0},
    {"min_tokens": 4},
    {"min_tokens": 50, "logit_bias": ((2, 90.0), (7, 80.0))},
    {"min_tokens": 50, "logit_bias": ((2, 90.0), (7, 80.0)), "temperature": 0.0},
    {
        "top_k": 30, "top_p": 0.8, "min_p": 0.01, "temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4,
        "frequency_penalty": 0.2, "logit_bias": ((2, 8.0), (30, 1.0)), "min_tokens": 9,
    },
]  # fmt: skip


def sampling(**settings):
    return Sampling((0,), **{"temperature": 1.0, "top_p": 1.0, **settings})


def mixed(seed, vocabulary=V, repeat=3):
    """Rows of every way: samplings, logits, uniforms, texts of different lengths."""
    g = np.random.default_rng(seed)
    samplings = [sampling(**way) for way in WAYS * repeat]
    logits = torch.from_numpy(g.normal(0, 4, (len(samplings), vocabulary))).float()
    texts = [
        ([*map(int, g.integers(0, vocabulary, 6))], [*map(int, g.integers(0, 40, i % 13))])
        for i in range(len(samplings))
    ]
    return samplings, logits, g.random(len(samplings)).tolist(), texts


def equal(a, b):
    """Whether two ``Rules`` are."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in vars(a)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def picked(samplings, logits, uniforms, texts, function=pick):
    rules = Rules.of(samplings, texts, ENDS, logits.shape[1], "cpu")
    free = torch.full((len(samplings),), -1)
    return function(logits, torch.tensor(uniforms, dtype=torch.float64), free, rules, Uses.of(samplings)).tolist()


# -- as it was, where only temperature and top-p are used ------------------------------------------------------------


def drawn_before(logits, chance, temperature, top_p):
    """As tokens were drawn before there were other settings: rows of one temperature and top-p at a time."""
    if not temperature:
        return logits.argmax(-1, keepdim=True)
    logits = TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(float(top_p))(None, logits)
    cdf = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    return torch.searchsorted(cdf, chance[:, None] * cdf[:, -1:], right=True)


@pytest.mark.parametrize("vocabulary", [1, 2, 61, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_and_top_p_give_the_tokens_that_they_gave(vocabulary, dtype):
    """In bfloat16 many logits are equal, and the order among them counts."""
    g = np.random.default_rng(vocabulary)
    ways = [
        *itertools.product((0.0, 0.1, 0.6, 0.7, 1.0, 1, 3.0, 1e9), (0.0, 1e-6, 0.3, 0.9, 0.95, 0.999999, 1.0, 1))
    ] * 4
    logits = torch.from_numpy(g.normal(0, 3, (len(ways), vocabulary))).to(dtype)
    logits[::5, : vocabulary // 2] = -torch.inf
    logits[3::7] *= 10
    uniforms = g.random(len(ways))
    uniforms[::9], uniforms[1::9] = 0.0, np.nextafter(1.0, 0.0)
    expected = torch.empty(len(ways), 1, dtype=torch.int64)
    for way in set(ways):
        rows = torch.tensor([i for i, other in enumerate(ways) if other == way])
        expected[rows] = drawn_before(logits.float()[rows], torch.from_numpy(uniforms)[rows], *way)
    expected = expected.clamp_max(vocabulary - 1).flatten().tolist()
    samplings = [Sampling((0,), *way) for way in ways]
    assert picked(samplings, logits, uniforms.tolist(), [([1], [])] * len(ways)) == expected
    alone = [picked(samplings[i : i + 1], logits[i : i + 1], [u], [([1], [])])[0] for i, u in enumerate(uniforms)]
    assert alone == expected, "whatever else is in the batch"


def test_not_a_number_ends_no_batch_and_a_temperature_of_almost_0_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0], [torch.nan] * 3, [1.0, 3.0, 2.0]])
    samplings = [sampling(temperature=1e-300), sampling(top_p=0.9), sampling(temperature=0.0)]
    assert picked(samplings, logits, [0.0, 0.5, 0.9], [([1], [])] * 3) == [1, 2, 1]


@pytest.mark.parametrize("vocabulary", [3, 127, 128, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_share_of_the_masses_is_reached_where_their_sums_reach_it(vocabulary, dtype):
    torch.manual_seed(0)
    for zeros in (0.0, 0.9, 0.999):  # such as what is cut leaves
        masses = torch.rand(50, vocabulary, dtype=dtype).pow(8).where(torch.rand(50, vocabulary) >= zeros, 0)
        masses[range(50), torch.randint(vocabulary, (50,))] = 0.5
        share = torch.cat([torch.rand(48, 1, dtype=torch.float64), torch.tensor([[0.0], [1 - 2.0**-53]])])
        upto = masses.double().cumsum(1)
        found = _leading(masses, share)
        assert (masses[range(50), found] > 0).all()
        assert torch.equal(found[:-1], (upto <= share * upto[:, -1:]).sum(1)[:-1])


# -- each setting as transformers has it -----------------------------------------------------------------------------


def reference(s, logits, uniform, text, ends=ENDS):
    """A row [V], by transformers' processors in the order of its ``generate``."""
    prompt, output = text
    steps = LogitsProcessorList()
    if s.logit_bias:
        steps.append(SequenceBiasLogitsProcessor({(t,): v for t, v in s.logit_bias}))
    if s.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.presence_penalty or s.frequency_penalty:  # as OpenAI defines them
        steps.append(
            lambda ids, scores: scores - torch.tensor([
                s.frequency_penalty * output.count(t) + s.presence_penalty * (t in output) for t in range(scores.shape[1])
            ])
        )  # fmt: skip
    if s.min_tokens:
        steps.append(MinNewTokensLengthLogitsProcessor(len(prompt), s.min_tokens, list(ends)))
    if s.temperature:
        steps.append(TemperatureLogitsWarper(s.temperature))
    if s.temperature and s.top_k:
        steps.append(TopKLogitsWarper(s.top_k))
    if s.temperature and s.top_p < 1:
        steps.append(TopPLogitsWarper(s.top_p))
    if s.temperature and s.min_p:
        steps.append(MinPLogitsWarper(s.min_p))
    scores = steps(torch.tensor([[*prompt, *output]]), logits[None].clone())[0]
    if not s.temperature:
        return int(scores.argmax())
    cdf = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    return int(torch.searchsorted(cdf, uniform * cdf[-1], right=True))


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_all_settings_in_one_call_are_drawn_as_transformers_would_each(seed):
    samplings, logits, uniforms, texts = mixed(seed)
    expected = [reference(*row) for row in zip(samplings, logits, uniforms, texts, strict=True)]
    assert picked(samplings, logits, uniforms, texts) == expected
    assert expected != picked([PLAIN] * len(samplings), logits, uniforms, texts)


@pytest.mark.parametrize("way", [w for w in WAYS if w], ids=str)
def test_a_setting_alone_is_drawn_as_transformers_would_and_matters(way):
    g = np.random.default_rng(3)
    logits, uniforms = torch.from_numpy(g.normal(0, 2, (400, V))).float(), g.random(400).tolist()
    texts = [([*map(int, g.integers(0, V, 60))], [*map(int, g.integers(0, V, i % 70))]) for i in range(400)]
    found = picked([sampling(**way)] * 400, logits, uniforms, texts)
    assert found == [reference(sampling(**way), *row) for row in zip(logits, uniforms, texts, strict=True)]
    if way != {"top_k": 10 * V} and way != {"min_tokens": 4}:
        assert found != picked([PLAIN] * 400, logits, uniforms, texts)


def test_no_end_comes_before_min_tokens_and_one_may_come_then():
    logits = torch.zeros(1, V).index_fill(1, torch.tensor(ENDS), 50.0)
    for length, ends in [(0, False), (3, False), (4, True), (5, True)]:
        for s in (sampling(min_tokens=4), sampling(min_tokens=4, temperature=0.0)):
            assert (picked([s], logits, [0.5], [([1], [9] * length)])[0] in ENDS) == ends


def test_tokens_that_are_forced_come_whatever_the_rules_say():
    samplings, logits, uniforms, texts = mixed(0)
    forced = [i if i % 2 else -1 for i in range(len(samplings))]
    found = [c.token for c in draw(logits, uniforms, forced, samplings, texts, ENDS)]
    free = picked(samplings, logits, uniforms, texts)
    assert found == [f if t < 0 else t for t, f in zip(forced, free, strict=True)]


def test_ids_beyond_the_logits_are_left_out():
    """Embeddings may have more rows than there are logits."""
    s = [sampling(repetition_penalty=3.0, frequency_penalty=1.0, logit_bias=((3, 1.0), (V, 9.0)), min_tokens=3)]
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    rules = Rules.of(s, [([4, V + 1], [V, 5])], (2, V), V, "cpu")
    assert rules.bias.nonzero().tolist() == [[0, 3]] and rules.ends.tolist() == [2]
    assert rules.seen.nonzero().tolist() == [[0, 4], [0, 5]] and rules.counts.nonzero().tolist() == [[0, 5]]
    picked(s, logits, [0.5], [([4, V + 1], [V, 5])])


# -- the likeliest tokens first ----------------------------------------------------------------------------------------


class SortedRows(TorchFunctionMode):
    """Counts rows [..., vocabulary] that are sorted."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.sort and args[0].shape[-1] == self.vocabulary:
            self.rows += len(args[0])
        return func(*args, **(kwargs or {}))


def zipf(g, rows, vocabulary, low, high):
    """Logits whose chances fall with the rank's power, of an exponent between ``low`` and ``high``, as they do behind text."""
    falling = -np.log1p(np.arange(vocabulary)) * g.uniform(low, high, (rows, 1)) + g.normal(0, 0.3, (rows, vocabulary))
    return torch.from_numpy(g.permuted(falling, axis=1)).float()


def both_ways(samplings, logits, uniforms, forced=None, texts=None):
    """Tokens, the same whether the heads are looked at first or not, and how many rows were sorted where they were."""
    n, vocabulary = logits.shape
    rules = Rules.of(samplings, texts or [([1], [])] * n, ENDS, vocabulary, "cpu")
    rows = logits, torch.as_tensor(uniforms, dtype=torch.float64), torch.tensor(forced or [-1] * n)
    expected = pick(*rows, rules, Uses.of(samplings))
    with SortedRows(vocabulary) as count:
        found = pick(*rows, rules, Uses.of(samplings), head_first=True)
    assert found.tolist() == expected.tolist()
    return expected.tolist(), count.rows


TOP_PS = (0.01, 0.1, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "repeat"), [(257, 6), (3000, 6), (49152, 1)])
def test_heads_first_gives_the_same_tokens(vocabulary, repeat, dtype):
    """In bfloat16 many logits are equal. Settings of all kinds side by side, greedy and forced rows among them."""
    g = np.random.default_rng(vocabulary)
    ways = [{"temperature": t, "top_p": p} for t in (0.2, 0.6, 1.0, 1.7) for p in TOP_PS]
    ways += [
        {**WAYS[i], "top_p": p, "temperature": t}
        for i in range(len(WAYS)) for p, t in ((1.0, 1.0), (0.9, 0.7), (0.4, 1.3), (0.9, 0.0))
    ]  # fmt: skip
    ways += [{"top_k": k, "top_p": p} for k in (1, 100, 255, 256, 257, 2999) for p in (0.5, 0.95, 1.0)]
    samplings = [sampling(**way) for way in ways] * repeat
    n = len(samplings)
    texts = [([*map(int, g.integers(0, 200, 6))], [*map(int, g.integers(0, 40, i % 13))]) for i in range(n)]
    for low, high in ((0.9, 4.0), (0.0, 0.2)):
        logits = zipf(g, n, vocabulary, low, high)
        logits[::11, ::2] = -torch.inf
        uniforms = g.random(n)
        uniforms[::9], uniforms[1::9] = 0.0, np.nextafter(1.0, 0.0)
        both_ways(samplings, logits.to(dtype), uniforms, [5 if i % 17 == 0 else -1 for i in range(n)], texts)


def test_peaked_rows_are_not_sorted_and_others_are():
    g = np.random.default_rng(1)
    n, vocabulary = 1000, 5000
    peaked, flat, uniforms = zipf(g, n, vocabulary, 2.0, 6.0), zipf(g, n, vocabulary, 0.0, 0.5), g.random(n)
    for way in ({"temperature": 0.6, "top_p": 0.95}, {"top_p": 0.5}, {"top_p": 0.95, "top_k": 20}, {"min_p": 0.05}):
        tokens, rows = both_ways([sampling(**way)] * n, peaked, uniforms)
        assert rows < n / 50 and len({*tokens}) > n / 10
        _, rows = both_ways([sampling(temperature=0.0), sampling(**way)] * (n // 2), peaked, uniforms)
        assert rows < n / 50, "greedy rows neither"
    _, rows = both_ways([sampling(top_p=0.95)] * n, flat, uniforms)
    assert rows == n
    mixed = torch.stack([peaked[: n // 2], flat[: n // 2]], 1).flatten(0, 1)
    _, rows = both_ways([sampling(top_p=0.9)] * n, mixed, uniforms)
    assert n / 2 <= rows < n / 2 + n / 50
    with SortedRows(vocabulary) as count:
        draw(peaked, uniforms.tolist(), [-1] * n, [sampling(top_p=0.9)] * n, [([1], [])] * n, ENDS)
    assert count.rows < n / 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_first_on_every_edge(dtype):
    """What is kept ends exactly at a token, one rounding below it or above; uniforms are exactly where one token follows another, too."""
    g = np.random.default_rng(2)
    vocabulary, each = 4000, 8
    logits = zipf(g, 30, vocabulary, 1.0, 4.0).to(dtype)
    upto = logits.float().sort().values.softmax(-1).cumsum(-1)
    for place in (2, 3, 5, 9, 30):
        edge = upto[:, -place]
        for most in (edge, edge.nextafter(torch.tensor(0.0)), edge.nextafter(torch.tensor(1.0))):
            assert torch.equal((1 - (1 - most.double())).float(), most)
            samplings = [sampling(top_p=p) for p in (1 - most.double()).tolist() for _ in range(each)]
            both_ways(samplings, logits.repeat_interleave(each, 0), g.random(30 * each))
    for way, warper in (
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)), ({"top_k": 40}, TopKLogitsWarper(40)), ({"min_p": 0.03}, MinPLogitsWarper(0.03)),
    ):  # fmt: skip
        for row in logits.float():
            cdf = warper(None, row[None])[0].softmax(-1, dtype=torch.float64).cumsum(-1)
            ends = (cdf / cdf[-1]).unique()
            ends = torch.cat([ends, ends.nextafter(torch.zeros(1).double()), ends.nextafter(torch.ones(1).double())])
            ends = ends[ends < 1]
            both_ways([sampling(**way)] * len(ends), row.expand(len(ends), -1), ends)
    likeliest = logits.float().topk(10).values
    least = (likeliest - likeliest[:, :1]).exp()[:, [1, 2, 5, 9]].flatten()
    both_ways(
        [sampling(min_p=p) for p in least.tolist() for _ in range(each)],
        logits.repeat_interleave(4 * each, 0), g.random(120 * each),
    )  # fmt: skip


def test_what_is_not_finite_is_drawn_as_ever():
    logits = zipf(np.random.default_rng(4), 8, 1000, 2.0, 4.0)
    logits[0, 7], logits[1, 7], logits[2], logits[3], logits[4, 30:] = (
        torch.nan,
        torch.inf,
        torch.nan,
        -torch.inf,
        -torch.inf,
    )
    logits[5], logits[6] = torch.inf, 3e38
    for way in ({"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"top_p": 0.9, "temperature": 1e-37}, {"top_p": 0.0}):
        both_ways([sampling(**way)] * 8, logits, [0.5] * 8)


# -- the tensors that go along -----------------------------------------------------------------------------------------


def test_rules_that_took_tokens_are_those_of_the_longer_texts():
    samplings, logits, uniforms, texts = mixed(5)
    rules = Rules.of(samplings, texts, ENDS, V, "cpu")
    texts = [(prompt, list(output)) for prompt, output in texts]
    for i in range(6):
        u, free = torch.tensor(uniforms, dtype=torch.float64), torch.full((len(samplings),), -1)
        tokens = pick(logits.roll(i, 1), u, free, rules, Uses.of(samplings))
        rules.took(tokens)
        for (_, output), token in zip(texts, tokens.tolist(), strict=True):
            output.append(token)
    assert equal(rules, Rules.of(samplings, texts, ENDS, V, "cpu"))


def test_what_no_row_needs_is_not_there():
    samplings = [Sampling((0,)), Sampling((0,), temperature=0.0)]
    rules = Rules.of(samplings, [([1], [])] * 2, ENDS, V, "cpu")
    assert rules.bias is None and rules.seen is None and rules.counts is None
    assert Uses.of(samplings) == Uses(draws=True, greedy=True, top_p=True)
    assert Uses.of(samplings[1:]) == Uses(draws=False, greedy=True)


@pytest.mark.parametrize("k", [0, 5, 2 * V])
def test_chances_are_of_the_raw_logits(k):
    samplings, logits, uniforms, texts = mixed(1, repeat=1)
    found = draw(logits, uniforms, [-1] * len(texts), samplings, texts, ENDS)
    tokens = torch.tensor([c.token for c in found])
    log_probs = logits.log_softmax(-1)
    assert [c.log_prob for c in found] == pytest.approx(
        log_probs.gather(1, tokens[:, None]).flatten().tolist(), abs=1e-5
    )
    most = [None if i % 3 == 0 else min(i, k) for i in range(len(tokens))]
    for c, m, row in zip(chances(logits, tokens, most), most, log_probs, strict=True):
        assert [t for t, _ in c.top] == row.argsort(descending=True)[: m or 0].tolist()
        assert [p for _, p in c.top] == pytest.approx(row.sort(descending=True).values[: m or 0].tolist(), abs=1e-5)


# -- a function of fixed shape -----------------------------------------------------------------------------------------


def step(logits, uniforms, forced, rules, uses, k=4):
    tokens = pick(logits, uniforms, forced, rules, uses)
    rules.took(tokens)
    return tokens, log_probs_of(logits, tokens, k)


SETS = {
    "all": WAYS,
    "plain": [{}],
    "greedy": [{"temperature": 0.0}],
    "published": [{"temperature": 0.6, "top_p": 0.95}],
}


@pytest.mark.parametrize("name", SETS)
def test_it_is_traced_whole(name):
    """With what comes out of tracing, no other tokens are drawn."""
    samplings = [sampling(**way) for way in SETS[name]] * 2
    _, logits, uniforms, texts = mixed(2)
    n, traced = len(samplings), torch.compile(step, fullgraph=True, backend="aot_eager")
    logits, uniforms, texts = logits[:n], torch.tensor(uniforms[:n], dtype=torch.float64), texts[:n]
    ours, theirs = (Rules.of(samplings, texts, ENDS, V, "cpu") for _ in range(2))
    for i in range(3):
        free = torch.full((n,), -1)
        expected, likely = step(logits.roll(i, 1), uniforms, free, ours, Uses.of(samplings))
        found, others = traced(logits.roll(i, 1), uniforms, free, theirs, Uses.of(samplings))
        assert found.tolist() == expected.tolist()
        assert all(torch.equal(a, b) for a, b in zip(likely, others, strict=True))
    assert equal(ours, theirs)


def test_nothing_is_read_back():
    """Fake tensors have no values: whoever asks for one fails."""
    samplings, _, _, texts = mixed(2)
    rules = Rules.of(samplings, texts, ENDS, V, "cpu")
    with FakeTensorMode() as fake:
        hidden = Rules(**{name: fake.from_tensor(value) for name, value in vars(rules).items()})
        n = len(samplings)
        tokens, likely = step(
            torch.empty(n, V, dtype=torch.bfloat16), torch.empty(n, dtype=torch.float64), torch.full((n,), -1), hidden, Uses.of(samplings)
        )  # fmt: skip
        assert tokens.shape == (n,) and tokens.dtype == torch.int64 and likely.top.shape == (n, 4)
        with pytest.raises(Exception, match="scalar"):
            tokens.tolist()


# -- candidates --------------------------------------------------------------------------------------------------------


def alone(model, prompt, s, seed, number, limit, begun=()):
    """The tokens of a candidate by ``reference``, one whole forward a token; ``begun``: those that a fork has from its parent."""
    ids, random = list(begun), np.random.default_rng([seed, 0, number])
    while len(ids) < limit:
        with torch.no_grad():
            logits = model.model(torch.tensor([prompt + ids])).logits[0, -1].float()
        token = reference(s, logits, random.random(), (prompt, ids), [2])
        if token == 2:
            break
        ids.append(token)
    return ids


ASKED = [
    {"top_k": 5},
    {"min_p": 0.3, "temperature": 1.5},
    {"repetition_penalty": 1.8},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"logit_bias": {9: 3.0, 2: -4.0, 30: 2.5}},
    {"min_tokens": 20, "logit_bias": {2: 3.0}},
    {
        "top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.2, "repetition_penalty": 1.1, "presence_penalty": -0.5,
        "frequency_penalty": 0.3, "logit_bias": {40: 1.0}, "min_tokens": 6,
    },
]  # fmt: skip


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_candidates_are_drawn_as_transformers_would(asked):
    model, settings = reflective_model(), {"n": 4, "seed": 3, "max_new_tokens": 30, "temperature": 1.0, "top_p": 1.0}
    found = model.generate(QUESTIONS[0], **settings | asked)
    given = {name: value for name, value in asked.items() if name != "logit_bias"}
    s = sampling(logit_bias=tuple(asked.get("logit_bias", {}).items()), **given)
    prompt = model.encode(QUESTIONS[0])[0].tolist()
    for c in found.candidates:
        assert c.token_ids == alone(model, prompt, s, 3, c.number, 30)
        with torch.no_grad():
            expected = model.model(torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        told = sum(float(expected[i, t]) for i, t in enumerate(c.token_ids))
        ended = c.status == "stop" and float(expected[len(c.token_ids), 2])
        assert c.log_prob == pytest.approx(told + ended, rel=1e-3), "of the model's logits as they are"
    plain = model.generate(QUESTIONS[0], **settings)
    assert [c.token_ids for c in found.candidates] != [c.token_ids for c in plain.candidates]


def test_every_candidate_has_its_temperature():
    model, settings = reflective_model(), {"n": 5, "seed": 4, "max_new_tokens": 20, "top_p": 0.9}
    found = model.generate(QUESTIONS, temperature=[1.0, 0.0, 2.0], **settings)
    for t, numbers in {1.0: (0, 3), 0.0: (1, 4), 2.0: (2,)}.items():
        for generation, expected in zip(found, model.generate(QUESTIONS, temperature=t, **settings), strict=True):
            for c in numbers:
                assert generation.candidates[c].token_ids == expected.candidates[c].token_ids


def test_a_fork_goes_on_at_its_parents_temperature_and_with_its_tokens():
    model, seen, given = reflective_model(), {}, {"top_p": 1.0, "repetition_penalty": 1.3, "presence_penalty": 2.0}

    def look(questions):
        seen.update({c.number: (c.parent, c.temperature) for candidates in questions for c in candidates})

    # Whoever is shown at the first two turns is forked.
    strategy = Scripted(turns=[dict.fromkeys(range(3), 2), dict.fromkeys(range(6), 2)], n=3, by_step=True)
    settings = {"temperature": [1.0, 2.0, 0.7], "seed": 1, "max_new_tokens": 25, **given}
    found = model.generate(QUESTIONS[0], strategy=strategy, on_step=look, **settings)
    forks = [(t, seen[parent][1]) for parent, t in seen.values() if parent is not None]
    assert len({t for t, _ in forks}) > 1 and all(own == parents for own, parents in forks)
    prompt, behind = model.encode(QUESTIONS[0])[0].tolist(), 0
    for c in found.candidates:
        begin = len(c.token_ids) + (c.status == "stop") - c.tokens
        behind += c.tokens if begin else 0
        s = sampling(temperature=seen[c.number][1], **given)
        expected = alone(model, prompt, s, 1, c.number, len(c.token_ids), c.token_ids[:begin])
        assert c.token_ids == expected
    assert behind > 50


def test_min_tokens_hold_back_the_end_token_and_no_stop_text():
    model = reflective_model()
    settings = {"seed": 0, "n": 6, "max_new_tokens": 40, "logit_bias": {2: 8.0}, "temperature": 1.0}
    assert all(len(c.token_ids) < 12 for c in model.generate("ABC", **settings).candidates)
    held = model.generate("ABC", min_tokens=12, **settings).candidates
    assert all(len(c.token_ids) >= 12 for c in held) and any(len(c.token_ids) == 12 for c in held)
    stopped = model.generate("ABC", min_tokens=12, stop=STEPS, **settings).candidates
    assert any(len(c.token_ids) < 12 for c in stopped)


def test_the_settings_of_all_doors_are_those_of_an_ask():
    assert SAMPLING_DEFAULTS.keys() == SamplingSettings.__annotations__.keys()
    plain = Ask([5], by_name("best_of_n", n=1)).sampling(0, SAMPLING_DEFAULTS["temperature"])
    assert plain == Sampling((0, 0, 0)), "the same defaults on both sides of the engines' door"
    asked = {name: 1 for name in SAMPLING_DEFAULTS} | {"logit_bias": {3: 1.0}}
    full = Ask([5], by_name("best_of_n", n=1), **asked).sampling(0, 1)
    assert all(getattr(full, name) == 1 for name in asked if name != "logit_bias") and full.logit_bias == ((3, 1.0),)
