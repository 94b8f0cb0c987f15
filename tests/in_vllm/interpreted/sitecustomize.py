# Has vLLM's Model Runner V2 run on a CPU, its Triton kernels in Triton's interpreter: slow, right, and for tests alone.
import os
import types

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends

    class Driver:
        is_active = staticmethod(lambda: True)

    backends.setdefault("cpu", types.SimpleNamespace(driver=Driver, compiler=None))
