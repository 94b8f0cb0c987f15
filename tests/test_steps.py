"""StepTokens against a slow oracle that reads texts with str methods, on tokenizers of every family made here."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from reflective.kernels.layout import END, NEXT_STATE, STEP, THINK
from reflective.scoring.steps import StepTokens, padding, token_bytes

THINK_TAG, END_TAG, SPECIAL = "<think>", "</think>", "<|special|>"


# Tokenizers of every family. Each comes with the bytes of its entries, stated when it is made: the oracle's input.


def with_tags(backend, texts, special_tags=False, before=""):
    """Adds the tags, which decode puts behind ``before``, and a special token to a backend and its entries' bytes."""
    backend.add_tokens([AddedToken(tag, special=special_tags) for tag in (THINK_TAG, END_TAG)])
    backend.add_special_tokens([SPECIAL])
    size = 1 + max(backend.get_vocab().values())
    texts = dict(texts)
    for tag in () if special_tags else (THINK_TAG, END_TAG):
        texts[backend.token_to_id(tag)] = (before + tag).encode()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=[SPECIAL])
    return tokenizer, [texts.get(i) for i in range(size)]


def byte_level(pieces=(), special_tags=False):
    """Byte-level BPE with all bytes and the given pieces of bytes."""
    alphabet = bytes_to_unicode()
    pieces = [bytes([b]) for b in range(256)] + [p for p in dict.fromkeys(pieces) if len(p) > 1]
    vocab = {"".join(alphabet[b] for b in piece): i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return with_tags(backend, dict(enumerate(pieces)), special_tags)


def trained_byte_level(corpus, vocab_size):
    """Byte-level BPE that merges across any characters, so that its entries end and begin anywhere."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    byte_of = {c: b for b, c in bytes_to_unicode().items()}
    texts = {i: bytes(byte_of[c] for c in piece) for piece, i in backend.get_vocab().items()}
    return with_tags(backend, texts)


def sentencepiece(pieces=()):
    """BPE as Llama and Gemma have it: a space is written as a low bar, unknown characters as <0xHH> bytes."""
    texts = {1 + b: bytes([b]) for b in range(256)}
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": i for i, (b,) in texts.items()}}
    for piece in dict.fromkeys(pieces):
        texts[len(vocab)] = piece.encode()
        vocab[piece.replace(" ", "▁")] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>"])
    return with_tags(backend, texts)


def word_level(words):
    """Whole words without a decoder: decode puts a space between any two."""
    backend = Tokenizer(models.WordLevel(vocab={w: i for i, w in enumerate(words)}, unk_token=words[0]))
    return with_tags(backend, {i: f" {w}".encode() for i, w in enumerate(words)}, before=" ")


def word_piece(words):
    """Words and, after ##, their continuations."""
    backend = Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token=words[0]))
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    texts = {i: (w[2:] if w[:2] == "##" else f" {w}").encode() for i, w in enumerate(words)}
    return with_tags(backend, texts, before=" ")


# The oracle: the specification's sentences, in the order in which they stand.


def oracle(ids, candidates, think, end, prompt_length=0):
    """Which candidates count: not directly after think-start, ``a + 2 <= t <= e``, after the prompt."""
    a = ids.index(think) if ids.count(think) == 1 else 0
    e = ids.index(end) if ids.count(end) == 1 else len(ids)
    after_think = {t + 1 for t, i in enumerate(ids) if i == think}
    return sorted(t for t in candidates if a + 2 <= t <= e and t >= prompt_length and t not in after_think)


def id_candidates(ids, step_ids):
    """Step-tokens that follow no step-token."""
    return [t for t, i in enumerate(ids) if i in step_ids and not (t > 0 and ids[t - 1] in step_ids)]


def text_candidates(ids, texts, delimiters, think):
    """Tokens in which a delimiter ends that has more than whitespace before it."""
    found = set()
    text, token_of, suppressed = b"", [], False
    for t, i in enumerate([*ids, None]):
        if i is not None and i != think and texts[i] is not None:
            text, token_of = text + texts[i], token_of + [t] * len(texts[i])
            continue
        # Neither a delimiter nor the whitespace before one reaches across a token without text.
        position = 0
        while ends := [(at + len(d), at) for d in map(str.encode, delimiters) if (at := text.find(d, position)) >= 0]:
            stop, start = min(ends)
            if text[position:start].decode(errors="replace").strip():
                suppressed = False
            if not suppressed:
                found.add(token_of[stop - 1])
            suppressed, position = True, stop
        text, token_of, suppressed = b"", [], i == think
    return found


