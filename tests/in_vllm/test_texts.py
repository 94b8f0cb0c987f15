"""What README and docs/vllm.md show of vLLM runs as it stands there, but for a small model and its settings."""

import re
from pathlib import Path

import pytest
import vllm
from common import DELIMITER

import reflective.vllm

ROOT = Path(__file__).parents[2]
SMALL = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "block_size": 32}


@pytest.mark.parametrize("name", ["README.md", "docs/vllm.md"])
def test_a_program_of_ones_own(name, tiny, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    code = next(b for b in blocks if "vllm.settings" in b or "vllm.SamplingParams" in b)
    code = code.split("\n\nmodel = ")[0]  # a second vLLM in this process would end the first
    code, n = re.subn(
        r"settings\([^)]*\)(, max_model_len=\d+)?\)", "settings(path, delimiter=delimiter), **small)", code
    )
    code, m = re.subn(r"max_tokens=\d+", "max_tokens=20", code)
    assert n == m == 1
    if "start(llm)" not in code:  # which a GPU does not need
        code = code.replace("outputs = ", "reflective.vllm.start(llm)\noutputs = ")
    names = {
        "vllm": vllm, "reflective": reflective, "path": tiny, "delimiter": DELIMITER, "small": SMALL,
        "prompts": ["First add 3 and 4.", "a b"],
    }  # fmt: skip
    exec(code, names)  # noqa: S102
    assert len(names["outputs"]) == 2 and all(len(o.outputs) == 8 for o in names["outputs"])
    assert len(names["scores"]) in (2, 8)  # of both outputs, or of the last one
    names["llm"].llm_engine.engine_core.shutdown()
