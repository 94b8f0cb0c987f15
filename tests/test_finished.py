"""rf.score on finished text: every padding and batching, and what must be refused."""

import copy
import itertools

import pytest
import tiny
import torch

import reflective as rf
from reflective.engines.hf import finished
from reflective.utils.lengths import FORWARD, batches_by_length


def trajectories(lengths=(40, 7, 23, 40, 3, 64), seed=0):
    torch.manual_seed(seed)
    return [torch.randint(5, tiny.VOCAB, (n,)) for n in lengths]


def padded(rows, side):
    ids = torch.full((len(rows), max(map(len, rows)) + 3), tiny.PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        begin = ids.shape[1] - len(row) if side == "left" else 0
        ids[i, begin : begin + len(row)], mask[i, begin : begin + len(row)] = row, 1
    return ids, mask


@pytest.mark.parametrize("at", ["predict", "token"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_agrees_with_a_second_pass_alone(kind, at):
    net, head, rows = tiny.model(kind), tiny.head(), trajectories()
    exact, exact_head = copy.deepcopy(net).double(), copy.deepcopy(head).double()
    ours = theirs = 0.0
    scores = rf.score(net, head, tiny.steps(), rows, at=at)
    for i, row in enumerate(rows):
        ids = row.tolist()
        truth = tiny.second_pass(exact, exact_head, ids, at)
        assert scores.step_positions[i].tolist() == tiny.expected_steps(ids)
        if len(truth):
            ours = max(ours, float((scores.step_scores[i].log() - truth).abs().max()))
            theirs = max(theirs, float((tiny.second_pass(net, head, ids, at) - truth).abs().max()))
            assert float(scores.score[i]) == pytest.approx(tiny.geometric_mean(truth), rel=1e-4)
    assert ours <= 2 * theirs + 1e-6


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batching_do_not_matter(side, batch_tokens):
    net, head, rows = tiny.model(), tiny.head(), trajectories()
    alone = [rf.score(net, head, tiny.steps(), [row]) for row in rows]
    ids, mask = padded(rows, side)
    together = rf.score(net, head, tiny.steps(), ids, mask, batch_tokens=batch_tokens)
    for i, (one, row) in enumerate(zip(alone, rows, strict=True)):
        shift = ids.shape[1] - len(row) if side == "left" else 0
        assert together.step_positions[i].tolist() == (one.step_positions[0] + shift).tolist()
        torch.testing.assert_close(together.step_scores[i], one.step_scores[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.score[i], one.score[0], rtol=1e-4, atol=1e-6)


def test_prompt_lengths_bound_the_scope():
    net, head, rows = tiny.model(), tiny.head(), trajectories()
    ids, mask = padded(rows, "left")
    lengths = [20, 3, 0, 40, 2, 64]
    scores = rf.score(net, head, tiny.steps(), ids, mask, prompt_lengths=lengths)
    for i, row in enumerate(rows):
        shift = ids.shape[1] - len(row)
        assert scores.step_positions[i].tolist() == [t + shift for t in tiny.expected_steps(row.tolist(), lengths[i])]
    assert scores.score[3] == 0 and scores.n_steps[3] == 0


def test_only_the_layers_below_the_last_run():
    net, ran = tiny.model(), []
    for name, module in net.named_modules():
        module.register_forward_hook(lambda *args, name=name: ran.append(name))
    rf.score(net, tiny.head(), tiny.steps(), trajectories())
    assert "model.layers.2" in ran
    assert not {"model.layers.3", "model.norm", "lm_head"} & set(ran)


def test_a_nonfinite_state_spoils_its_own_sequence_only():
    net, head, rows = tiny.model(), tiny.head(), trajectories((40, 40))
    with torch.no_grad():
        rows[0][rows[0] == 9], rows[1][6] = 8, 9
        net.model.embed_tokens.weight[9] = float("nan")
    with pytest.warns(rf.NonFiniteWarning, match="sequence 1: the hidden state at column"):
        scores = rf.score(net, head, tiny.steps(), rows)
    assert scores.score[1].isnan() and 0 < scores.score[0] < 1
    assert list(scores.errors) == [1]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([], None, "at least one sequence"),
        ([[5, 6], []], None, "at least one token id"),
        ([[5, tiny.VOCAB]], None, rf"{tiny.VOCAB}"),
        ([[5, -1]], None, "-1"),
        (torch.full((1, 4), 7), torch.tensor([[1, 0, 1, 1]]), "attention_mask"),
        (torch.full((2, 4), 7), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "attention_mask|padding"),
        (torch.empty(0, 4, dtype=torch.long), None, "input_ids"),
    ],
)
def test_bad_input_is_named(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        rf.score(tiny.model(), tiny.head(), tiny.steps(), ids, mask)


class Mixing(torch.nn.Module):
    """Looks like an MLP, but each token sees the one before it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + x.roll(1, 1))


@pytest.mark.parametrize("mixing", [False, True])
def test_mlps_in_pieces_change_nothing(monkeypatch, mixing):
    net, head, rows = tiny.model(), tiny.head(), trajectories((90, 61))
    if mixing:
        net.model.layers[1].mlp = Mixing(net.model.layers[1].mlp)
    whole = rf.score(net, head, tiny.steps(), rows, batch_tokens=1)
    calls = []
    net.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    monkeypatch.setattr("reflective.engines.hf.pieces._PIECE", 16)
    pieces = rf.score(net, head, tiny.steps(), rows, batch_tokens=1)
    assert max(calls) == 16
    torch.testing.assert_close(pieces.score, whole.score, rtol=1e-5, atol=1e-7)
    assert not any("forward" in layer.mlp.__dict__ for layer in net.model.layers)


@pytest.mark.parametrize("batch_tokens", [1, 60, 300, 10_000])
def test_groups_by_length_cost_the_least(batch_tokens):
    lengths = [7, 90, 3, 300, 88, 12, 150, 9]

    def cost(groups):
        return sum(len(g) * max(lengths[i] for i in g) + FORWARD for g in groups)

    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, 8), k) for k in range(8))
    every = [[order[a:b] for a, b in itertools.pairwise([0, *cut, 8])] for cut in cuts]
    allowed = [
        groups for groups in every
        if all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= batch_tokens for g in groups)
    ]  # fmt: skip
    found = batches_by_length(lengths, batch_tokens)
    assert found in allowed and cost(found) == min(map(cost, allowed))


@pytest.mark.parametrize("at", ["predict", "token"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral_sliding", "qwen2_vl"])
def test_a_text_read_in_pieces_has_the_scores_of_the_whole(kind, at):
    net, head, steps = tiny.model(kind), tiny.head(), tiny.steps()
    ids = torch.randint(5, tiny.VOCAB, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    for prompt in (0, 7):
        whole = rf.score(net, head, steps, [ids], at=at, prompt_lengths=[prompt])
        for piece in (13, 90):
            reading = finished.Reading(net, head, steps, ids, at, prompt)
            pieces = 0
            while reading.left:
                reading.read(piece)
                pieces += 1
            scores = reading.scores()
            assert pieces > 3 or piece == 90
            assert torch.equal(scores.step_positions[0], whole.step_positions[0])
            torch.testing.assert_close(scores.step_scores[0], whole.step_scores[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scores.score, whole.score, rtol=1e-4, atol=1e-5)


def test_a_text_without_a_step_is_read_at_once():
    reading = finished.Reading(tiny.model(), tiny.head(), tiny.steps(), [5, 6, 7])
    assert reading.left == 0 and float(reading.scores().score[0]) == 0