def random_batch(rng, choices, n_rows, longest, vocab_size):
    """Rows of ids with padding on both sides, and prompt lengths."""
    rows = [rng.choices(*choices, k=rng.randint(1, longest)) for _ in range(n_rows)]
    ids = torch.tensor([[rng.choice([-1, vocab_size, 0]) for _ in range(longest + 3)] for _ in rows])
    mask = torch.zeros_like(ids)
    pads = [rng.randint(0, ids.shape[1] - len(row)) for row in rows]
    for b, (row, pad) in enumerate(zip(rows, pads, strict=True)):
        ids[b, pad : pad + len(row)] = torch.tensor(row)
        mask[b, pad : pad + len(row)] = 1
    return rows, pads, ids, mask, [rng.choice([0, rng.randint(0, len(row))]) for row in rows]


def assert_same(steps, expected, rng, choices, device, n_rows=400, longest=14):
    """``steps.mask`` equals ``expected(row, prompt_length)`` on random rows, and some steps count."""
    rows, pads, ids, mask, prompts = random_batch(rng, choices, n_rows, longest, steps.vocab_size)
    got = steps.mask(ids.to(device), mask.to(device), prompts).cpu()
    total = 0
    for b, (row, pad, prompt) in enumerate(zip(rows, pads, prompts, strict=True)):
        want = expected(row, prompt)
        assert (got[b].nonzero().flatten() - pad).tolist() == want, (row, prompt)
        total += len(want)
    assert total > n_rows / 20


PIECES = [
    b".\n\n", b".\n", b"\n\n", b".\n\nA", b" .\n\n.", b"\n\nb", b"x.\n\n y.\n", b"\n.", b".\n\n \n.\n\n", b"..", b" \n",
    "。\n".encode(), "\u3000".encode(), b"\xe3\x80", b"\x82\n", b"\x80", "\u3000.".encode(), b"\xc2", b"\xa0.\n",
    "é。".encode(), b"a", b"word", b" ", b"\n", b".", b"\x1c", b"\t.",
]  # fmt: skip
DELIMITERS = [
    [".\n\n"],
    ["。\n", ".\n\n"],
    ["\n\n", ".\n\n"],
    ["\n"],
    [".\n\n.", "\n\n", ".."],
    ["\u3000.", "."],
    ["a。\n", "。"],
    ["x.\n\n y", "\n\n "],
]


@pytest.mark.parametrize("delimiters", DELIMITERS, ids=repr)
@pytest.mark.parametrize("special_tags", [False, True])
def test_text_rule_on_random_bytes(delimiters, special_tags, device):
    """Any sequence of tokens, whatever part of a character or delimiter each holds."""
    rng = random.Random(repr(delimiters))
    tokenizer, texts = byte_level(PIECES, special_tags)
    assert token_bytes(tokenizer) == texts
    steps = StepTokens.from_tokenizer(tokenizer, "text", delimiters)
    think, end = steps.think_start_id, steps.think_end_id
    assert (think, end) == (texts.index(None) if special_tags else texts.index(b"<think>"), think + 1)
    pieces = [texts.index(piece) for piece in PIECES]
    others = [think, end, tokenizer.convert_tokens_to_ids(SPECIAL), ord("Q")]
    choices = [*pieces, *others], [4] * len(pieces) + [4, 3, 4, 6]

    def expected(row, prompt):
        return oracle(row, text_candidates(row, texts, delimiters, think), think, end, prompt)

    assert_same(steps, expected, rng, choices, device)


@pytest.mark.parametrize("delimiters", [[".\n\n"], ["。\n", "\n\n"], [" ."]], ids=repr)
def test_text_rule_on_sentencepiece(delimiters, device):
    rng = random.Random(repr(delimiters))
    pieces = [".\n\n", ".\n", "\n\n", ".\n\nA", " .\n\n.", "。\n", " ", " .", "。", "a", " b", "▁"]
    tokenizer, texts = sentencepiece([p for p in pieces if p != "▁"])
    assert token_bytes(tokenizer) == texts
    steps = StepTokens.from_tokenizer(tokenizer, "text", delimiters)
    think, end = steps.think_start_id, steps.think_end_id
    single_bytes = [1 + byte for byte in b".\n \xe3\x80\x82"]
    ids = [texts.index(p.encode(), 257) for p in pieces if p != "▁"] + single_bytes + [0, think, end]

    def expected(row, prompt):
        return oracle(row, text_candidates(row, texts, delimiters, think), think, end, prompt)

    assert_same(steps, expected, rng, (ids,), device)


