"""A path, or the name of a repository of the Hugging Face Hub, becomes a directory. No connection until a name is no path."""

from collections.abc import Sequence
from pathlib import Path


def is_repository(path: str | Path) -> bool:
    """Whether ``path`` can name a repository of the Hub: a text ``ORG/NAME``, no ``Path``, no file of weights."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(path, str) or path.count("/") != 1 or path.endswith((".pt", ".safetensors")):
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def directory(
    path: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """``path`` if there is such a file or directory, else the snapshot of the Hub repository of that name.

    What the cache lacks is downloaded, with ``huggingface_hub``'s progress bars. Token, cache, endpoint and offline mode are
    those of ``huggingface_hub`` (``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``).

    Args:
        path: a path, or ``ORG/NAME``.
        files: patterns of the files that are wanted, in the repository's top directory.
        revision: branch, tag or commit of the repository; None: ``main``.
        cache_dir: instead of the Hub's own.
        local_files_only: take what the cache has, without a connection.

    Raises:
        FileNotFoundError: no such path; no such repository or revision; it is not in the cache and there is no connection.
        PermissionError: a gated repository.
    """
    place = Path(path).expanduser()
    if place.exists():
        return place
    if not is_repository(path):
        raise FileNotFoundError(
            f"path={str(path)!r} is no file, nor a directory, nor ORG/NAME, which would be a repository of the Hub"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = snapshot_download(
            str(path), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only,
            allow_patterns=list(files), ignore_patterns=["*/*"],
        )  # fmt: skip
    except GatedRepoError as error:
        raise PermissionError(
            f"{path} is gated: ask for access at {constants.ENDPOINT}/{path}, then log in ('hf auth login', or HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is no directory here, and no repository at {constants.ENDPOINT}, or a private one: "
            "log in for these ('hf auth login', or HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"revision={revision!r}: the repository {path} has none of that name") from error
    except LocalEntryNotFoundError as error:
        offline, cause = local_files_only or constants.HF_HUB_OFFLINE, error.__cause__ or error
        failed = f"{constants.ENDPOINT} did not give it ({type(cause).__name__}: {cause})"
        why = "the Hub was not asked (offline mode)" if offline else failed
        raise FileNotFoundError(
            f"{path} is no directory here, the cache {cache_dir or constants.HF_HUB_CACHE} does not have all of it, "
            f"and {why}; with a connection, 'hf download {path}' gets it"
        ) from error
    return Path(found)
