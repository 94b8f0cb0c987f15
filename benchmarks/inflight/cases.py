"""The cases: what is decoded, what must hold of the scores, and why people get it wrong.

Tokens are drawn from a few allowed ones, so that what a case is about comes about in any system, whatever its random numbers: one token in five ends
a step, tags come twice, a sequence of one token ends with a step. What was drawn is the system's affair; the harness checks the scores of that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from .run import Run
from .world import DELIMITER, END_THINK, LETTERS, THINK, World

NEEDS = {
    "batch": "several prompts at once",
    "padding": "prompts of different lengths in one batch",
    "right padding": "a batch that is padded on the right",
    "n": "several sequences of one prompt",
    "prefix cache": "a prompt whose beginning is in a cache",
    "pieces": "a prompt that is prefilled in pieces",
    "preemption": "a request that is thrown out of memory, and comes back",
    "prompt lookup": "drafts from the text so far",
    "draft model": "drafts of a smaller model",
    "beams": "sequences that are forked while they decode",
    "stop": "sequences that are stopped from outside",
    "ends": "sequences that end at different times",
    "split delimiters": "steps found in the text, not by one token",
}

USUAL = (*LETTERS, DELIMITER)
QUESTION = "How much is 17 + 25 + 8"
OTHERS = ("What is 9 + 4", "We count the primes below 100, one by one", "Add three and four, then take away one")
LONG = "First add 3 and 4, then add 5 and take away 2, then double it and add the number of days of a week, and last of all "
WORKED = f"Add 3 and 4{DELIMITER}Then add 5{DELIMITER}Take away 2{DELIMITER}So"


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: by which it is asked for.
        must: what must hold.
        why: why people get it wrong.
        sources: where they did, or where the rule is from: ``owner/repository#thread`` on GitHub.
        needs: what a system must be able to express, of ``NEEDS``.
        prompts: texts; n: sequences of each.
        tokens: that are decoded of a sequence at most.
        allowed: the tokens that may be drawn, by their texts; all others are barred. Temperature 1, whole softmax.
        rule: of the step-tokens, ``"exact"`` or ``"text"`` (``World.steps``).
        padding: side on which a batch is padded.
        alone: decode the prompts greedily, together and one at a time.
        cached: tokens of each prompt whose keys and values are there already, as another request ran them; -1: all but the last.
        piece: tokens of a prompt that are prefilled at a time.
        few_blocks: memory for keys and values is short of what all sequences need.
        drafts: ``"lookup"`` or ``"model"``: who guesses the next tokens.
        beams: that are searched.
        stop_after: tokens after which decoding is stopped from outside.
        event: of ``Run.events``, without which the case is not tested.
        shows: ``shows(world, run)`` whether the tokens are such as the case is about.
    """

    name: str
    must: str
    why: str
    sources: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    prompts: tuple[str, ...] = (QUESTION,)
    n: int = 1
    tokens: int = 32
    allowed: tuple[str, ...] = USUAL
    rule: str = "exact"
    padding: str = "left"
    alone: bool = False
    cached: int = 0
    piece: int = 0
    few_blocks: bool = False
    drafts: str = ""
    beams: int = 0
    stop_after: int = 0
    event: str = ""
    shows: Callable[[World, Run], bool] | None = None

    def missing(self, world: World, run: Run) -> str:
        """What did not come about; empty if all did."""
        if not any(world.columns(s.ids, s.prompt, self.rule) for s in run.sequences):
            return "no step was decoded"
        if self.event and not run.events.get(self.event):
            return f"nothing was {self.event}"
        if self.shows is not None and not self.shows(world, run):
            return "no sequence came out as the case has it"
        return ""


def _responses(run: Run) -> list[list[int]]:
    return [list(s.ids[s.prompt :]) for s in run.sequences]


def _twice(tag: int) -> Callable[[World, Run], bool]:
    return lambda world, run: any(list(s.ids).count(tag) > 1 for s in run.sequences)


def _steps_last(world: World, run: Run) -> bool:
    return any(world.columns(s.ids, s.prompt)[-1:] == [len(s.ids) - 1] for s in run.sequences)