@pytest.mark.parametrize(
    ("make", "words", "delimiter"),
    [
        (word_level, ["[UNK]", "a", ".", "so", "\n\n", "\n"], ". so"),
        (word_level, ["[UNK]", "a", ".", "so", "\n\n", "\n"], "\n"),
        (word_piece, ["[UNK]", "a", "##a", ".", "##.", "so", "##so", "##\n\n"], ".so"),
        (word_piece, ["[UNK]", "a", "##a", ".", "##.", "so", "##so", "##\n\n"], [".\n\n", ". s"]),
    ],
)
def test_text_rule_on_words(make, words, delimiter, device):
    """Tokenizers whose entries say nothing of the spaces between them: read through decode."""
    tokenizer, texts = make(words)
    assert token_bytes(tokenizer) == texts
    steps = StepTokens.from_tokenizer(tokenizer, "text", delimiter)
    think, end = steps.think_start_id, steps.think_end_id
    delimiters = [delimiter] if isinstance(delimiter, str) else delimiter

    def expected(row, prompt):
        return oracle(row, text_candidates(row, texts, delimiters, think), think, end, prompt)

    ids = list(range(len(words)))
    assert_same(steps, expected, random.Random(4), (ids + [think, end], [6] * len(ids) + [2, 1]), device)


WORDS = [
    "So",
    " 2",
    " + 3",
    " = 5",
    ".",
    "\n",
    "\n\n",
    ".\n\n",
    ".\n\n\n",
    " \n",
    "。\n",
    "é",
    "\u3000",
    ".\n\nNow",
    "  ",
]


def text_tokenizers():
    rng = random.Random(0)
    corpus = ["".join(rng.choices(WORDS, k=12)) for _ in range(200)]
    for vocab_size in (256, 275, 300, 340):
        yield trained_byte_level(corpus, vocab_size)
    yield sentencepiece([" "])
    yield sentencepiece(["S", "o", " ", ".", "2", "+", "N", "w"])


@pytest.mark.parametrize(("tokenizer", "texts"), list(text_tokenizers()))
def test_every_tokenizer_finds_the_same_places(tokenizer, texts, device):
    """The text rule on encoded texts: the place of the step does not depend on how the tokenizer splits."""
    rng = random.Random(1)
    assert token_bytes(tokenizer) == texts
    steps = StepTokens.from_tokenizer(tokenizer, "text", [".\n\n", "。\n"])
    n_found = 0
    for _ in range(60):
        text = "ab" + "".join(rng.choices(WORDS, k=15))
        ids = tokenizer.encode(text, add_special_tokens=False)
        ends = np.cumsum([len(texts[i]) for i in ids])
        assert ends[-1] == len(text.encode()) and b"".join(texts[i] for i in ids) == text.encode()
        want, rest, suppressed = [], text, False
        while marks := [(rest.find(d) + len(d), rest.find(d)) for d in (".\n\n", "。\n") if d in rest]:
            stop, start = min(marks)
            if not suppressed or rest[:start].strip():
                byte = len(text.encode()) - len(rest[stop:].encode()) - 1
                want.append(int(np.searchsorted(ends, byte, side="right")))
            suppressed, rest = True, rest[stop:]
        want = sorted({t for t in want if t >= 2})
        assert steps.mask(torch.tensor(ids, device=device))[0].nonzero().flatten().tolist() == want
        n_found += len(want)
    assert n_found > 60


def test_id_rules_on_random_ids(device):
    """By hand: tags missing, once and more often; a step-token that is the think-end tag too."""
    for step_ids, think, end in [([3, 5], 1, 2), ([3, 2], 1, 2), ([3], None, 2), ([3, 4], 1, None), ([0], None, None)]:
        steps = StepTokens(step_ids, think, end, vocab_size=7)

        def expected(row, prompt, step_ids=step_ids, think=think, end=end):
            candidates = [t for t in id_candidates(row, step_ids) if t == 0 or row[t - 1] != think]
            return oracle(row, candidates, think, end, prompt)

        assert_same(steps, expected, random.Random(repr(step_ids)), (range(7), [3, 1, 1, 3, 3, 3, 3]), device)


