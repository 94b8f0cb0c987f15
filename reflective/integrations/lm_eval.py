"""lm-evaluation-harness: best of N as a model called ``reflective``.

    python -m reflective.integrations.lm_eval --model reflective --model_args pretrained=PATH,effort=medium --tasks gsm8k

is the harness's own command line with this model registered; in Python, importing this module registers it for
``lm_eval.simple_evaluate(model="reflective", model_args={"pretrained": PATH, "effort": "medium"}, ...)``.

Written for lm_eval 0.4.13, which looks for no plugins.
"""

import collections
import dataclasses
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from ..model import Generation, ReflectiveModel
from ..search.candidates import Ask, Question, SamplingSettings
from ..search.loop import Search
from ..search.strategies import Strategy, observes
from ..utils.arguments import whole

_LOADING = (
    "autogptq", "backend", "delta", "gguf_file", "gptqmodel", "parallelize", "peft", "subfolder", "tokenizer", "tp_plan",
    "trust_remote_code", "use_fast_tokenizer",
)  # fmt: skip


@register_model("reflective")
class ReflectiveLM(HFLM):
    """``generate_until`` answers with the candidate that the strategy chooses by the SPRM's scores; likelihoods are those of the
    model, as ``HFLM`` has them.

    A request's context is the prompt as it is: neither the checkpoint's prompt nor its stop pattern is used. Its ``until`` and
    ``max_gen_toks`` count; how to sample, and how many, is said here, for a task's greedy decoding would make every candidate the
    same. A request draws from a seed made of ``seed``, its context and how many like it came before, so its answer is the
    same whatever else is evaluated beside it.

    Started by ``accelerate launch`` every process takes a share of the requests.

    Args:
        pretrained, head, dtype, revision: as for ``ReflectiveModel.from_pretrained``; or a ``ReflectiveModel``.
        device: of the model. device_map: in its place, for several devices.
        effort, strategy, n, thinking_budget, batch_rows: as for ``ReflectiveModel.generate``.
        batch_size: of likelihoods alone. Questions that wait for a place in ``batch_rows`` take it as it falls free.
        **settings: ``temperature``, ``top_p`` and the other settings of sampling, as for ``ReflectiveModel.generate``; all else is of
            ``HFLM``, but for what loads a model.

    Raises:
        ValueError: an argument that loads a model otherwise; unknown effort or strategy; others: see
            ``ReflectiveModel.from_pretrained``.
    """

    def __init__(
        self,
        pretrained: str | Path | ReflectiveModel,
        head: str | None = None,
        *,
        effort: str | None = None,
        strategy: Strategy | str | None = None,
        n: int | None = None,
        seed: int = 0,
        thinking_budget: int | None = None,
        batch_rows: int = 64,
        dtype: torch.dtype | str = "auto",
        device: str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        **settings: Any,
    ) -> None:
        refused = sorted(name for name in _LOADING if settings.get(name))
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: load the model yourself, and give ReflectiveLM the ReflectiveModel"
            )
        processes = Accelerator()
        if isinstance(pretrained, ReflectiveModel):
            model = pretrained
        else:
            if processes.num_processes > 1:
                device = processes.device
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model = ReflectiveModel.from_pretrained(
                pretrained, head=head, dtype=dtype, device_map=device_map or device, revision=revision
            )
        self.reflective = ReflectiveModel(
            model.model, model.tokenizer, model.head,
            dataclasses.replace(model.config, stop=None), model.home,
        )  # fmt: skip
        self.strategy = model.strategy(strategy, effort, n)
        sampling = {name: settings.pop(name) for name in SamplingSettings.__annotations__ if name in settings}
        self.sampling = {**sampling, "thinking_budget": thinking_budget}
        model.check_sampling(Ask([0], self.strategy, **self.sampling))
        self.seed, self.batch_rows = seed, batch_rows
        super().__init__(model.model, tokenizer=model.tokenizer, revision=revision, **settings)
        self.pretrained = model.model.name_or_path
        if processes.num_processes > 1:
            self.accelerator, self._rank, self._world_size = processes, processes.process_index, processes.num_processes

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The chosen candidate's text for each request, without what stopped it.

        An answer is in the harness's cache as soon as it is found.

        Raises:
            ValueError: ``max_gen_toks`` that leave no room for a context; another bad ``until``.
            KeyboardInterrupt: after Ctrl-C; half of an answer is none.
        """
        seen: collections.Counter[str] = collections.Counter()
        asks, answers = [], {}
        for request in requests:
            context, given = request.args
            asks.append(self._ask(context, given, seen[context]))
            seen[context] += 1
        places = {id(ask): i for i, ask in enumerate(asks)}
        looked_at = observes(self.strategy)
        engine = self.reflective.engine(
            batch_rows=self.batch_rows, schedule="immediate" if looked_at else "deferred",
            max_steps=max((a.max_new_tokens for a in asks), default=1),
        )  # fmt: skip
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Choosing among candidates") as bar:

            def ended(question: Question) -> None:
                i = places[id(question.ask)]
                answers[i] = self._text(self.reflective.generation("", question), list(question.ask.stop))
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update()

            Search(engine, self.reflective.reader, on_end=ended).run(asks)
        if len(answers) < len(requests):
            raise KeyboardInterrupt
        return [answers[i] for i in range(len(requests))]

    def _ask(self, context: str, given: dict[str, Any], repeat: int) -> Ask:
        given = normalize_gen_kwargs(given, self.max_gen_toks)
        whole("max_gen_toks", given["max_gen_toks"], 1)
        room = self.max_length - given["max_gen_toks"]
        if room < 1:
            raise ValueError(
                f"max_gen_toks={given['max_gen_toks']} leaves no room for a context in the model's {self.max_length} tokens"
            )
        until = handle_stop_sequences(given.get("until"), self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        return Ask(
            self.tok_encode(context, left_truncate_len=room) or [self.prefix_token_id], self.strategy,
            max_new_tokens=given["max_gen_toks"], seed=zlib.crc32(f"{self.seed} {repeat} {context}".encode()),
            stop=[text for text in until if text], **self.sampling,
        )  # fmt: skip

    def _text(self, generation: Generation, until: list[str]) -> str:
        """The best response as ``HFLM`` hands it over."""
        text, tokens, end = generation.text, generation.best.token_ids, self.think_end_token
        if isinstance(end, int):
            begin = len(tokens) - tokens[::-1].index(end) if end in tokens else 0
            text, end = self.reflective.decode(tokens[begin:]).lstrip(), None
        return postprocess_generated_text(text, until, end)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
