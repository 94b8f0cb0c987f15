"""search-and-learn (``sal``): the process reward model of its best-of-N, beam search and DVTS.

    from reflective.integrations.search_and_learn import ReflectivePRM

    prm = ReflectivePRM(config)  # in scripts/test_time_compute.py, in place of: prm = load_prm(config)

``sal`` knows its reward models by a chain of names within ``load_prm``, so there is nothing to register with, and asks for no
base class; hence this module does not import it.
"""

from collections.abc import Sequence
from typing import Any

from ..model import ReflectiveModel
from ..serve.engine import Engine
from ..utils.arguments import brief, check_text
from . import scored


class ReflectivePRM:
    r"""What ``sal.models.reward_models.PRM`` promises, by the SPRM.

    A step is one of the SPRM's, ended by the checkpoint's own delimiter, so that ``sal``'s aggregations (last, min, prod) run
    over the scores of the definition. Text behind the last step has no score, as in ``ReflectiveModel.score``; beam search and
    DVTS cut at ``\n\n``, so a step of theirs that ends no sentence leaves the last score standing.

    Args:
        search_config: ``sal``'s Config. Read are ``prm_path``, the checkpoint; ``system_prompt`` and ``custom_chat_template``,
            with which the prompt is made as the searches make that of the generator.
        engine: of the model; None loads it from ``prm_path``.
        model_kwargs: for ``ReflectiveModel.from_pretrained``.

    Attributes:
        model, tokenizer: as every PRM of ``sal`` has them.
    """

    def __init__(self, search_config: Any, engine: Engine | None = None, **model_kwargs: Any) -> None:
        self.search_config = search_config
        self.engine = engine or Engine(ReflectiveModel.from_pretrained(search_config.prm_path, **model_kwargs))
        self.model, self.tokenizer = self.engine.model.model, self.engine.model.tokenizer

    def score(self, questions: list[str], outputs: list[list[str]]) -> list[list[list[float]]]:
        """``[question][answer][step]``, each in (0, 1), of ``outputs[question][answer]``, finished or not.

        An answer without a step, or without a valid score, is ``[0.0]``: the searches aggregate every list, and numpy's argmax
        would pick a NaN.

        Raises:
            ValueError: not as many lists of answers as questions; an answer that is no text, or that the model has no room for.
        """
        if len(questions) != len(outputs):
            raise ValueError(f"outputs: {len(outputs)} lists of answers for {len(questions)} questions; give one each")
        for i, answers in enumerate(outputs):
            if isinstance(answers, str) or not isinstance(answers, Sequence):
                raise ValueError(f"outputs[{i}]={brief(answers)}: expected the list of the answers to a question")  # noqa: TRY004
            for j, answer in enumerate(answers):
                check_text(f"outputs[{i}][{j}]", answer)
        prompts = [self.prompt(q) for q, answers in zip(questions, outputs, strict=True) for _ in answers]
        found = iter(scored(self.engine, prompts, [a for answers in outputs for a in answers]))
        return [[next(found).step_scores or [0.0] for _ in answers] for answers in outputs]

    def prompt(self, question: str) -> str:
        """What ``sal`` gives the generator for ``question``."""
        conversation = [
            {"role": "system", "content": self.search_config.system_prompt},
            {"role": "user", "content": question},
        ]
        return self.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.search_config.custom_chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