# One line a sentence of the specification. "!" marks the steps that count; names in <> are entries of their own.
CASES = {
    "id rule: the first of a run counts": (None, ["a", "a", "!S", "S", "S", "a", "!S"]),
    "id rule: one directly after think does not, nor the run it begins": (
        None,
        ["a", "<think>", "S", "S", "a", "!S"],
    ),
    "id rule: before think and after its end nothing counts": (
        None,
        ["a", "a", "S", "<think>", "a", "!S", "</think>", "S"],
    ),
    "id rule: nothing counts at the text's first two tokens": (None, ["S", "S", "a", "!S"]),
    "id rule: a second token does not begin a step": (None, ["a", "S", "S", "a", "!S"]),
    "id rule: think twice is as none, but suppresses": (
        None,
        ["a", "a", "!S", "<think>", "S", "<think>", "S", "a", "!S", "</think>", "S"],
    ),
    "id rule: think-end twice is as none": (None, ["<think>", "a", "!S", "</think>", "!S", "</think>", "!S"]),
    "id rule: two tokens after think it counts": (None, ["<think>", "a", "!S"]),
    "in one token": ([".\n\n"], ["a", "b", "!.\n\n"]),
    "split in two": ([".\n\n"], ["a", "b", ".", "!\n\n"]),
    "split in two, elsewhere": ([".\n\n"], ["a", "b.\n", "!\nc"]),
    "split in three": ([".\n\n"], ["a", ".", "\n", "!\n"]),
    "split in four": (["etc.\n"], ["a", "et", "c", ".", "!\n", "etc"]),
    "bytes of one character": (["。\n"], ["a", b"\xe3", b"\x80", b"\x82", "!\n"]),
    "bytes across characters": (["。\n"], ["a", b"x\xe3\x80", b"!\x82\n"]),
    "in a token's middle": ([".\n\n"], ["a", "b", "!c.\n\nd", "e"]),
    "a token ends one and begins the next": ([".\n\n"], ["a", "b.", "!\n\nc.", "!\n\n"]),
    "a token that holds two is one step": ([".\n\n"], ["a", "a", "!b.\n\nc.\n\nd", "d", "!.\n\n"]),
    "delimiters do not overlap": ([".\n\n.\n\n"], ["a", "b", "!.\n\n.\n\n", ".\n\n", "a", "!.\n\n.\n\n"]),
    "delimiters do not overlap, split": (["\n\n"], ["a", "b", "\n", "!\n", "\n", "x", "\n", "!\n"]),
    "only whitespace between two: a run": ([".\n\n"], ["a", "b", "!.\n\n", " \n\t", ".\n\n", "\u3000", ".\n\n", "c"]),
    "whitespace of several bytes, split": ([".\n\n"], ["a", "b", "!.\n\n", b"\xe3\x80", b"\x80.", "\n\n"]),
    "half a whitespace is none": ([".\n\n"], ["a", "b", "!.\n\n", b"\xe3\x80", ".", "!\n\n"]),
    "a point between two is more than whitespace": ([".\n\n"], ["a", "b", "!.\n\n", "..", "!\n\n"]),
    "whitespace and a point": ([".\n\n"], ["a", "b", "!.\n\n", " .", "\n", " .\n", "!\n"]),
    "the delimiter's own point arms nothing": ([".\n\n"], ["a", "b", "!.\n\n", ".\n\n", ".\n", "\n", "a.", "!\n\n"]),
    "several delimiters at once": ([".\n\n", "?\n\n"], ["a", "b", "!.\n\n", "?", "\n\n", "c?", "!\n\n"]),
    "of delimiters that end together the longest": (["\n\n", ".\n\n"], ["a", "b", "!\n\n", ".\n\n", "c", "!.\n\n"]),
    "the shorter alone is armed by the point": (["\n\n"], ["a", "b", "!\n\n", "!.\n\n"]),
    "the first to be complete": (["ab", "xabc"], ["q", "q", "x", "a", "!b", "c"]),
    "whitespace after think": ([".\n\n"], ["a", "<think>", "\n", "\n", ".\n\n", "b", "!.\n\n"]),
    "whitespace after think within tokens": ([".\n\n"], ["a", "<think>", "\n ", " .", "\n\n", "b.", "!\n\n"]),
    "directly after think, whatever the token holds": ([".\n\n"], ["a", "<think>", "b.\n\nc.\n\n", "d", "!.\n\n"]),
    "and it begins a run": ([".\n\n"], ["a", "<think>", "b.\n\n", " .\n\n", "d", "!.\n\n"]),
    "directly after think, also where the tag is doubled": ([".\n\n"], ["a", "<think>", "a", "<think>", "b.\n\n"]),
    "begun before think it is none": ([".\n\n"], ["a", "b.", "<think>", "\n\n", "c", "!.\n\n"]),
    "the text's start suppresses nothing": ([".\n\n"], [" ", " ", "!.\n\n"]),
    "text indices 0 and 1 are no steps": ([".\n\n"], [".\n\n", ".\n\n", ".\n\n", "a", "!.\n\n"]),
    "a special token breaks a match": ([".\n\n"], ["a", "b.", SPECIAL, "\n\n", ".", "!\n\n"]),
    "a special token is no whitespace": ([".\n\n"], ["a", "b", "!.\n\n", SPECIAL, "!.\n\n"]),
    "added tokens have their text": ([">\n"], ["a", "a", "</think>", "!\n", "</think>", "!\n"]),
    "think-end may end a step": (["</think>"], ["a", "<think>", "a", "!</think>", "b"]),
    "after think-end nothing counts": ([".\n\n"], ["<think>", "b", "!.\n\n", "</think>", "c", ".\n\n"]),
    "think-end twice is as none": ([".\n\n"], ["<think>", "b", "</think>", "!.\n\n", "</think>", "!.\n\n"]),
}