def _run_of(world: World, run: Run) -> bool:
    return any(a == b == world.step_id for r in _responses(run) for a, b in pairwise(r))


def _split(world: World, run: Run) -> bool:
    return any(
        t and s.ids[t] != world.step_id and t >= s.prompt for s in run.sequences for t in world.columns(s.ids, s.prompt, "text")
    )


def _forked(world: World, run: Run) -> bool:
    """Two begin with the same four tokens and go on with others."""
    responses = _responses(run)
    return any(a[:4] == b[:4] and a != b for i, a in enumerate(responses) for b in responses[:i])


def _lengths_differ(world: World, run: Run) -> bool:
    return len({len(r) for r in _responses(run)}) > 1


CASES = (
    Case(
        "plain",
        "One prompt, one sequence: the score of each step is that of a second pass over the same tokens.",
        "The state that predicted a token is the one before it: an index that is off by one reads a neighbour.",
        ("huggingface/transformers#30036",),
        tokens=64,
    ),
    Case(
        "last-token",
        "A step-token that comes last counts: the state that predicted it has been computed.",
        "The last token is never fed back. Who waits for the next forward to score it loses the step.",
        ("huggingface/transformers#30036", "huggingface/transformers#26174"),
        tokens=1, allowed=(DELIMITER,), shows=_steps_last,
    ),
    Case(
        "prompt-steps",
        "Step-tokens in the prompt do not count: worked examples are not the model's reasoning.",
        "A scorer that gets a text alone does not know where its prompt ends.",
        ("MetaStone-AI/MetaStone-S1 (POST /score takes a text)",),
        prompts=(WORKED,),
    ),
    Case(
        "tags-twice",
        "Where <think> or </think> comes more than once, there is no such tag: steps before it count again.",
        "A stream that has closed the region at the first tag cannot open it again.",
        ("MetaStone-AI/MetaStone-S1 (a tag counts where it occurs exactly once)",),
        ("n",), n=6, tokens=40, allowed=(*LETTERS[:3], DELIMITER, "<think>", "</think>"),
        shows=lambda world, run: _twice(THINK)(world, run) and _twice(END_THINK)(world, run),
    ),
    Case(
        "delimiter-run",
        "Of several delimiters in a row the first ends a step, and the others end nothing.",
        "One step becomes three, two of them empty, and the mean is theirs.",
        ("MetaStone-AI/MetaStone-S1 (of consecutive step-tokens the first)",),
        ("n",), n=4, allowed=(LETTERS[0], DELIMITER), shows=_run_of,
    ),
    Case(
        "split-delimiter",
        "A delimiter that the model writes in several tokens ends a step as one that is a single token does.",
        "Whoever looks for one id misses it; whoever encodes the text anew scores other tokens than were decoded.",
        ("QwenLM/ProcessBench#12",),
        ("n", "split delimiters"), n=4, tokens=48, allowed=(*LETTERS[:2], ".", "\n", "\n\n", DELIMITER), rule="text", shows=_split,
    ),
    Case(
        "batch",
        "Prompts of one length, decoded together and one at a time: the scores are the same up to rounding.",
        "Rows of a batch are mixed up, or a request gets its neighbour's.",
        ("vllm-project/speculators#279", "sgl-project/sglang#4997", "allenai/reward-bench#137"),
        ("batch",), tuple(f"How much is {a} + {b} + 8" for a, b in ((17, 25), (31, 46), (52, 19), (60, 38))),
        tokens=48, alone=True,
    ),
    Case(
        "left-padding",
        "Prompts of different lengths in one batch: padding is not counted, in positions as in steps.",
        "Positions count from the first column, or padding is looked at by attention.",
        ("allenai/reward-bench#137", "huggingface/transformers#29419"),
        ("batch", "padding"), (QUESTION, *OTHERS),
    ),
    Case(
        "right-padding",
        "A batch padded on the right is scored right, or refused.",
        "The first token is drawn from the state of a padding token, which belongs to no text.",
        ("huggingface/transformers#26569", "huggingface/transformers#18388"),
        ("batch", "padding", "right padding"), (QUESTION, *OTHERS), n=6, tokens=8, padding="right", allowed=(LETTERS[0], DELIMITER),
        shows=lambda world, run: any(r[0] == world.step_id for r in _responses(run)),
    ),
    Case(
        "ends-early",
        "Sequences that end before others: what pads them behind their end is no token of theirs.",
        "Rows that ended are fed on, and what comes of it is counted.",
        needs=("n", "ends"), n=12, tokens=48, allowed=(*LETTERS, *"QKJV", DELIMITER, "<|end|>"), shows=_lengths_differ,
    ),
    Case(
        "several-of-one",
        "n > 1: each of several sequences of one prompt has its own scores.",
        "The prompt is run once, and its rows go to the first sequence; ids of children are not those of the request.",
        ("sgl-project/sglang#4997",),
        ("n",), n=8,
    ),
    Case(
        "prompt-cached",
        "The same prompt again: what comes from the prefix cache has no rows, and nothing else moves.",
        "Rows are counted from the prompt's first token, of which the second time none was run.",
        ("sgl-project/sglang#30177", "vllm-project/vllm#44485", "vllm-project/speculators#279"),
        ("prefix cache",), (LONG + QUESTION,), cached=-1, event="cached",
    ),
    Case(
        "shared-prefix",
        "Prompts that begin alike: what they share is run once.",
        "As before, and whoever shares it has another length.",
        ("vllm-project/vllm-omni#1184", "IBM/vLLM-Hook#14", "sgl-project/sglang#6551"),
        ("prefix cache", "batch"), tuple(LONG + f"How much is {a} + {b} + 8" for a, b in ((17, 25), (31, 46), (52, 19))),
        cached=96, event="cached",
    ),
    Case(
        "prefill-in-pieces",
        "A prompt that is prefilled in pieces has one response and one set of rows.",
        "Every piece is taken for a decoded token.",
        ("vllm-project/speculators#279",),
        ("pieces",), (LONG + LONG + QUESTION,), piece=32, event="pieces",
    ),
    Case(
        "preemption",
        "A request that is thrown out of memory and computed again is scored as if nothing had happened.",
        "Its tokens come by twice: rows are appended twice, or its state is dropped with it.",
        needs=("preemption", "n"), prompts=(LONG + "So", LONG + OTHERS[1], OTHERS[0]), n=8, tokens=80, few_blocks=True, event="preempted",
    ),
    Case(
        "lookup-rejected",
        "Drafted tokens that are refused leave no rows: the step that one of them ended never was.",
        "A forward verifies several tokens, and some of its rows are of tokens that are not in the text.",
        ("sgl-project/sglang#26163", "vllm-project/vllm#9879"),
        ("prompt lookup",), tokens=96, allowed=(*LETTERS[:2], DELIMITER), drafts="lookup", event="rejected",
    ),
    Case(
        "draft-rejected",
        "The same with drafts of a smaller model.",
        "As before, and the smaller model has hidden states, too.",
        ("sgl-project/sglang#26163", "vllm-project/vllm#9879"),
        ("draft model",), tokens=96, drafts="model", event="rejected",
    ),
    Case(
        "forks",
        "Sequences that are forked take their scores so far with them: in beam search the rows change places.",
        "Rows are kept by place, and the place has another sequence now.",
        ("huggingface/transformers#27383", "huggingface/transformers#20694"),
        ("beams",), tokens=24, beams=4, shows=_forked,
    ),
    Case(
        "stopped",
        "Decoding is stopped from outside: what was scored by then is that of the tokens by then.",
        "What waits in a buffer, or for the end, is lost.",
        needs=("stop", "batch"), prompts=(QUESTION, OTHERS[2]), tokens=64, stop_after=24, event="stopped",
    ),
)  # fmt: skip


def chosen(names: tuple[str, ...] | list[str] | None = None) -> list[Case]:
    """The cases of these names, in their order; all by default.

    Raises:
        ValueError: a name that none has.
    """
    known = {case.name: case for case in CASES}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"case: {', '.join(unknown)}; expected some of {', '.join(known)}")
    return [known[name] for name in names or known]


