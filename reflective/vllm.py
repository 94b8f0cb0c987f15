"""Scores in a vLLM program of one's own: ``settings`` starts vLLM with a scorer, ``scores`` reads what it has found.

::

    from vllm import LLM, SamplingParams
    import reflective.vllm

    llm = LLM(**reflective.vllm.settings(PATH))
    outputs = llm.generate(prompts, SamplingParams(n=8, temperature=0.6, max_tokens=4096))
    for output, scores in zip(outputs, reflective.vllm.scores(llm, outputs)):
        print(output.outputs[scores.best()].text)

``python -m reflective.vllm serve PATH`` starts ``vllm serve`` in the same way, and without ``serve`` prints its arguments.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .checkpoints.vllm import for_vllm
from .engines.vllm.core import check_version
from .engines.vllm.options import Options, no_text
from .engines.vllm.results import collect
from .engines.vllm.worker import logs_of
from .scoring.heads import Head
from .scoring.scores import TrajectoryScores
from .scoring.steps import StepTokens

__all__ = ["ascores", "scores", "settings", "start"]

_NO_TEXT: dict[tuple[Any, ...], frozenset[int]] = {}  # tokens of no text, by model


def settings(path: str | Path, *, head: str | Path | Head | None = None, **options: Any) -> dict[str, Any]:
    """Keywords for ``vllm.LLM`` or ``AsyncEngineArgs``: ``model``, ``hf_overrides``, ``worker_extension_cls``, ``additional_config``. Others may stand
    beside them.

    Args:
        path: directory or repository of the model, and of the head unless ``head`` says otherwise; as for
            ``ReflectiveModel.from_pretrained``.
        head: a place, or a head itself, of one logit. Which layers are read, what a step's score is and how they are gathered, it says.
        options: ``rule``, ``delimiter``, ``at`` in place of what head or ``reflective.json`` say; ``max_steps``, ``backend``, ``w1_dtype``, ``prune``: see
            ``reflective.engines.vllm.options.Options``.

    Raises:
        FileNotFoundError, ValueError, PermissionError, ImportError: see ``checkpoints.vllm.for_vllm``.
    """
    found = for_vllm(path, head=head, **options)
    return {"model": str(found.model), **found.settings()}


def start(llm: Any) -> dict[str, Any]:
    """Have vLLM's first model runner score, which CPU builds use; the second one does so from its beginning. To be called before the first
    request, and harmless otherwise. Returns ``backend`` and ``runner``.

    Raises:
        Exception: of vLLM's, saying which mode is not scored.
    """
    return llm.collective_rpc("reflective_start")[0]


def scores(llm: Any, outputs: Sequence[Any], *, forget: bool = True) -> list[TrajectoryScores]:
    """Of every ``RequestOutput`` the scores of its ``outputs``, in their order.

    Args:
        llm: that generated them.
        forget: let the worker drop what it has of them. What is never asked for is dropped too, after 4,096 further requests.

    Raises:
        ValueError: outputs of another LLM, changed ones, or such whose scores were asked for before.
    """
    return _scores(
        llm.llm_engine.vllm_config, outputs, llm.collective_rpc("reflective_logs", args=(_keys(outputs), forget))
    )


async def ascores(engine: Any, outputs: Sequence[Any], *, forget: bool = True) -> list[TrajectoryScores]:
    """``scores`` for an ``AsyncLLM``."""
    answer = await engine.collective_rpc("reflective_logs", args=(_keys(outputs), forget))
    return _scores(engine.vllm_config, outputs, answer)


def _keys(outputs: Sequence[Any]) -> list[str]:
    return [output.request_id for output in outputs]


def _scores(config: Any, outputs: Sequence[Any], answer: list[Any]) -> list[TrajectoryScores]:
    options = Options.of(config.additional_config)
    steps = steps_for(config)
    by_key: dict[str, dict[int, Any]] = {}
    for log in logs_of(answer):
        index, _, rest = log.request.partition("_")
        child = index.isdigit() and not log.key.startswith(f"{index}_") and rest.startswith(log.key)
        by_key.setdefault(log.key, {})[int(index) if child else 0] = log
    found = []
    for output in outputs:
        logs = by_key.get(output.request_id, {})
        if missing := [c.index for c in output.outputs if c.index not in logs]:
            raise ValueError(
                f"outputs: request {output.request_id!r} has no scores for its outputs {missing}: they were asked for before, or are of another "
                "LLM; with CPU builds call reflective.vllm.start(llm) before the first request"
            )
        prompt = list(output.prompt_token_ids)
        found.append(
            collect(
                [logs[c.index] for c in output.outputs], [prompt + list(c.token_ids) for c in output.outputs],
                [len(prompt)] * len(output.outputs), steps, **options.reading,
            )
        )  # fmt: skip
    return found


def steps_for(config: Any) -> StepTokens:
    """The step-tokens that a vLLM with this ``vllm_config`` uses."""
    options, model = Options.of(config.additional_config), config.model_config
    return _steps(
        str(model.tokenizer), model.tokenizer_revision, model.trust_remote_code, json.dumps(options.record(), sort_keys=True),
        model.get_vocab_size(), _no_text(model) if options.at == "every" else frozenset(),
    )  # fmt: skip


def _no_text(model: Any) -> frozenset[int]:
    """Of a vLLM ``model_config``; read once, as it may lie on the Hub."""
    name = str(model.model), model.revision, model.generation_config
    if name not in _NO_TEXT:
        _NO_TEXT[name] = frozenset(no_text(model.try_get_generation_config()))
    return _NO_TEXT[name]


@lru_cache(maxsize=8)
def _steps(
    tokenizer: str, revision: str | None, trust: bool, options: str, size: int, but: frozenset[int]
) -> StepTokens:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(tokenizer, revision=revision, trust_remote_code=trust)
    return Options(**json.loads(options)).load_steps(made, size, but)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m reflective.vllm [serve] PATH [--head HEAD] [vLLM's arguments]``: start ``vllm serve`` with scores, or print its arguments, quoted
    for a shell."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    starts = given[:1] == ["serve"]
    given = given[starts:]
    head = None
    if "--head" in given[:-1]:
        at = given.index("--head")
        head = given[at + 1]
        del given[at : at + 2]
    if not given or given[0].startswith("-"):
        raise SystemExit("usage: python -m reflective.vllm [serve] PATH [--head HEAD] [arguments of vllm serve]")
    found = settings(given[0], head=head)
    words = [
        "--hf-overrides",
        json.dumps(found["hf_overrides"]),
        "--worker-extension-cls",
        found["worker_extension_cls"],
    ]
    words += ["--additional-config", json.dumps(found["additional_config"]), *given[1:]]
    if not starts:
        print(shlex.join([found["model"], *words]))
        return
    # vLLM loads plugins that add to its answers only where they are named; then all others have to be named too.
    names = {p.name for p in entry_points(group="vllm.general_plugins")} | {"reflective"}
    os.environ.setdefault("VLLM_PLUGINS", ",".join(sorted(names)))
    check_version()
    os.execv(
        sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", found["model"], *words]
    )


if __name__ == "__main__":
    main()