@pytest.mark.parametrize("case", CASES)
def test_sentence_of_the_specification(case, device):
    delimiters, marked = CASES[case]
    mark = {str: "!", bytes: b"!"}
    pieces = [piece.removeprefix(mark[type(piece)]) for piece in marked]
    want = [t for t, (piece, whole) in enumerate(zip(pieces, marked, strict=True)) if piece != whole]
    pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    added = [tag.encode() for tag in (THINK_TAG, END_TAG, SPECIAL)]
    tokenizer, texts = byte_level([piece for piece in pieces if piece not in added])
    texts[tokenizer.convert_tokens_to_ids(SPECIAL)] = SPECIAL.encode()
    ids = [texts.index(piece) for piece in pieces]
    if delimiters is None:
        steps = StepTokens([ord("S")], texts.index(b"<think>"), texts.index(b"</think>"), vocab_size=len(texts))
    else:
        steps = StepTokens.from_tokenizer(tokenizer, "text", delimiters)
    assert steps.mask(torch.tensor(ids, device=device))[0].nonzero().flatten().tolist() == want


def test_prompt_and_its_tags(device):
    steps = StepTokens([3], 1, 2)
    ids = torch.tensor([[0, 1, 0, 3, 0, 3, 0, 3, 2, 3]], device=device)

    def found(*args):
        return steps.mask(ids, *args)[0].nonzero().flatten().tolist()

    assert found() == [3, 5, 7]
    assert found(None, 5) == [5, 7]  # <think> in the prompt still opens the region
    assert found(None, [8]) == []
    assert found(None, 10) == []
    assert steps.mask(ids[:, :4], None, 3)[0].tolist() == [False, False, False, True]
    doubled = torch.cat([ids, ids], 1)  # of the few-shot kind: tags twice, so the whole text is the region
    assert steps.mask(doubled, None, 10)[0].nonzero().flatten().tolist() == [13, 15, 17, 19]


def test_mask_takes_lists_and_single_rows():
    steps = StepTokens([3], 1, 2)
    ids = [1, 0, 3, 0, 3]
    want = [[False, False, True, False, True]]
    for given in (ids, [ids], torch.tensor(ids), torch.tensor([ids], dtype=torch.int32), np.array(ids)):
        got = steps.mask(given)
        assert got.dtype == torch.bool and got.tolist() == want
    assert steps.mask(ids, [0, 1, 1, 1, 1], 3).tolist() == [[False, False, False, False, True]]
    assert steps.mask(ids, torch.ones(1, 5, dtype=torch.bool), torch.tensor(3)).sum() == 1


def test_padding():
    pad, length = padding([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]], (4, 4), "cpu")
    assert pad.tolist() == [2, 0, 0, 1] and length.tolist() == [4, 4, 1, 3]
    assert pad.dtype == length.dtype == torch.int64
    pad, length = padding(None, (2, 3), "cpu")
    assert pad.tolist() == [0, 0] and length.tolist() == [3, 3]


