#!/usr/bin/env bash
# Scoring inside stock vLLM on this machine's GPU: every check and measurement, offline, in one call of limited length that always leaves something.
#
#     benchmarks/gpu_vllm.sh [--seconds 1500] [STAGE...]   # results in benchmarks/results and, after each stage, in $OUT where that is set
#     benchmarks/gpu_vllm.sh --rehearse [STAGE...]         # the same stages on a CPU build of vLLM, at toy sizes; results in build/rehearsal
#
# Stages, in this order: graphs sync overhead tp best_of_n; by default all of them. Each has a share of the time that is left, and what it
# leaves over goes to the next ones. One that fails does not keep the next from running, and the exit code tells; only a failed build ends the run.
#
# Needs python3 with a vLLM of the supported releases (>= 0.28, < 0.34) and what that brings, a C++ compiler and nvcc. PYTHON names another python3.
# REFLECTIVE_SITE names a folder with the package built elsewhere, as `setup.py build --build-lib` leaves it: nothing is compiled then.
# REFLECTIVE_COMMIT tells the commit where this tree is a copy without its history. No weights are needed: all are random, made on the spot.
set -uo pipefail

NAME=gpu_vllm
LIMIT=1500
WEIGHTS=(graphs 40 sync 10 overhead 60 tp 10 best_of_n 30) # a vLLM starts in half a minute to two, graphs needs eight of them
SMOKE=()
SIGNAL=TERM # vLLM's engines, processes of the same group, end by it too, and give back the GPU's memory
PUBLISHED=('*gpu_vllm*')
. "$(dirname "$0")/gpu_stages.sh"

build_for_vllm() {
    build || return
    # vLLM finds its plugins by the metadata of what is installed, which a built folder lacks.
    (cd "$SOURCE" && "$PYTHON" setup.py --quiet egg_info --egg-base "$SITE") || return
    PYTHONPATH=$SITE "$PYTHON" - <<'PY'
import platform
from importlib.metadata import entry_points
import torch, vllm, reflective
from reflective.benchmarks import record
from reflective.engines.vllm.core import check_version

check_version()
print("python", platform.python_version(), "vllm", vllm.__version__)
for name, value in record.environment("cuda" if torch.cuda.is_available() else "cpu").items():
    print(name, value)
(plugin,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "reflective"]
print(plugin.value, plugin.load().__module__, reflective.__file__)
PY
}

# part NAME SECONDS
part() {
    local how=(--seconds "$2")
    [ $MODE = rehearse ] && how+=(--quick)
    "$PYTHON" -m reflective.benchmarks.gpu_vllm "$1" "${how[@]}" --out "$RESULTS"
}

[ $MODE = rehearse ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export -f build_for_vllm part

TAIL=30 stage build "$(($(left) * 4 / 10))" bash -c build_for_vllm || finish
for name in graphs sync overhead tp best_of_n; do
    if wanted $name; then
        limit=$(share $name)
        # The last engine is begun before this; it takes up to two minutes to start.
        TAIL=9 stage $name "$limit" bash -c "part $name $((limit > 300 ? limit - 120 : limit / 2))"
    fi
done
finish
