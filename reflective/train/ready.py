"""What a head learns that is to say whether thinking may end: at each step, whether the answer is there already."""

import torch

from ..model import ReflectiveModel
from ..search.results import Candidate, Generation
from ..search.strategies.votes import same_answer
from .data import Rollouts


def readiness(model: ReflectiveModel, rollouts: Rollouts, *, batch_rows: int | None = None) -> Rollouts:
    """Each step of ``rollouts`` as a response of its own, which is right if thinking that ends there gives the same answer as the whole.

    A head that ``fit`` makes of it is one for ``strategy="exit"``: its score of a step is how likely more thinking changes nothing. Steps are
    weighed within questions as responses are, so that it cannot learn which questions are short.

    Source: LYNX (arXiv 2512.05325), section 3: labels from answers that are forced at cue tokens.

    Args:
        rollouts: M steps with features; responses without an answer are left out.
        batch_rows: see ``ReflectiveModel.forced_answers``, which asks for one answer a step.

    Returns:
        M trajectories at most, each of one step, of tokens up to it.

    Raises:
        ValueError: rollouts without features, or see ``ReflectiveModel.forced_answers``.
    """
    if rollouts.features is None:
        raise ValueError("rollouts: no features; record them, as roll_out does")
    steps = torch.bincount(rollouts.trajectory, minlength=len(rollouts)).tolist()
    made = [_generation(model, rollouts, i, n) for i, n in enumerate(steps)]
    forced = model.forced_answers(made, batch_rows=batch_rows)
    ready, whole = [], []
    for generation, early in zip(made, forced, strict=True):
        answer = generation.best.answer
        whole += [answer is not None] * len(early[0])
        ready += [float(answer is not None and given is not None and same_answer(given, answer)) for given in early[0]]
    return _by_step(rollouts, torch.tensor(ready)).select(torch.tensor(whole, dtype=torch.bool))


def _generation(model: ReflectiveModel, rollouts: Rollouts, i: int, steps: int) -> Generation:
    ids, cut = rollouts.ids(i).tolist(), int(rollouts.prompt_length[i])
    text = model.decode(ids[cut:])
    response = Candidate(text, 0.0, [0.0] * steps, [], ids[cut:], model.answer(text))
    return Generation(model.decode(ids[:cut], special=True), [response], response)


def _by_step(rollouts: Rollouts, outcome: torch.Tensor) -> Rollouts:
    owner, position = rollouts.trajectory, rollouts.position
    tokens = [rollouts.ids(i)[: at + 1] for i, at in zip(owner.tolist(), position.tolist(), strict=True)]
    return Rollouts(
        tokens=torch.cat(tokens) if tokens else rollouts.tokens[:0], length=position + 1, prompt_length=rollouts.prompt_length[owner],
        question=rollouts.question[owner], outcome=outcome, answer=torch.full_like(owner, -1), count=rollouts.count[owner],
        features=rollouts.features, trajectory=torch.arange(len(owner)), position=position, tap=rollouts.tap, model=rollouts.model,
    )  # fmt: skip
