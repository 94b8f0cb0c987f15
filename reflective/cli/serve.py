"""``reflective serve``: a model behind HTTP."""

from typing import Annotated

import typer

from .common import (
    DecodingOption,
    EngineOption,
    FetchOption,
    HeadOption,
    KVOption,
    ModelOption,
    VLLMOption,
    load_model,
)
from .help import REACH, SPEED

EXAMPLES = """
reflective serve
reflective serve --model ORG/NAME --host 0.0.0.0 --api-key "$KEY"
# then, from anywhere
curl -s localhost:8000/score -H 'Content-Type: application/json' \\
  -d '{"text": "15 + 7 = 22.\\n\\n22 + 16 = 38.\\n\\n"}'
"""


def serve(
    model: ModelOption = "default",
    head: HeadOption = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address; other machines reach the server on 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="REFLECTIVE_API_KEY", help="What clients must send as a bearer token.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model, for clients; default: that of its directory.")] = None,
    batch_rows: Annotated[
        int | None, typer.Option(rich_help_panel=SPEED, min=1, help="Candidates decoded together; default 32, in vLLM its max_num_seqs.")
    ] = None,
    decoding: DecodingOption = "auto",
    kv_tokens: KVOption = None,
    max_queue: Annotated[int, typer.Option(rich_help_panel=REACH, min=1, help="Requests that wait; more are answered with 503.")] = 64,
    max_candidates: Annotated[int, typer.Option(rich_help_panel=REACH, min=1, help="Of a request.")] = 64,
    max_body: Annotated[int, typer.Option(rich_help_panel=REACH, min=1, help="Bytes of a request.")] = 8 << 20,
    timeout: Annotated[float | None, typer.Option(rich_help_panel=REACH, min=0.001, help="Seconds for a request; default: no limit.")] = None,
    grace: Annotated[float, typer.Option(rich_help_panel=REACH, min=0, help="Seconds to finish in at shutdown.")] = 30.0,
    fetch: FetchOption = False,
    engine: EngineOption = "hf",
    vllm: VLLMOption = None,
) -> None:
    """Serve MetaStone-S1's /score and /generate, OpenAI's /v1/chat/completions and vLLM's /pooling and /score.

    Open its address (http://127.0.0.1:8000/ unless said otherwise) in a browser to ask, and to watch the candidates live.

    Requests that come at the same time are decoded in one batch. /health and /metrics (Prometheus) tell how it goes.
    """
    try:
        from ..serve.app import serve as run
        from ..serve.service import Limits
    except ModuleNotFoundError as error:
        raise ImportError(f"the server needs {error.name}: pip install 'reflective-kernels[serve]'") from error

    limits = Limits(body_bytes=max_body, candidates=max_candidates, seconds=timeout)
    run(
        load_model(model, head, fetch, engine=engine, vllm=vllm), host, port, api_key=api_key, name=name, limits=limits,
        batch_rows=batch_rows, decoding=decoding, kv_tokens=kv_tokens, max_queue=max_queue, grace=grace,
    )  # fmt: skip
