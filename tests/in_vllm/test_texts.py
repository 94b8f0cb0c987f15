"""What docs/vllm.md shows of a vLLM program runs as it stands there, but for a small model and its settings."""

import re
import sys
from pathlib import Path

import pytest
import vllm
from common import DELIMITER

import reflective.vllm

sys.path.append(str(Path(__file__).parents[1]))
import pages

SMALL = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "block_size": 32}
HERE = [b for b in pages.blocks("docs/vllm.md", "python") if b.run_by and b.run_by.endswith(Path(__file__).name)]


@pytest.mark.parametrize("block", HERE, ids=str)
def test_a_program_of_ones_own(block, tiny, capsys):
    code, n = re.subn(r"settings\((?:path|\"[^\"]*\")([^)]*)\)(, max_model_len=\d+)?\)", r"settings(path, delimiter=delimiter\1), **small)", block.code)
    code, m = re.subn(r"max_tokens=\d+", "max_tokens=20", code)
    assert n == m == 1
    if "start(llm)" not in code:  # which a GPU does not need
        code = code.replace("outputs = ", "reflective.vllm.start(llm)\noutputs = ")
    names = {
        "vllm": vllm, "reflective": reflective, "LLM": vllm.LLM, "SamplingParams": vllm.SamplingParams, "path": tiny, "delimiter": DELIMITER,
        "small": SMALL, "prompts": ["First add 3 and 4.", "a b"], "question": "First add 3 and 4.",
    }  # fmt: skip
    exec(code, names)  # noqa: S102
    asked = 2 if "prompts" in code else 1
    assert len(names["outputs"]) == asked and all(len(o.outputs) == 8 for o in names["outputs"])
    assert len(names["scores"]) in (asked, 8)  # of all outputs, or of the last one
    names["llm"].llm_engine.engine_core.shutdown()


def test_both_programs_are_here():
    assert len(HERE) == 2
