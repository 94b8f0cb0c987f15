"""The README's first example, as it stands there, on whatever reflective this Python has installed.

``python release/first_example.py README.md`` makes the checkpoint that the example loads, a random one of four layers in the
published form, so that nothing is downloaded, and runs the example on it. Of the packages that reflective does not
depend on none is needed.
"""

import re
import string
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import reflective as rf
from reflective.scoring import ops

NAME = "MetaStone-S1-1.5B"  # as the README calls it
END = 1  # the token that ends a response


def checkpoint(folder: Path) -> None:
    """A transformers directory with ``score_module.pt`` beside the weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_tokens([f"{letter}.\n\n" for letter in string.ascii_letters])  # of 310 tokens 52 end a step
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, eos_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rf.SPRM(64, 16).save_pretrained(folder / "score_module.pt")


def main() -> None:
    code = re.search(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(encoding="utf-8"), re.DOTALL)[1]
    if NAME not in code:
        sys.exit(f"the first example of {sys.argv[1]} does not load {NAME!r}: teach release/first_example.py the new one")
    if ops.WHY_NO_EXTENSION:
        sys.exit(f"the compiled backend is missing: {ops.WHY_NO_EXTENSION}")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder))
        names: dict[str, object] = {}
        exec(code.replace(NAME, folder).replace("2048", "64"), names)  # noqa: S102
    scores = names["scores"]
    question = re.search(r'tokenizer\("([^"]+)"', code)[1]
    prompt = len(names["tokenizer"](question)["input_ids"])
    if not scores.n_steps.sum():
        sys.exit("no step was scored")
    rows = [row[: row.index(END, prompt) + 1] if END in row[prompt:] else row for row in names["out"].tolist()]
    again = rf.score(names["model"], names["head"], names["steps"], rows, prompt_lengths=prompt)
    torch.testing.assert_close(scores.n_steps, again.n_steps)
    torch.testing.assert_close(scores.score, again.score, rtol=2e-2, atol=0)  # of a bfloat16 model, batched otherwise
    print(
        f"scored {int(scores.n_steps.sum())} steps of {len(scores)} candidates by {names['scorer'].backend.name}; a second pass agrees; "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, reflective in {Path(rf.__file__).parent}"
    )


if __name__ == "__main__":
    main()
