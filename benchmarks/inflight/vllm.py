"""Cases in vLLM, and the systems that score there. Wants vLLM; on a CPU its build, ``make vllm``.

Engines run in this process. One is started for all cases that want the same settings.
"""

import gc
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .cases import Case
from .hf import generated
from .run import Run, Scored
from .world import DELIMITER, HIDDEN, LAYER, World

BLOCK = 32  # tokens
SMALL = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 32, "enforce_eager": True, "block_size": BLOCK, "seed": 0}
BEAMS = "vLLM's beam search is a loop of requests of one token, none of which is a sequence"
NOT_HERE = {"right padding": "vLLM pads nothing", "beams": BEAMS}


def surroundings() -> None:
    """Before vLLM is imported: a CPU's settings, unless others are there."""
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)


def second_runner() -> bool:
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def settings_of(case: Case, world: World) -> dict[str, Any]:
    """Of vLLM's ``EngineArgs`` what a case needs."""
    # A preemption is to be seen by itself.
    found: dict[str, Any] = {"enable_prefix_caching": not case.few_blocks, "disable_log_stats": False}
    if case.piece:
        found |= {"max_num_batched_tokens": case.piece, "max_num_seqs": min(case.piece, 16), "enable_chunked_prefill": True}
    if case.few_blocks:
        found |= {"num_gpu_blocks_override": 24, "max_model_len": 384}
    if case.drafts == "lookup":
        found["speculative_config"] = {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1,
        }  # fmt: skip
    if case.drafts == "model":
        found["speculative_config"] = {"method": "draft_model", "model": str(world.draft_path), "num_speculative_tokens": 3}
    return found


class Started:
    """The engine that runs: the last one that was asked for. A process has one, as vLLM's metrics are one engine's."""

    def __init__(self) -> None:
        self._engines: dict[str, tuple[Any, Callable[[], None]]] = {}

    def get(self, key: Any, start: Callable[[], tuple[Any, Callable[[], None]]]) -> Any:
        """The engine of ``key``; ``start`` returns a new one, and what ends it."""
        surroundings()
        if (key := repr(key)) not in self._engines:
            self.close()
            self._engines[key] = start()
        return self._engines[key][0]

    def close(self) -> None:
        while self._engines:
            _, (_, end) = self._engines.popitem()
            end()
            gc.collect()


STARTED = Started()
_NUMBERS = itertools.count()


def counts_of(llm: Any) -> dict[str, float]:
    """vLLM's metrics that are counters, by their names."""
    return {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if hasattr(m, "value")}