def merged(*texts):
    """Byte-level BPE whose merges make one token of each text."""
    alphabet = bytes_to_unicode()
    vocab = {alphabet[b]: b for b in range(256)}
    merges = []
    for text in texts:
        word = "".join(alphabet[b] for b in text.encode())
        for n in range(1, len(word)):
            merges.append((word[:n], word[n]))
            vocab.setdefault(word[: n + 1], len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return with_tags(backend, {})[0]


def test_exact():
    tokenizer = merged(".\n\n", "?\n\n")
    steps = StepTokens.from_tokenizer(tokenizer, "exact", [".\n\n", "?\n\n"])
    assert [tokenizer.decode([i]) for i in steps.step_ids] == [".\n\n", "?\n\n"]
    assert (steps.think_start_id, steps.think_end_id) == tuple(tokenizer.convert_tokens_to_ids([THINK_TAG, END_TAG]))
    assert steps.vocab_size == len(tokenizer) and steps.rule == "exact" and steps.delimiters == (".\n\n", "?\n\n")


def test_exact_refuses_a_split_delimiter():
    tokenizer = merged("\n\n")
    ids = tokenizer.encode(".\n\n")
    with pytest.raises(ValueError, match=r"'\.\\n\\n' is 2 tokens here, \[46, 256\]; use rule=\"text\""):
        StepTokens.from_tokenizer(tokenizer, "exact")
    assert ids == [46, 256]
    unknown, _ = word_level(["[UNK]", "a"])
    unknown.unk_token = "[UNK]"
    with pytest.raises(ValueError, match=r"'nope' is unknown to the tokenizer; use rule=\"text\""):
        StepTokens.from_tokenizer(unknown, "exact", "nope")


def test_exact_refuses_a_delimiter_that_becomes_another():
    """Where whitespace is dropped the one token is the full stop, and every sentence would end a step."""
    tokenizer, _ = word_level(["[UNK]", "a", "."])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert len(tokenizer.encode(".\n\n")) == 1
    with pytest.raises(ValueError, match=r"'\.\\n\\n' becomes ' \.' here, token 2; use rule=\"text\""):
        StepTokens.from_tokenizer(tokenizer, "exact")
    assert StepTokens.from_tokenizer(tokenizer, "exact", ".").step_ids == (2,)


def test_exact_names_the_class_whose_encode_fails():
    with pytest.raises(ValueError, match=r"encode\('a'\) of a SimpleTokenizer fails, AttributeError"):
        StepTokens.from_tokenizer(SimpleTokenizer(["a", "\n"]), "exact", "a")


def test_contains():
    pieces = [b"\n\n", b".\n\n", b"a.\n\nb", b".\n", "。\n".encode(), b"\x82\n"]
    tokenizer, texts = byte_level(pieces)
    found = StepTokens.from_tokenizer(tokenizer).step_ids
    assert [texts[i] for i in found] == [b".\n\n", b"a.\n\nb"]
    found = StepTokens.from_tokenizer(tokenizer, delimiter=[".\n\n", "。"]).step_ids
    assert [texts[i] for i in found] == [b".\n\n", b"a.\n\nb", "。\n".encode()]
    with pytest.raises(ValueError, match=r"contains '\?\\n'; rule=\"text\""):
        StepTokens.from_tokenizer(tokenizer, "contains", [".\n\n", "?\n"])
    spaced, texts = sentencepiece(["a .", " ."])
    found = StepTokens.from_tokenizer(spaced, delimiter=" .").step_ids
    assert [texts[i] for i in found] == [b"a .", b" ."]


def test_zh():
    yes = ["\n", "。", "\n\n\n", "。。", "a\n", "\nb\n", "。\n", "\n\n。", "é。", "。”"]
    no = ["\n\n\n\n", "ab\n", "。\r\n", ".", "é", "ab。"]
    tokenizer, texts = byte_level([text.encode() for text in yes + no] + [b"\xe3\x80\n"])
    found = {texts[i].decode(errors="replace") for i in StepTokens.from_tokenizer(tokenizer, "zh").step_ids}
    assert found == {*yes, "\ufffd\n"}


@pytest.mark.parametrize("rule", ["zh", "text"])
def test_vocabulary_without_steps(rule):
    tokenizer, _ = word_piece(["[UNK]", "a", "##b"])
    with pytest.raises(ValueError, match="no entry of the vocabulary"):
        StepTokens.from_tokenizer(tokenizer, rule)


def test_tags_can_be_overridden():
    tokenizer, texts = byte_level([b".\n\n", b"<r>"])
    end = texts.index(b"</think>")
    steps = StepTokens.from_tokenizer(tokenizer, think_start_id=texts.index(b"<r>"))
    assert (steps.think_start_id, steps.think_end_id) == (texts.index(b"<r>"), end)
    steps = StepTokens.from_tokenizer(tokenizer, "text", think_start_id=None, think_end_id=None)
    assert steps.think_start_id is steps.think_end_id is None
    ids = [texts.index(b"<think>"), texts.index(b"</think>"), ord("a"), texts.index(b".\n\n")]
    assert steps.mask(ids)[0].tolist() == [False, False, False, True]
    assert StepTokens.from_tokenizer(SimpleTokenizer(["a", "\n"]), "text", "\n").think_start_id is None


class SimpleTokenizer:
    """A tokenizer without a backend: only what every tokenizer of transformers can do."""

    unk_token_id = None

    def __init__(self, pieces, special=()):
        self.pieces = pieces
        self.all_special_ids = [pieces.index(piece) for piece in special]
        self.added_tokens_decoder = {i: SimpleNamespace(content=pieces[i], special=True) for i in self.all_special_ids}

    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces) if piece is not None}

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(self.pieces[i] for i in ids).replace("▁", " ").lstrip(" ")


