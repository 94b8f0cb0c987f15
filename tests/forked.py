"""What goes wrong under limits that a process cannot take back, in a process that is thrown away."""

import os
from collections.abc import Callable
from typing import Any


def error_of(do: Callable[[], Any]) -> str:
    """``Type: message`` of what ``do`` ends with in a fork of this process; empty if it ends well."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        said = ""
        try:
            do()
        except BaseException as error:  # noqa: BLE001
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as told:
        said = told.read()
    os.waitpid(pid, 0)
    return said
