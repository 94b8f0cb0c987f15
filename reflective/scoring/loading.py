"""``rf.load_head``: a head from wherever it lies, in its own form."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.repository import directory
from .forms import Form, form_of
from .heads import FLOATS, GatedLinear, Head, LinearHead
from .sprm import SPRM
from .taps import Norm, Tap

FILES = ("score_module.*", "reflective.json", "config.json", "training_state.json")


def load_head(
    path: str | Path,
    *,
    model: Any = None,
    layers: tuple[int, ...] | None = None,
    norm: Norm | None = None,
    output: int | None = None,
    dtype: torch.dtype | None = None,
    **where: Any,
) -> Head:
    """A published head of any form that can ride in a stream, or one of ours; ``head.form`` tells which it is, ``head.tap`` where it reads
    the model, ``head.unknown`` what its file does not say and was assumed.

    The form is found by the keys and shapes of the tensors: MetaStone-S1's and XBai's (``SPRM``), STEP's and Gambit's MLP, SWIFT, SingProbe's
    MLP, and linear probes. Pickled code is never run.

    Args:
        path: a ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file, a directory with one, or a repository of the Hub.
        model: a model of transformers, or its configuration; needed where the file does not say which layers it reads (SWIFT).
        layers, norm: instead of what the file says, see ``Tap``.
        output: which output of a head that has several (SingProbe's).
        dtype: None: that of the file; float32 for weights of 8 bits.
        where: ``revision``, ``cache_dir``, ``local_files_only``: see ``utils.repository.directory``.

    Returns:
        The head, in eval mode.

    Raises:
        FileNotFoundError: no such file or repository.
        ValueError: no form that is known, one that cannot ride in a stream, NaN weights, layers that are not known or do not fit; see
            ``scoring.forms``.
    """
    return head_of(found_form(path, output=output, **where), model=model, layers=layers, norm=norm, dtype=dtype)


def found_form(path: str | Path, *, output: int | None = None, **where: Any) -> Form:
    """What lies at ``path``, as ``load_head`` finds it."""
    place = directory(path, FILES, **where)
    return form_of(SPRM.found(place) or place, output=output)


def head_of(
    form: Form, *, model: Any = None, layers: tuple[int, ...] | None = None, norm: Norm | None = None, dtype: torch.dtype | None = None
) -> Head:  # fmt: skip
    """The head that ``form`` describes; arguments as for ``load_head``."""
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype={dtype!r}: a head computes in one of {', '.join(map(str, FLOATS))}")
    if model is not None:
        config = getattr(model, "config", model).get_text_config(decoder=True)
        form = form.for_model(
            config.hidden_size, config.num_hidden_layers, vocab_size=config.vocab_size, layers=layers, norm=norm
        )
    else:
        form = replace(form, layers=form.layers if layers is None else tuple(layers), norm=form.norm if norm is None else norm)
    if form.layers is None:
        raise ValueError(
            f"head: nothing says which of hidden_states its {form.width} inputs are; give layers=, or model=, of which it may read all"
        )
    made = [_floats(t, dtype) for t in form.tensors]
    with torch.device("meta"):
        head = _empty(form)
    head.load_state_dict(dict(zip(_keys(head), made, strict=True)), assign=True)
    head.use(
        tap=Tap(form.layers, form.norm, form.at), aggregation=form.aggregation, sigmoid=form.sigmoid, step_rule=form.step_rule,
        form=form.name, trained_on=form.trained_on, higher_is_better=form.higher_is_better, unknown=form.unknown,
    )  # fmt: skip
    head.check_finite()
    return head.requires_grad_(False).eval()


def _empty(form: Form) -> Head:
    """Without weights."""
    if form.kind == "mlp":
        return SPRM(form.width, len(form.tensors[0]), activation=form.activation or "relu")
    return {"linear": LinearHead, "gated_linear": GatedLinear}[form.kind](form.width)


def _keys(head: Head) -> list[str]:
    """Of its weights, in a form's order."""
    return list(head.state_dict())


def _floats(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    return weight.to(dtype or (torch.float32 if weight.dtype not in FLOATS else weight.dtype))