def test_tables():
    tokenizer, texts = byte_level(PIECES)
    steps = StepTokens.from_tokenizer(tokenizer, "text", ["。\n", ".\n\n"])
    assert steps.token_class.dtype == steps.transition.dtype == torch.int32
    assert steps.token_class.shape == (len(texts),) == (steps.vocab_size,)
    entries = steps.transition[steps.token_class.long()]
    assert (entries & NEXT_STATE).max() < entries.shape[1]
    assert (entries[steps.think_start_id] == entries[steps.think_start_id, 0]).all()
    assert entries[steps.think_start_id, 0] & ~NEXT_STATE == THINK
    assert (entries & THINK != 0).any(1).nonzero().tolist() == [[steps.think_start_id]]
    assert (entries & END != 0).all(1).nonzero().tolist() == [[steps.think_end_id]]
    ending = {i for i in range(len(texts)) if (entries[i] & STEP).any()}
    assert ending >= {texts.index(b"\n\n"), ord("\n"), texts.index(b".\n\nA")} and not ending & {ord("."), ord("a")}
    assert steps.token_class[tokenizer.convert_tokens_to_ids(SPECIAL)] == 0 and not steps.transition[0].any()
    assert len(steps.transition.unique(dim=0)) == len(steps.transition) < 60


def test_copies(device):
    steps = StepTokens([3, 5], 1, 2)
    assert steps.vocab_size == 6 and steps.step_ids == (3, 5) and steps.rule is None
    larger = steps.resized(9)
    assert larger.vocab_size == 9 and steps.vocab_size == 6 and larger.token_class[6:].tolist() == [0, 0, 0]
    ids = [0, 8, 3, 8, 5]
    assert larger.mask(ids)[0].nonzero().flatten().tolist() == [2, 4]
    assert larger.resized(6).token_class.equal(steps.token_class)
    assert StepTokens([0]).resized(3).mask([1, 2, 0, 1]).tolist() == [[False, False, True, False]]
    with pytest.raises(ValueError, match=r"token id 5 is outside a vocabulary of 5"):
        steps.resized(5)
    moved = steps.to(device)
    assert moved.device.type == device.type and moved.think_start_id == 1
    assert moved.mask(torch.tensor([[0, 0, 3]], device=device)).tolist() == [[False, False, True]]
    assert steps.to("meta").token_class.is_meta and not steps.token_class.is_meta


def test_check_model():
    tokenizer, texts = byte_level([b".\n\n"])
    steps = StepTokens.from_tokenizer(tokenizer)
    steps.check_model(len(texts))
    steps.check_model(len(texts) + 1024)
    with pytest.raises(ValueError, match=r"tokenizer and model differ: the tokenizer has \d+ entries"):
        steps.check_model(len(texts) + 1025)
    with pytest.raises(ValueError, match=r"tokenizer and model differ: token id \d+ is outside a vocabulary of 200"):
        steps.check_model(200)
    StepTokens([3]).check_model(150_000)  # nothing is known of the tokenizer
    large = StepTokens.from_tokenizer(SimpleTokenizer([*map(str, range(20_000)), "\n"]), "contains", "\n")
    large.check_model(22_000)
    with pytest.raises(ValueError, match="tokenizer and model differ"):
        large.check_model(22_500)