class Engine:
    """A ``vllm.LLM`` with the settings of a case, and what it decodes of it.

    ::

        engine = Engine(world, case, model=PATH)
        for output in engine.outputs():
            output.prompt_token_ids, output.outputs

    Args:
        given: of vLLM's ``EngineArgs``, besides those of the case.

    Attributes:
        llm: the ``LLM``, which other cases may have used; new: whether none has.
        events: see ``Run``.
    """

    def __init__(self, world: World, case: Case, **given: Any) -> None:
        self.world, self.case, self.events, self.new = world, case, {}, False
        self._settings = SMALL | settings_of(case, world) | given
        self.llm = STARTED.get(self._settings, self._start)

    def _start(self) -> tuple[Any, Callable[[], None]]:
        from vllm import LLM

        llm, self.new = LLM(**self._settings), True
        return llm, llm.llm_engine.engine_core.shutdown

    def outputs(self, **more: Any) -> list[Any]:
        """vLLM's ``RequestOutput`` objects. ``more``: of ``SamplingParams``."""
        from vllm import SamplingParams

        case, world = self.case, self.world
        params = SamplingParams(
            n=case.n, max_tokens=case.tokens, temperature=0.0 if case.alone else 1.0, allowed_token_ids=world.allowed(case.allowed),
            ignore_eos="<|end|>" not in case.allowed, detokenize=False, skip_special_tokens=False, **more,
        )  # fmt: skip
        prompts, before = [{"prompt_token_ids": world.ids(text)} for text in case.prompts], counts_of(self.llm)
        self.llm.reset_prefix_cache()  # of other cases
        if case.stop_after:
            found = self._stopped(prompts, params)
        else:
            found = self.llm.generate(prompts, params, use_tqdm=False)
        for prompt in prompts if case.alone else ():
            found += self.llm.generate([prompt], params, use_tqdm=False)
        if case.cached:  # what the first ones have left there
            found += self.llm.generate(prompts, params, use_tqdm=False)
            self.events["cached"] = sum(o.num_cached_tokens or 0 for o in found)
        grown = {name: value - before.get(name, 0) for name, value in counts_of(self.llm).items()}
        self.events["preempted"] = grown.get("num_preemptions", 0)
        self.events["rejected"] = grown.get("spec_decode_num_draft_tokens", 0) - grown.get("spec_decode_num_accepted_tokens", 0)
        if case.piece:
            self.events["pieces"] = sum(-(-len(p["prompt_token_ids"]) // case.piece) for p in prompts)
        return found

    def _stopped(self, prompts: Sequence[Any], params: Any) -> list[Any]:
        """Requests that are aborted while they run, with what there was of them."""
        engine, newest = self.llm.llm_engine, {}
        names = [f"stopped-{next(_NUMBERS)}" for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, prompt, params)
        while len(newest) < len(names) or min(len(o.outputs[0].token_ids) for o in newest.values()) < self.case.stop_after:
            newest |= {o.request_id: o for o in engine.step()}
        engine.abort_request(list(newest))
        self.events["stopped"] = len(newest)
        while engine.has_unfinished_requests():
            engine.step()
        return [newest[name] for name in names]


@dataclass
class Plugin:
    """The plugin of this package in a program of one's own, on vLLM's first model runner, which CPU builds use, or on the second one."""

    second_runner: bool
    cannot: ClassVar = NOT_HERE
    wants, own_process = ("vllm",), True

    def __post_init__(self) -> None:
        self.name = "reflective-vllm-v2" if self.second_runner else "reflective-vllm"
        runner = "Model Runner V2" if self.second_runner else "its first model runner"
        self.about = f"reflective.vllm in a stock vLLM, {runner}: LLM(**reflective.vllm.settings(path)), then reflective.vllm.scores"

    def run(self, world: World, case: Case) -> Run:
        surroundings()
        import reflective.vllm

        settings = reflective.vllm.settings(world.path, head=world.head_path, rule=case.rule, delimiter=DELIMITER)
        engine = Engine(world, case, **settings)
        reflective.vllm.start(engine.llm)
        outputs, found = engine.outputs(), []
        for output, scores in zip(outputs, reflective.vllm.scores(engine.llm, outputs), strict=True):
            prompt = list(output.prompt_token_ids)
            for c, values, columns in zip(output.outputs, scores.step_scores, scores.step_positions, strict=True):
                found.append(Scored([*prompt, *c.token_ids], len(prompt), values.tolist(), columns.tolist()))
        return Run(found, engine.events)


class Generate:
    """``ReflectiveModel.generate`` with vLLM behind it."""

    name, wants, own_process, second_runner = "reflective-generate-vllm", ("vllm",), True, False
    about = "reflective.ReflectiveModel.generate with engine='vllm': best of n; step_beam for forks, prune for what is stopped"
    cannot: ClassVar = {
        "right padding": "it takes texts, and pads nothing",
        "preemption": "short of memory it parks a sequence before vLLM would preempt one",
        "prompt lookup": "it drafts no tokens",
        "draft model": "it drafts no tokens",
    }

    def run(self, world: World, case: Case) -> Run:
        from reflective.strategies import by_name

        settings = {k: v for k, v in (SMALL | settings_of(case, world)).items() if k != "dtype"}
        model = STARTED.get(("generate", case.rule, settings), lambda: self._start(world, case, settings))
        before = counts_of(model.host.core.llm)
        model.forget()  # what other cases have left in the prefix cache
        run = generated(model, world, case, by_name)
        events = {**run.events, "cached": counts_of(model.host.core.llm)["prefix_cache_hits"] - before.get("prefix_cache_hits", 0)}
        if case.piece:
            events["pieces"] = -(-max(s.prompt for s in run.sequences) // case.piece)
        return Run(run.sequences, events)

    def _start(self, world: World, case: Case, settings: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
        import reflective as rf
        from reflective.checkpoints.config import CONFIG_NAME

        place = world.head_path.parent / f"head-{case.rule}"
        world.head.save_pretrained(place)
        said = {"rule": case.rule, "delimiter": DELIMITER, "prompt": "{question}"}
        (place / CONFIG_NAME).write_text(json.dumps(said))
        model = rf.ReflectiveModel.from_pretrained(world.path, head=place, engine="vllm", dtype="float32", **settings)
        return model, model.close


class KeepRows:
    """``worker_extension_cls`` of the hook: rows of every request, one step's behind the other's."""

    def keep_rows(self) -> None:
        import torch
        from vllm.forward_context import get_forward_context

        self.kept: dict[str, list[torch.Tensor]] = {}

        def hook(_: Any, __: Any, output: Any) -> None:
            runner, metadata = self.model_runner, get_forward_context().attn_metadata
            if not runner.input_batch.num_reqs or not metadata:
                return  # vLLM's own trial runs
            hidden = output[0] + output[1]  # the residual is added in the next layer
            starts = next(iter(metadata.values())).query_start_loc.tolist()
            for i, request in enumerate(runner.input_batch.req_ids):
                self.kept.setdefault(request, []).append(hidden[starts[i] : starts[i + 1]].float().clone())

        layers = self.model_runner.get_model().model.layers
        layers[len(layers) + LAYER].register_forward_hook(hook)

    def rows_of(self, request: str, index: int, n: int) -> list[list[float]]:
        """All of its rows, in the order in which they came; vLLM's own id is ``"{index}_"`` before and a random suffix behind it."""
        import torch

        wanted = f"{index}_{request}" if n > 1 else request
        found = [kept for name, kept in self.kept.items() if name == wanted or name.startswith(f"{wanted}-")]
        return torch.cat(found[0]).tolist() if found else []


@dataclass
class Hook:
    """A forward hook in the worker, rows of a request by ``query_start_loc``."""

    fresh: bool  # whether the prefix cache is not read

    def __post_init__(self) -> None:
        self.name = "vllm-hook-uncached" if self.fresh else "vllm-hook"
        self.about = (
            "a forward hook on a layer of vLLM's model, enforce_eager=True; rows of each request by query_start_loc, one step's behind the other's, "
            "read by position, as in IBM/vLLM-Hook"
        ) + (" and UKGovernmentBEIS/vllm-lens, which has such requests not read the prefix cache" if self.fresh else "")
        self.cannot, self.wants, self.own_process, self.second_runner = NOT_HERE, ("vllm",), True, False

    def run(self, world: World, case: Case) -> Run:
        import torch

        extension = "reflective.benchmarks.inflight.vllm.KeepRows"
        engine = Engine(world, case, model=str(world.path), worker_extension_cls=extension)
        if engine.new:
            engine.llm.collective_rpc("keep_rows")
        found = []
        for output in engine.outputs(**({"skip_reading_prefix_cache": True} if self.fresh else {})):
            prompt = list(output.prompt_token_ids)
            for c in output.outputs:
                ids = [*prompt, *c.token_ids]
                columns = world.columns(ids, len(prompt), case.rule)
                kept = engine.llm.collective_rpc("rows_of", args=(output.request_id, c.index, case.n))[0]
                features = torch.tensor(kept).reshape(-1, HIDDEN)[[column - 1 for column in columns]]
                found.append(Scored(ids, len(prompt), world.head(features).sigmoid().flatten().tolist(), columns))
        if self.fresh and case.cached:
            engine.events["cached"] = sum(s.prompt for s in found) // 2  # were there, and were not read
        return Run(found, engine.events)


SYSTEMS = (Plugin(second_runner=False), Plugin(second_runner=True), Generate(), Hook(fresh=False), Hook(fresh=True))
