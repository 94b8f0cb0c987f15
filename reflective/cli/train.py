"""``reflective train``: a head, or a model with it, from outcomes alone."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..train.settings import Settings
from . import complete
from .common import FetchOption, JsonOption, ModelOption, load_model, print_json, progress_bars
from .help import BACKBONE, DRAWING, HEAD, JOINT, LEARNING, SPEED

EXAMPLES = """
reflective train heads/sums
reflective train heads/mine --model ORG/NAME --task questions.jsonl
# from responses that are there already, with outcomes
reflective train heads/mine --data rollouts.jsonl
# policy and head together
accelerate launch -m reflective train out --way joint --steps 200
"""


def train(
    output: Annotated[
        Path, typer.Argument(help="Directory for head or model, rollouts and report; an interrupted run goes on there.")
    ],
    model: ModelOption = "default",
    way: Annotated[
        str,
        typer.Option(metavar="NAME", autocompletion=complete.ways, help="head: the head alone; backbone: LoRA or all weights too; joint: policy and head, by GRPO."),
    ] = Settings.way,
    task: Annotated[
        str,
        typer.Option(metavar="NAME", autocompletion=complete.tasks, help="sums, chain_sum, reasoning-gym:DATASET, or a JSONL or parquet file of question and answer."),
    ] = Settings.task,
    verifier: Annotated[
        str | None,
        typer.Option(metavar="NAME", autocompletion=complete.verifiers, help="answer (default), exact, math, reasoning-gym:DATASET or MODULE:FUNCTION: judges responses."),
    ] = Settings.verifier,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSONL or parquet file of prompt, response and outcome, to learn from these; no --task."),
    ] = Settings.data,
    questions: Annotated[int, typer.Option(min=2, help="Questions to learn from.")] = Settings.questions,
    eval_questions: Annotated[
        int, typer.Option(min=1, help="Other questions to measure on; of --data a third at most.")
    ] = Settings.eval_questions,
    samples: Annotated[int, typer.Option(min=2, help="Responses to each question.")] = Settings.samples,
    temperature: Annotated[float, typer.Option(rich_help_panel=DRAWING, min=0.01, help="Of the responses.")] = Settings.temperature,
    top_p: Annotated[float, typer.Option(rich_help_panel=DRAWING, help="Keep the likeliest tokens whose probabilities come to this.", min=0, max=1)] = Settings.top_p,
    max_new_tokens: Annotated[int, typer.Option(rich_help_panel=DRAWING, min=1, help="Tokens a response at most.")] = Settings.max_new_tokens,
    batch_rows: Annotated[int, typer.Option(rich_help_panel=SPEED, min=1, help="Responses decoded together.")] = Settings.batch_rows,
    epochs: Annotated[int, typer.Option(rich_help_panel=LEARNING, min=1, help="Passes of the head over the rollouts.")] = Settings.epochs,
    warmup: Annotated[
        int | None,
        typer.Option(rich_help_panel=LEARNING, 
            min=0,
            help="Epochs (head) or steps in plain BCE before dynamic weights; default: never dynamic; 0: as published.",
        ),
    ] = Settings.warmup,
    lr: Annotated[float, typer.Option(rich_help_panel=LEARNING, min=0, help="Of the head.")] = Settings.lr,
    batch: Annotated[int, typer.Option(rich_help_panel=LEARNING, min=1, help="Responses an optimizer step.")] = Settings.batch,
    within_questions: Annotated[
        bool, typer.Option(rich_help_panel=LEARNING, help="Use only questions answered both ways, their two sides weighted equally.")
    ] = Settings.within_questions,
    class_balance: Annotated[
        bool, typer.Option(rich_help_panel=LEARNING, help="Weigh the outcomes of a batch against each other.")
    ] = Settings.class_balance,
    layers: Annotated[
        str | None,
        typer.Option(rich_help_panel=HEAD, metavar="LAYERS", 
            help="What the head reads: -9, or several as -9,-2; auto tries some on held-back training questions, auto:-2,-9 these. "
            "Default: what the model's head reads, else -2."
        ),
    ] = Settings.layers,
    at: Annotated[
        str | None, typer.Option(rich_help_panel=HEAD, metavar="NAME", autocompletion=complete.ats, help="Which token's state a step is scored by: predict, token or every; default the model's.")
    ] = Settings.at,
    width: Annotated[
        int | None,
        typer.Option("--units", "--width", min=1, rich_help_panel=HEAD, help="Hidden units of the head; default twice as many as it has inputs."),
    ] = Settings.width,
    continue_head: Annotated[
        str | None, typer.Option(rich_help_panel=HEAD, metavar="PATH", help="Go on from this head, which may be a published one.")
    ] = Settings.continue_head,
    lora: Annotated[int, typer.Option(rich_help_panel=BACKBONE, min=1, help="Rank of the LoRA layers (backbone, joint).")] = Settings.lora,
    full: Annotated[bool, typer.Option("--full", rich_help_panel=BACKBONE, help="Train all weights instead of LoRA layers.")] = False,
    backbone_lr: Annotated[
        float, typer.Option(rich_help_panel=BACKBONE, min=0, help="Of LoRA layers or backbone (backbone, joint).")
    ] = Settings.backbone_lr,
    backbone_epochs: Annotated[
        int, typer.Option(rich_help_panel=BACKBONE, min=1, help="Passes over the rollouts (backbone).")
    ] = Settings.backbone_epochs,
    steps: Annotated[int, typer.Option(rich_help_panel=JOINT, min=1, help="Optimizer steps (joint).")] = Settings.steps,
    group: Annotated[int, typer.Option(rich_help_panel=JOINT, min=2, help="Answers to each question of a step (joint).")] = Settings.group,
    head_updates: Annotated[
        int, typer.Option(rich_help_panel=JOINT, min=0, help="Steps of the head by itself after each optimizer step (joint); 0: one with the policy, as published.")
    ] = Settings.head_updates,
    settle: Annotated[
        int | None,
        typer.Option(rich_help_panel=JOINT, min=0, help="Training questions answered once more in the end, to fit the head anew (joint); default: all; 0: it stays as trained along."),
    ] = Settings.settle,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", rich_help_panel=BACKBONE, help="Less memory, a second forward (backbone, joint).")
    ] = Settings.gradient_checkpointing,
    dtype: Annotated[
        str,
        typer.Option(rich_help_panel=SPEED, metavar="NAME", autocompletion=complete.train_dtypes, 
            help="bfloat16 or float32, for rollouts and training; auto: the model's for rollouts, bfloat16 to train."
        ),
    ] = Settings.dtype,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = Settings.seed,
    published: Annotated[
        bool, typer.Option("--published", rich_help_panel=HEAD, help="Write score_module.pt too, which the published code reads.")
    ] = Settings.published,
    fetch: FetchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a head from outcomes alone, or the model with it, and report on unseen questions.

    Works under `accelerate launch` too. Started again, an interrupted run goes on and a finished one prints its report.
    """
    given = {**locals(), "lora": None if full else lora}
    settings = Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings)})
    from ..train.run import is_main_process, table
    from ..train.run import train as run

    with progress_bars() as bars:
        report = run(load_model(model, None, fetch, untrained=True), settings, output, bars)
    if not is_main_process():
        return
    if as_json:
        print_json(report)
    else:
        Console().print(table(report))
