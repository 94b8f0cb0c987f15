"""Attention on prompts that several seats share, against the same on a copy for each."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from reflective.engines.hf.attention import Shared, Unseatable, attend

S, HEADS, GROUPS, D, C = 5, 6, 2, 16, 9
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def inputs(dtype, device):
    torch.manual_seed(0)
    # Large enough that a score rounded to 16 bits would be seen.
    query, key, value = (4 * torch.randn(S, n, length, D) for n, length in ((HEADS, 1), (GROUPS, C), (GROUPS, C)))
    prompts = [(4 * torch.randn(GROUPS, P, D), torch.randn(GROUPS, P, D)) for P in (40, 1, 130)]
    length = torch.tensor([0, 3, 8, 2, 5])
    reads = torch.tensor([0, 2, -1, 0, 1])
    to = lambda x: x.to(device, dtype)
    return to(query), to(key), to(value), [(to(k), to(v)) for k, v in prompts], length.to(device), reads.to(device)


def added(length, dtype):
    """The mask [S, 1, 1, C] of seats of so many tokens before the one that is fed."""
    there = torch.arange(C, device=length.device) <= length[:, None]
    return torch.zeros(S, C, dtype=dtype, device=length.device).masked_fill(~there, -torch.inf)[:, None, None]


def expected(query, key, value, prompts, length, reads):
    """In float64, one seat after the other."""
    rows = []
    for i in range(S):
        k, v = key[i, :, : length[i] + 1], value[i, :, : length[i] + 1]
        if reads[i] >= 0:
            k, v = (torch.cat(pair, 1) for pair in zip(prompts[reads[i]], (k, v), strict=True))
        k, v = (x.double().repeat_interleave(HEADS // GROUPS, 0) for x in (k, v))
        rows.append(scaled_dot_product_attention(query[i].double(), k, v).transpose(0, 1))
    return torch.stack(rows)


def plain(query, key, value, prompts, length, reads):
    """The same in the dtype of ``query``, with the scores of transformers' eager attention."""
    rows = []
    for i in range(S):
        k, v = key[i, :, : length[i] + 1], value[i, :, : length[i] + 1]
        if reads[i] >= 0:
            k, v = (torch.cat(pair, 1) for pair in zip(prompts[reads[i]], (k, v), strict=True))
        k, v = (x.repeat_interleave(HEADS // GROUPS, 0) for x in (k, v))
        scores = query[i] @ k.transpose(1, 2) * D**-0.5
        rows.append((scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(0, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_as_on_a_copy_for_each(dtype, device):
    query, key, value, prompts, length, reads = given = inputs(dtype, device)
    mask = added(length, dtype)
    module = SimpleNamespace(layer_idx=1)
    found, _ = attend(module, query, key, value, mask, shared_prompts=Shared([[], prompts], reads))
    assert found.dtype == dtype and found.shape == (S, 1, HEADS, D)
    truth = expected(*given)
    error, theirs = ((x.double() - truth).pow(2).mean().sqrt() for x in (found, plain(*given)))
    assert error <= 2 * theirs + 1e-12


def test_scores_are_not_rounded_to_16_bits():
    query, key, value, prompts, length, reads = given = inputs(torch.bfloat16, "cpu")
    mask = added(length, query.dtype)
    found, _ = attend(SimpleNamespace(layer_idx=0), query, key, value, mask, shared_prompts=Shared([prompts], reads))
    truth = expected(*given)
    error, theirs = ((x.double() - truth).pow(2).mean().sqrt() for x in (found, plain(*given)))
    assert error < theirs / 2


def test_a_prompt_of_others_has_no_weight_however_well_it_fits():
    query, key, value, prompts, length, reads = given = inputs(torch.float32, "cpu")
    mask = added(length, query.dtype)
    shared = [prompts[0], (1000 * prompts[1][0], prompts[1][1]), prompts[2]]
    found, _ = attend(SimpleNamespace(layer_idx=0), query, key, value, mask, shared_prompts=Shared([shared], reads))
    others = reads != 1
    torch.testing.assert_close(found[others], expected(*given)[others].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"softcap": 30.0}, {"sliding_window": 8}, {"s_aux": torch.ones(6)}])
def test_what_it_does_not_know_is_refused(wrong):
    query, key, value, *_ = inputs(torch.float32, "cpu")
    mask = torch.zeros(S, 1, 1, C)
    with pytest.raises(Unseatable, match=f"Linear attends with {next(iter(wrong))}"):
        attend(nn.Linear(1, 1), query, key, value, mask, **wrong)
