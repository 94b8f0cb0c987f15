"""Packages of others that hand out hidden states while a model decodes, with a head put behind them."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from .cases import Case
from .hf import NOT_HERE, Call, read
from .run import Run, Scored
from .system import System
from .world import LAYER, World


class NNsight:
    """nnsight's tracer around ``generate``: the last position of the layer's output at every step, as its documentation shows it."""

    name, wants = "nnsight", ("nnsight",)
    about = "nnsight: TransformersModel.generate, and in tracer.iter the layer's output[:, -1] of every step"
    cannot: ClassVar = NOT_HERE

    def run(self, world: World, case: Case) -> Run:
        import nnsight

        model = copy.deepcopy(world.model)  # which it wraps
        returned: list[Any] = []
        usual = model.generate
        model.generate = lambda *args, **given: returned.append(usual(*args, **given)) or returned[-1]
        traced = nnsight.TransformersModel(model, tokenizer=world.tokenizer, task="text-generation")
        found: list[Scored] = []
        events: dict[str, int] = {}
        for part in Call.all(world, case, model):
            kept: list[Any] = []
            rows = part.by(lambda part=part, kept=kept: self._traced(traced, part, kept) or returned[-1])
            states = torch.stack(kept, 1)  # [B, steps, H]
            found += read(world, case, rows, states, lambda row, column: column - row.prompt)
            events |= part.events
        return Run(found, events)

    @staticmethod
    def _traced(traced: Any, part: Call, kept: list[Tensor]) -> None:
        with traced.generate({"input_ids": part.ids, "attention_mask": part.mask}, **part.settings()) as tracer:
            for _ in tracer.iter[:]:
                kept.append(traced.model.layers[LAYER].output[:, -1])


def _spec(layer: int) -> str:
    usual = f"layers: {layer}, tensor_type: residual_stream, execution_mode: inline"
    points = ('prompt, position: "prompt[-1]", probe_type: once, probe_kind: single_shot', 'generated, position: "generated[*]", probe_type: each, probe_kind: trajectory')
    return 'version: "1"\nextraction_points:\n' + "".join(f"  - {{name: {point}, {usual}}}\n" for point in points)


class Undercurrent:
    """undercurrent's ``ProbedModel`` on transformers: a probe that is given every generated token's state with its position."""

    name, wants = "undercurrent", ("undercurrent",)
    about = "undercurrent: ProbedModel on transformers, a probe at prompt[-1] and generated[*], read by token_pos"
    cannot: ClassVar = NOT_HERE | dict.fromkeys(
        ("batch", "padding", "right padding", "n", "beams"), "one prompt and one sequence a call, as its documentation says"
    )

    def run(self, world: World, case: Case) -> Run:
        from undercurrent.core import Probe, ProbeResult
        from undercurrent.model import ProbedModel

        states: dict[int, Tensor] = {}

        class Once(Probe):
            probe_kind = "single_shot"

            def on_start(self, request_ctx: Any) -> None:
                pass

            def on_activation(self, record: Any) -> None:
                states[record.token_pos] = record.tensor

            def on_end(self, request_ctx: Any) -> ProbeResult:
                return ProbeResult(self.request_id, self.extraction_point_name, verdict=None)

        class Each(Once):
            probe_kind = "trajectory"

        model = copy.deepcopy(world.model)  # whose forward it wraps
        part = next(Call.all(world, case, model))
        returned: list[Any] = []
        usual = model.generate
        model.generate = lambda *args, **given: returned.append(usual(*args, **given)) or returned[-1]
        spec = _spec(model.config.num_hidden_layers + LAYER)
        with ProbedModel(model, spec=spec, probes={"once": Once, "each": Each}, tokenizer=world.tokenizer) as probed:
            rows = part.by(lambda: probed.generate(case.prompts[0], **part.settings()) and returned[-1])
        found = []
        for row in rows:
            columns = world.columns(row.ids, row.prompt, case.rule)
            features = torch.stack([states[column - 1] for column in columns])
            found.append(row.scored(world.head(features).sigmoid().flatten(), columns))
        return Run(found, part.events)


SYSTEMS: tuple[System, ...] = (NNsight(), Undercurrent())