def test_repr():
    assert repr(StepTokens([9], 7, 8)) == (
        "StepTokens(step_ids=[9], think_start_id=7, think_end_id=8, vocab_size=10, classes=4, states=2, device='cpu')"
    )
    tokenizer, _ = byte_level([b".\n\n"])
    assert repr(StepTokens.from_tokenizer(tokenizer, "text")).startswith(
        "StepTokens(rule='text', delimiters=['.\\n\\n'], think_start_id="
    )
    assert "step_ids=[0, 1, 2, 3, 4, 5, ...] (20 ids)" in repr(StepTokens(range(20)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_ids": []}, "step_ids is empty"),
        ({"step_ids": [3], "vocab_size": 3}, r"step_ids: id 3 is outside the vocabulary, \[0, 3\)"),
        ({"step_ids": [-1]}, "step_ids: id -1 is outside"),
        ({"step_ids": [3], "think_start_id": 3}, "think_start_id=3 is among step_ids"),
        ({"step_ids": [3], "think_start_id": 9, "vocab_size": 5}, "think_start_id: id 9 is outside"),
        ({"step_ids": [3], "think_end_id": -2}, "think_end_id: id -2 is outside"),
        ({"step_ids": [3], "think_start_id": 4, "think_end_id": 4}, "are both 4"),
    ],
)
def test_bad_ids_by_hand(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepTokens(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "contain"}, "rule='contain' is not one of 'exact', 'contains', 'text', 'zh'"),
        ({"delimiter": ""}, "delimiter='' must be a non-empty text"),
        ({"delimiter": []}, r"delimiter=\[\] must be"),
        ({"rule": "text", "delimiter": [".", b"\n"]}, "must be a non-empty text or several"),
        ({"delimiter": "<think>"}, "is among step_ids"),
        ({"think_start_id": 10_000}, "think_start_id: id 10000 is outside the vocabulary"),
        ({"rule": "text", "think_end_id": 10_000}, "think_end_id: id 10000 is outside the vocabulary"),
    ],
)
def test_bad_rules(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepTokens.from_tokenizer(byte_level([b".\n\n"])[0], **arguments)


IDS = [[0, 0, 3, 0], [0, 0, 0, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), r"input_ids has shape \[1, 0\]: give at least one row of at least one token"),
        ((torch.empty(0, 4, dtype=torch.int64),), r"shape \[0, 4\]: give at least one row"),
        (([[], []],), r"shape \[2, 0\]: give at least one row of at least one token"),
        ((torch.zeros(2, 2, 2, dtype=torch.int64),), r"input_ids has shape \[2, 2, 2\]: give \[B, T\] or \[T\]"),
        ((torch.zeros(2, 2),), "input_ids has dtype torch.float32: give integers"),
        ((torch.zeros(2, 2, dtype=torch.bool),), "input_ids has dtype torch.bool"),
        (([[0, 1], [0]],), "input_ids is not one block of integers .* pad rows to one length"),
        (([[0, 0, 3, 0], [0, 4, 0, 0]],), r"input_ids\[1, 1\] = 4 is outside \[0, 4\)"),
        (([[0, -100, 3]],), r"input_ids\[0, 1\] = -100 is outside"),
        ((IDS, [[1, 1, 1, 1], [1, 0, 1, 1]]), "attention_mask row 1 has padding between its tokens"),
        ((IDS, [[1, 1, 1, 1], [0, 0, 0, 0]]), "attention_mask row 1 is all padding"),
        ((IDS, [[1, 1, 1]]), r"attention_mask has shape \[1, 3\], input_ids \[2, 4\]"),
        ((IDS, None, 5), "prompt_lengths of row 0 is 5, its text has 4 tokens"),
        ((IDS, [[1, 1, 1, 1], [0, 1, 1, 0]], [3, 3]), "prompt_lengths of row 1 is 3, its text has 2 tokens"),
        ((IDS, None, -1), "prompt_lengths of row 0 is -1"),
        ((IDS, None, [1, 2, 3]), r"prompt_lengths has shape \[3\]: give one number or \[2\]"),
        ((IDS, None, 1.5), "prompt_lengths has dtype torch.float32"),
    ],
)
def test_bad_input_of_mask(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepTokens([3]).mask(*arguments)


@pytest.mark.parametrize("size", [50_000, 70_000])
def test_a_tokenizer_much_larger_or_smaller_than_the_model_is_refused(size):
    steps = StepTokens([5], vocab_size=size)
    steps.rule = "contains"  # as from a tokenizer
    steps.check_model(size)
    with pytest.raises(ValueError, match="tokenizer and model differ"):
        steps.check_model(60_000)
