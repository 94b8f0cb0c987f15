"""Rows of a key-value cache: taken out of the batch that decodes, kept aside, joined to it again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .internals import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    cache_layers,
    cache_of_layers,
    takes_dynamic_cache,
)


def check_rows_apart(model: PreTrainedModel) -> None:
    """Whether rows of the model's cache can be taken and joined: it consists of keys and values and nothing else.

    Sliding windows are fine: search keeps every key, and the model's mask does the window.

    Raises:
        ValueError: naming the model and the part of its cache that stands in the way.
    """
    name = type(model).__name__
    if not takes_dynamic_cache(model):
        raise ValueError(f"model: {name} has a cache of its own kind, whose rows cannot be taken apart for candidates")
    for layer in cache_layers(model.config.get_text_config(decoder=True)):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"model: the cache of {name} has a {type(layer).__name__}; candidates need one of keys and values alone"
            )


class RoomyLayer(DynamicLayer):
    """A ``DynamicLayer`` that appends where there is room: transformers' copies all keys and values at every token.

    What the model is given are views of buffers that are an eighth longer than needed, and by 64 tokens at least.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._append("keys", key_states), self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        """``new`` behind what there is, [B, heads, length, width]."""
        old, room = getattr(self, name), self._rooms.get(name)
        begin = old.shape[2] if old.numel() else 0
        end = begin + new.shape[2]
        # Whoever assigned other keys has left the buffer behind.
        if room is None or room.data_ptr() != old.data_ptr() or len(room) != len(new) or room.shape[2] < end:
            room = self._rooms[name] = new.new_empty(*new.shape[:2], end + max(64, end // 8), new.shape[3])
            if begin:
                room[:, :, :begin] = old
        room[:, :, begin:end] = new
        return room[:, :, :end]


@dataclass(frozen=True)
class Row:
    """One sequence's keys and values. Never written to, so that forks may share it.

    Attributes:
        layers: per layer keys and values, [heads, length, width] each, without padding; None for a layer that has none.
        length: tokens, with those of ``begin``.
        begin: another row, behind which these are; None: they are all.
    """

    layers: list[tuple[Tensor, Tensor] | None]
    length: int
    begin: "Row | None" = None

    def to(self, device: torch.device) -> "Row":
        """The same there, but for its ``begin``, which is somebody else's."""
        return replace(self, layers=[layer and (layer[0].to(device), layer[1].to(device)) for layer in self.layers])

    def whole(self) -> "Row":
        """The same in one piece."""
        if self.begin is None:
            return self
        pairs = zip(self.begin.whole().layers, self.layers, strict=True)
        layers = [a and tuple(torch.cat([x.to(y.device), y], 1) for x, y in zip(a, b, strict=True)) for a, b in pairs]
        return Row(layers, self.length)

    def behind(self, begin: "Row") -> "Row":
        """The same behind ``begin``, whose tokens are its first; nothing is copied."""
        if self.begin is begin:
            return self
        layers = [layer and (layer[0][:, begin.length :], layer[1][:, begin.length :]) for layer in self.whole().layers]
        return Row(layers, self.length, begin)

    @property
    def token_bytes(self) -> int:
        """That a token takes."""
        return sum(t.shape[0] * t.shape[2] * t.element_size() for layer in self.layers if layer for t in layer)


def new_cache() -> DynamicCache:
    """An empty cache whose rows can be taken and joined."""
    return cache_of_layers(RoomyLayer)


class Rows:
    """The sequences that decode together in one cache, padded on the left to the longest.

    Args:
        cache: of the sequences' prompts, padded on the left.
        lengths: tokens of each.
    """

    def __init__(self, cache: DynamicCache, lengths: Sequence[int]) -> None:
        self.cache, self.lengths = cache, list(lengths)

    def take(self, i: int) -> Row:
        """A copy of sequence ``i``."""
        length = self.lengths[i]

        def tail(x: Tensor) -> Tensor:
            return x[i, :, x.shape[2] - length :].clone()

        return Row([_has(layer) and (tail(layer.keys), tail(layer.values)) for layer in self.cache.layers], length)

    def arrange(self, keep: Sequence[int], join: Sequence[Row] = ()) -> None:
        """Go on with sequences ``keep``, in this order, and behind them those of ``join``."""
        kept = max((self.lengths[i] for i in keep), default=0)
        self.lengths = [self.lengths[i] for i in keep] + [row.length for row in join]
        width, index = max(self.lengths, default=0), torch.tensor(keep, dtype=torch.int64)

        def place(old: Tensor, joined: list[Tensor]) -> Tensor:
            new = old.new_zeros(len(self.lengths), old.shape[1], width, old.shape[3])
            source = old[:, :, old.shape[2] - kept :]
            new[: len(keep), :, width - kept :] = source[index.to(old.device, non_blocking=True)]
            for target, row in zip(new[len(keep) :], joined, strict=True):
                target[:, width - row.shape[1] :] = row
            return new

        for number, layer in enumerate(self.cache.layers):
            if _has(layer):  # keys first, then values: the old keys are gone before the new values exist
                layer.keys = place(layer.keys, [row.layers[number][0] for row in join])
                layer.values = place(layer.values, [row.layers[number][1] for row in join])

    def mask(self, device: torch.device) -> Tensor | None:
        """Attention mask [R, T + 1] for the next token of each; None where nothing is padded."""
        width = max(self.lengths)
        if width == min(self.lengths):
            return None
        begins = torch.tensor([width - n for n in self.lengths]).to(device, non_blocking=True)
        return (torch.arange(width + 1, device=device) >= begins[:, None]).long()

    def grown(self) -> None:
        """Each sequence has got a token."""
        self.lengths = [n + 1 for n in self.lengths]


def free_bytes(device: torch.device) -> int | None:
    """Of the device's memory; None where that is not known."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return None


def _has(layer: Any) -> bool | None:
    """True for a layer that holds keys, None for one that borrows another's."""
    return True if layer.keys is not None else None
