"""``worker_extension_cls``: what can be asked of a worker by ``collective_rpc``. Answers are plain lists, for they travel."""

from dataclasses import astuple
from typing import Any

from .requests import Log


class ReflectiveWorker:
    """Methods of vLLM's worker, whose ``model_runner`` is the attribute that they read."""

    def reflective_start(self) -> dict[str, Any]:
        """Must come before the first request; may come again. Returns ``backend`` and model ``runner`` that score."""
        runner = self.model_runner
        model = runner.get_model()
        if not hasattr(model, "reflective_hidden"):
            raise ValueError(
                f"{type(model).__name__} was loaded without scores: start vLLM with what reflective.vllm.settings gives"
            )
        if model.reflective is None:
            from .runner_v1 import install

            install(runner)
        return {"backend": model.reflective.placed.backend.name, "runner": type(runner).__module__}

    def reflective_logs(self, keys: list[str], forget: bool = True) -> list[tuple[Any, ...]]:
        """The fields of a ``Log`` for every request of these keys."""
        requests = _requests(self.model_runner)
        return [astuple(log) for log in requests.log(requests.find(keys), forget=forget)]

    def reflective_stats(self) -> dict[str, float]:
        """See ``Requests.stats``."""
        return _requests(self.model_runner).stats()


def _requests(runner: Any) -> Any:
    if (sweep := getattr(getattr(runner, "sampler", None), "sweep", None)) is not None:
        sweep()  # the first runner does not say who leaves
    return runner.get_model().reflective


def logs_of(answer: list[list[tuple[Any, ...]]]) -> list[Log]:
    """From what ``collective_rpc`` brought: every rank has the same, and the first one's is taken."""
    return [Log(*fields) for fields in answer[0]]
