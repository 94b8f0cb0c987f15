"""What ``engines/base.py`` asks of every engine, of the one in vLLM: the tests of ``tests/test_engines.py``."""

import pytest
import test_engines
from common import V2, settings
from test_engines import *

AT = "predict"
if V2:  # whose top-p kernel Triton's interpreter does not take
    usual = test_engines.sampling
    test_engines.sampling = lambda *seed, **more: usual(*seed, **{"top_p": 1.0, **more})


@pytest.fixture(scope="module")
def host(tiny):
    from transformers import AutoTokenizer

    from reflective.engines.vllm.host import VLLMHost

    host = VLLMHost(settings(tiny, at=AT), AutoTokenizer.from_pretrained(tiny))
    yield host
    assert host.core.stats()["kept"] == 0 and not host.core.under_way
    host.close()


@pytest.fixture(scope="module")
def kind(host, tiny, truth):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompts = [tokenizer.encode(text) for text in ("First add 3 and 4.\n\nThen", "a b")]
    return test_engines.Kind(
        lambda places: host.engine(batch_rows=places), prompts, lambda prompt, tokens: truth(prompt, tokens, AT)[0]
    )


del test_a_transformers_model_is_left_as_it_was_found  # noqa: F821
