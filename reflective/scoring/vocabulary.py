"""What each entry of a tokenizer's vocabulary adds to a text, byte by byte, for any tokenizer of transformers."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

_CHUNK = 4096  # tokens decoded at once: cheap also where a decode copies its text with every token
_SAMPLE = 256  # entries by which a spelling is told
_BYTE_NAME = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """What ``read_vocabulary`` finds.

    Attributes:
        ids: the id of every entry, by its spelling where that is a text.
        texts: the bytes of every id, possibly part of a character; None for special and unused ids.
        unclear: ids that hold part of a character which the tokenizer shows as U+FFFD only, as do their ``texts``.
    """

    ids: dict[str, int]
    texts: list[bytes | None]
    unclear: list[int] = field(default_factory=list)


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The text of every id as UTF-8 bytes, possibly part of a character; None for special and unused ids."""
    return read_vocabulary(tokenizer).texts


def read_vocabulary(tokenizer: Any) -> Vocabulary:
    """The text that ``decode`` makes of each entry, added tokens included, when it stands between two others.

    ``decode`` shows characters, and an entry may be part of one. So entries are read from their spelling, as the
    backend's decoder says, as a tiktoken encoding inside the tokenizer knows, or byte-level or sentencepiece-style,
    whichever agrees. Then all are decoded, each between two others, and where that differs, ``decode`` is right. Two
    exceptions, where it shows names in place of text: sentencepiece's bytes (``<0x0A>``) in transformers' Python
    classes, and a backend that has a byte-level or Metaspace pre-tokenizer but no decoder.

    Raises:
        ValueError: what is given is no tokenizer of transformers, its methods fail, or its ``decode`` does not join
            the texts of its entries. The message names the class.
    """
    vocab, added, special = _entries(tokenizer)
    pieces: dict[int, str | bytes] = dict(zip(vocab.values(), vocab, strict=True))
    pieces.update((i, token.content) for i, token in added.items())
    ordinary = pieces.copy()
    for i in special:
        ordinary.pop(i, None)
    decoding = _Decoding(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    read, shown = (None, True) if backend is None else _backend_reader(backend)
    texts: dict[int, bytes] = {}
    certain: dict[int, bytes] = {}
    if read is not None:
        texts = {i: read(piece) for i, piece in ordinary.items()}
    elif backend is None:
        texts = _agreeing(decoding, _readings(tokenizer, ordinary))
        if texts and hasattr(tokenizer, "sp_model"):
            names = {i: _BYTE_NAME.fullmatch(piece) for i, piece in ordinary.items() if isinstance(piece, str)}
            certain = {i: bytes.fromhex(name[1]) for i, name in names.items() if name}
            texts = {i: text for i, text in texts.items() if i not in certain}
    size = 1 + max([*pieces, *texts, _declared_size(tokenizer) - 1 if backend is None else -1])
    # Not in get_vocab, as special tokens of some classes, and those spelled as another, such as U+FFFD for any part of
    # a character.
    unnamed = sorted(set(range(size)).difference(pieces)) if len(pieces) < size else []
    ids = vocab if backend is not None else _names({texts[i]: i for i in unnamed if i in texts}) | _names(vocab)
    ids.update((token.content, i) for i, token in added.items() if token.content not in ids)
    if texts and shown:
        unclear = decoding.correct(texts, [i for i in unnamed if i not in texts])
    elif texts:
        unclear = []
    else:
        texts, unclear = decoding.one_by_one([*ordinary, *unnamed])
    by_id: list[bytes | None] = [None] * size
    for i, text in (texts | certain if certain else texts).items():
        # Some classes skip more than they call special, as the first that ran on tiktoken.
        if text or (i in pieces and not decoding.decode([i], skip_special_tokens=False)):
            by_id[i] = text
    for i in special.intersection(texts):
        by_id[i] = None
    return Vocabulary(ids, by_id, unclear)


def _declared_size(tokenizer: Any) -> int:
    """The vocab_size of a class of one's own, which may count ids that its get_vocab leaves out; 0 where it has none."""
    try:
        return int(tokenizer.vocab_size)
    except Exception:  # noqa: BLE001
        return 0


def _names(vocab: dict[str | bytes, int]) -> dict[str, int]:
    """The entries that are texts, those spelled in bytes too."""
    names = {piece.decode(errors="replace") if isinstance(piece, bytes) else piece: i for piece, i in vocab.items()}
    return {name: i for name, i in names.items() if "\ufffd" not in name}


def _entries(tokenizer: Any) -> tuple[dict[str | bytes, int], dict[int, Any], set[int]]:
    """The vocabulary as the tokenizer gives it, its added tokens, and the ids of its special ones."""
    name, methods = type(tokenizer).__name__, dir(tokenizer)
    if "get_vocab" not in methods and hasattr(getattr(tokenizer, "tokenizer", None), "get_vocab"):
        raise ValueError(f"tokenizer is a {name}: give the tokenizer inside it, its attribute tokenizer")
    if not {"get_vocab", "decode", "all_special_ids"}.issubset(methods):
        raise ValueError(
            f"tokenizer is a {name}, not a tokenizer of transformers: give what AutoTokenizer.from_pretrained returns, "
            "for one of the tokenizers library PreTrainedTokenizerFast(tokenizer_object=...), or name the ids "
            "yourself, StepTokens(step_ids=...)"
        )
    try:
        vocab = dict(tokenizer.get_vocab())
        special = {int(i) for i in tokenizer.all_special_ids if i is not None}
    except Exception as error:
        raise _unreadable(tokenizer, f"get_vocab or all_special_ids fails, {type(error).__name__}: {error}") from error
    try:
        added = dict(tokenizer.added_tokens_decoder)
    except (AttributeError, NotImplementedError, TypeError):  # mistral-common's raises, as a property or a method
        added = {}
    return vocab, added, special.union(i for i, token in added.items() if token.special)


def _unreadable(tokenizer: Any, why: str) -> ValueError:
    return ValueError(
        f"the vocabulary of a {type(tokenizer).__name__} cannot be read: {why}; give the model's fast tokenizer "
        "(tokenizer.json), or name the ids yourself, StepTokens(step_ids=...)"
    )


class _Decoding:
    """Entries between two anchors, as the tokenizer decodes them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.error = ""  # what decode raised last

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str | None:
        """The text of ids; None where the tokenizer fails.

        No special tokens are known among them, but not to skip any would make mistral-common spell out all others.
        """
        try:
            return self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        except Exception as error:  # noqa: BLE001  a class of one's own may raise anything
            self.error = f"{type(error).__name__}: {error}"
            return None

    def correct(self, texts: dict[int, bytes], more: Sequence[int]) -> list[int]:
        """Sets those of ``texts`` right that ``decode`` contradicts, and puts in those of the ids ``more``.

        Returns:
            Of these the ids shown as part of a character.
        """
        anchor = self.anchor(texts)
        if anchor is None:
            return []
        unclear = []
        ends = texts[anchor].decode()
        for i in [*self.wrong(texts, list(texts), anchor), *more]:
            text = self.decode([anchor, i, anchor])
            if text is None:  # as of an added token whose characters the class does not expect: the spelling stands
                continue
            if len(text) < 2 * len(ends) or not (text.startswith(ends) and text.endswith(ends)):
                if "\ufffd" in text:
                    continue  # the anchor is a byte itself
                raise self.no_text(i, [anchor, i, anchor])
            texts[i] = _utf8(text[len(ends) : len(text) - len(ends)])
            if "\ufffd" in text:
                unclear.append(i)
        return unclear

    def anchor(self, texts: Mapping[int, bytes]) -> int | None:
        """An entry that decodes to the text it is read as, wherever it stands; preferably of several letters.

        Of several, as sentencepiece shows a letter spelled as a byte, ``<0x41>``, as U+FFFD next to part of a character.
        """
        for suits in (
            lambda text: text.isalpha() and len(text) > 1,
            lambda text: text.strip() == text and len(text) > 1,
            lambda text: text.strip() == text and len(text) == 1,
        ):
            for i in islice((i for i, text in texts.items() if suits(text)), 64):
                text = texts[i].decode(errors="replace")
                if "\ufffd" not in text and self.decode([i, i]) == 2 * text:
                    return i
        return None

    def wrong(self, texts: Mapping[int, bytes], ids: Sequence[int], anchor: int) -> list[int]:
        """Those of ``ids`` that decode to another text, parts of characters (and U+FFFD) left out of both."""
        if len(ids) > _CHUNK:
            chunks = [ids[at : at + _CHUNK] for at in range(0, len(ids), _CHUNK)]
            return [i for chunk in chunks for i in self.wrong(texts, chunk, anchor)]
        row = [anchor, *ids, anchor]
        got = self.decode(row)
        want = b"".join([texts[i] for i in row]).decode(errors="ignore")
        if got == want or (got is not None and got.replace("\ufffd", "") == want.replace("\ufffd", "")):
            return []
        if len(ids) <= 1:
            return list(ids)
        half = len(ids) // 2
        return [i for part in (ids[:half], ids[half:]) for i in self.wrong(texts, part, anchor)]

    def one_by_one(self, ids: Sequence[int]) -> tuple[dict[int, bytes], list[int]]:
        """The texts of ids of which nothing is known but ``decode``, and which of them are part of a character.

        With an anchor A, ``decode([A, i, A])`` is ``decode([A, A])`` with the text of i put in, at one place for all: the
        first that fits, which is where the second A's text begins, with the space before it or after that of the first.
        """
        suitable = (lambda text: text.isalnum() and len(text) > 1, str.isalnum, str.strip)
        alone = {i: text for i in ids if (text := self.decode([i])) is not None}
        if ids and not alone:
            raise _unreadable(self.tokenizer, f"decode fails for all its ids, {self.error}")
        anchor = next((i for suits in suitable for i, text in alone.items() if suits(text)), None)
        if anchor is None:
            return {i: _utf8(text) for i, text in alone.items()}, []
        ends = self.decode([anchor, anchor]) or ""
        if len(ends) < 2 * len(alone[anchor]):  # as for speech, where decode takes a repeated token for one
            raise self.no_text(anchor, [anchor, anchor])
        low, high = 0, len(ends)
        whole = {}
        for i in alone:
            if (text := self.decode([anchor, i, anchor])) is None:
                continue
            whole[i] = text
            while not text.startswith(ends[:high]):
                high -= 1
            while not text.endswith(ends[low:]):
                low += 1
            if low > high or len(text) < len(ends):
                raise self.no_text(i, [anchor, i, anchor])
        texts = {i: text[low : len(text) - len(ends) + low] for i, text in whole.items()}
        return {i: _utf8(text) for i, text in texts.items()}, [i for i, text in texts.items() if "\ufffd" in text]

    def no_text(self, i: int, row: Sequence[int]) -> ValueError:
        return _unreadable(
            self.tokenizer, f"decode does not join texts, token {i} has none of its own in {row}, {self.decode(row)!r}"
        )


def _backend_reader(backend: Any) -> tuple[Callable[[str], bytes] | None, bool]:
    """From an entry of a fast tokenizer to its bytes, and whether ``decode`` shows these; None: it alone knows."""
    parts = _parts(backend.decoder)
    shown = bool(parts)
    if not shown:
        parts = [part for part in _parts(backend.pre_tokenizer) if part["type"] in ("ByteLevel", "Metaspace")]
    if any(part["type"] == "ByteLevel" for part in parts):
        return _read_byte_level, shown
    replaced = []
    for part in parts:
        match part:
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replaced.append((old, new))
            case {"type": "Metaspace", "replacement": old}:
                replaced.append((old, " "))
            case {"type": "ByteFallback" | "Fuse" | "Strip"}:
                pass
            case _:
                return None, shown
    byte_fallback = any(part["type"] == "ByteFallback" for part in parts)
    reader = _sentencepiece_reader(replaced, byte_fallback) if replaced or byte_fallback else None
    return reader, shown


def _parts(component: Any) -> list[dict]:
    """The descriptions of a backend's decoder or pre-tokenizer, nested sequences laid flat."""

    def flat(description: dict) -> list[dict]:
        inner = description.get("decoders") or description.get("pretokenizers")
        return [part for each in inner for part in flat(each)] if inner else [description]

    return [] if component is None else flat(json.loads(component.__getstate__()))


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # of a vocabulary of all numbers of characters


# GPT-2's alphabet: printable Latin-1 characters are themselves, the other bytes are U+0100 and up, in order.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_UNPRINTABLE = sorted(set(range(0x100)).difference(_PRINTABLE))
# To Latin-1, whose bytes are the byte's own; what is not in the alphabet goes where Latin-1 ends.
_LATIN_OF = {0x100 + n: byte for n, byte in enumerate(_UNPRINTABLE)} | dict.fromkeys(_UNPRINTABLE, 0xFFFF)


def _read_byte_level(piece: str) -> bytes:
    try:
        return piece.translate(_LATIN_OF).encode("latin-1")
    except UnicodeEncodeError:  # the byte-level decoder leaves such an entry as it is
        return _utf8(piece)


def _sentencepiece_reader(replaced: Sequence[tuple[str, str]], byte_fallback: bool) -> Callable[[str], bytes]:
    def read(piece: str) -> bytes:
        if byte_fallback and piece[:3] == "<0x" and (byte := _BYTE_NAME.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        for old, new in replaced:
            piece = piece.replace(old, new)
        return _utf8(piece)

    return read


def _read_one_byte(piece: str) -> bytes:
    """ByT5's spelling: a byte is the character of that number."""
    return piece.encode("latin-1") if len(piece) == 1 and piece <= "\xff" else _utf8(piece)


# Those of tokenizers written in Python, the likeliest first: of equally good ones the first is taken.
_SPELLINGS = (_read_byte_level, _sentencepiece_reader([("▁", " ")], True), _utf8, _read_one_byte)


def _readings(tokenizer: Any, pieces: Mapping[int, str | bytes]) -> Iterator[dict[int, bytes]]:
    """What a tokenizer without a backend may mean by its ordinary entries, the likeliest first."""
    for table in _tables(tokenizer):
        spelled = {i: piece if isinstance(piece, bytes) else _utf8(piece) for i, piece in pieces.items()}
        yield spelled | table
    for read in _SPELLINGS:
        yield {i: piece if isinstance(piece, bytes) else read(piece) for i, piece in pieces.items()}


def _tables(tokenizer: Any) -> Iterator[dict[int, bytes]]:
    """The bytes of ids, of each object inside a tokenizer whose library knows them."""
    seen, layer = {id(tokenizer)}, [tokenizer]
    for _ in range(3):  # mistral-common's lies that deep in transformers' class
        inside = [each for holder in layer for each in getattr(holder, "__dict__", {}).values()]
        layer = [each for each in inside if not isinstance(each, type) and not (id(each) in seen or seen.add(id(each)))]
        for engine in layer:
            if hasattr(engine, "decode_single_token_bytes") and hasattr(engine, "n_vocab"):  # tiktoken.Encoding
                table = {}
                for i in range(engine.n_vocab):
                    try:
                        table[i] = engine.decode_single_token_bytes(i)
                    except KeyError:  # a hole before the special tokens
                        continue
                yield table
            elif hasattr(engine, "id_to_byte_piece"):  # mistral_common's Tekkenizer
                yield {i: engine.id_to_byte_piece(i) for i in range(engine.num_special_tokens, engine.n_words)}


def _agreeing(decoding: _Decoding, readings: Iterator[dict[int, bytes]]) -> dict[int, bytes]:
    """The reading that ``decode`` contradicts least, by a sample; empty where it contradicts all in most entries."""
    best: dict[int, bytes] = {}
    fewest = 0.5
    for texts in readings:
        # Entries of letters and digits are read alike in every spelling.
        sample = [i for i, text in texts.items() if not text.isalnum()] or list(texts)
        sample = sample[:: 1 + len(sample) // _SAMPLE]
        anchor = decoding.anchor(texts)
        wrong = 1.0 if anchor is None else len(decoding.wrong(texts, sample, anchor)) / len(sample)
        if wrong < fewest:
            best, fewest = texts, wrong
        if wrong == 0:
            break
    return best
