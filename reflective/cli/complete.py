"""What the shell offers behind an option. No torch: it waits for every Tab."""

from collections.abc import Callable

from ..search.strategies import NAMES as STRATEGIES

EFFORTS = {"low": "2 candidates", "medium": "8 candidates", "high": "32 candidates", "auto": "as many as a question needs"}
IMPLEMENTATIONS = {
    "cuda": "our backends", "triton": "", "cpu": "", "expression": "plain PyTorch", "cublas": "cuBLAS with its epilogues",
    "compile": "torch.compile", "published": "the published pipeline's way",
}  # fmt: skip
DECODINGS = {"auto": "seats on a GPU", "batch": "eager", "seats": "steps of fixed shape", "compiled": "the same, compiled"}
ENGINES = {"hf": "transformers in this process", "vllm": "vLLM in this process"}
TASKS = {"sums": "sums of a few numbers", "chain_sum": "reasoning-gym's longer ones", "reasoning-gym:": "any of its data sets"}
VERIFIERS = {
    "answer": "the answer means the same", "exact": "its text is the same", "math": "math-verify", "reasoning-gym:": "a data set's own score",
}  # fmt: skip
METRICS = {"aime24": "AIME 2024", "aime25": "AIME 2025", "ceval": "C-Eval"}
AGGREGATIONS = ("geometric_mean", "mean", "min", "last", "product")
WAYS = {"head": "the head alone", "backbone": "LoRA or all weights too", "joint": "policy and head, by GRPO"}
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
ATS = {"predict": "the state that predicted the step", "token": "the step's own", "every": "every token is a step"}
OPS = ("decode_step", "flush", "score_rows", "logit_rows", "tally_slots", "step_mask", "sprm_loss")


def among(names: "dict[str, str] | tuple[str, ...]") -> Callable[[str], "list[tuple[str, str]]"]:
    """What an option's ``autocompletion`` is: names, with what each means."""

    def offered(incomplete: str) -> list[tuple[str, str]]:
        said = names if isinstance(names, dict) else dict.fromkeys(names, "")
        return [(name, said[name]) for name in said if name.startswith(incomplete)]

    return offered


strategies, efforts, decodings, engines = among(STRATEGIES), among(EFFORTS), among(DECODINGS), among(ENGINES)
tasks, verifiers, metrics, aggregations = among(TASKS), among(VERIFIERS), among(METRICS), among(AGGREGATIONS)
ways, ats, train_dtypes = among(WAYS), among(ATS), among(("auto", *DTYPES[:2]))
ops, dtypes, implementations, devices = among(OPS), among(DTYPES), among(IMPLEMENTATIONS), among(("cpu", "cuda"))
