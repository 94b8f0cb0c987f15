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

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
LIMIT=1500 # seconds in all
MODE=measure
STAGES=" "
while [ $# -gt 0 ]; do
    case $1 in
        --rehearse) MODE=rehearse ;;
        --seconds) LIMIT=$2 && shift ;;
        graphs | sync | overhead | tp | best_of_n) STAGES="$STAGES$1 " ;;
        *) echo "gpu_vllm.sh: $1 is neither an option nor a stage" >&2 && exit 2 ;;
    esac
    shift
done
RESULTS=$ROOT/benchmarks/results
[ $MODE = rehearse ] && RESULTS=$ROOT/build/rehearsal
mkdir -p "$RESULTS"

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SOURCE=$WORK/source
SITE=$WORK/site
LOG=$WORK/gpu_vllm.log
STAMP=$WORK/stamp # what is newer than this is of this run
SUMMARY=()
FAILED=0
# Commands run here: in a checkout python would import its sources, which lack what is built.
mkdir -p "$SOURCE" "$SITE" "$WORK/run" && touch "$STAMP" && cd "$WORK/run" || exit 2

left() { echo $((LIMIT - SECONDS)); }
least() { echo $(($1 < $2 ? $1 : $2)); }
wanted() { [ "$STAGES" = " " ] || [[ $STAGES == *" $1 "* ]]; }

# The stages in their order, each with its weight when time is shared out: a vLLM starts in half a minute to two, graphs needs eight of them.
WEIGHTS=(graphs 40 sync 10 overhead 60 tp 10 best_of_n 30)

# share NAME: its seconds of those that are left for it and the stages behind it.
share() {
    local i mine=0 all=0
    for ((i = 0; i < ${#WEIGHTS[@]}; i += 2)); do
        [ "${WEIGHTS[i]}" = "$1" ] && mine=${WEIGHTS[i + 1]}
        [ "$mine" != 0 ] && wanted "${WEIGHTS[i]}" && all=$((all + WEIGHTS[i + 1]))
    done
    echo $(($(left) * mine / all))
}

publish() {
    { cat "$LOG"; echo "== seconds a stage, of $LIMIT"; printf '%s\n' "${SUMMARY[@]}"; } >"$RESULTS/gpu_vllm.log"
    [ -n "${OUT:-}" ] || return 0
    local name
    for name in "$RESULTS"/*gpu_vllm*; do
        [ "$name" -nt "$STAMP" ] && cp "$name" "$OUT"
    done
    return 0
}

# stage NAME SECONDS COMMAND...: the command's output goes to the log, the end of it to the terminal.
stage() {
    local name=$1 limit=$2 began=$SECONDS status how output=$WORK/$1.log
    shift 2
    limit=$(least "$limit" "$(left)")
    if [ "$limit" -le 10 ]; then
        SUMMARY+=("$(printf '%-12s %5s s  left out: no time' "$name" 0)")
        FAILED=1
        return 125
    fi
    # Not by SIGINT: vLLM's engines, processes of the same group, end by this one too, and give back the GPU's memory.
    timeout --kill-after=10 "$limit" "$@" >"$output" 2>&1
    status=$?
    { echo "== $name, at most $limit s: $*"; cat "$output"; echo "== $name: exit $status after $((SECONDS - began)) s"; } >>"$LOG"
    echo "== $name" && tail -n "${TAIL:-12}" "$output" | cut -c1-400
    how=ok
    [ $status = 0 ] || how="failed ($status)"
    [ $status = 124 ] || [ $status = 137 ] && how="stopped at its limit of $limit s"
    [ $status = 0 ] || FAILED=1
    SUMMARY+=("$(printf '%-12s %5s s  %s' "$name" $((SECONDS - began)) "$how")")
    publish
    return $status
}

# A copy, so that neither an old build in this tree nor a read-only one is in the way. The links of a checkout for development stay behind.
copy_sources() {
    (cd "$ROOT" && tar -c --exclude='*.so' --exclude='__pycache__' --exclude='benchmarks/results' --exclude='reflective/kernels' \
        --exclude='reflective/benchmarks' --exclude='reflective/csrc' csrc kernels reflective benchmarks pyproject.toml setup.py README.md \
        LICENSE) | tar -x -C "$SOURCE"
}

build() {
    # setuptools before 77 knows another spelling of the licence alone, and cannot be replaced here.
    if "$PYTHON" -c 'import setuptools; raise SystemExit(int(setuptools.__version__.split(".")[0]) >= 77)'; then
        sed -i -e 's/^license = \(".*"\)$/license = {text = \1}/' -e '/^license-files/d' "$SOURCE/pyproject.toml"
    fi
    if [ -n "${REFLECTIVE_SITE:-}" ]; then
        cp -r "$REFLECTIVE_SITE/." "$SITE" || return
    else
        (cd "$SOURCE" && "$PYTHON" setup.py --quiet build --build-lib "$SITE") || return
    fi
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

export PYTHONPATH=$SITE PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
if [ -z "${REFLECTIVE_COMMIT:-}" ]; then
    REFLECTIVE_COMMIT=$(git -C "$ROOT" describe --always --dirty --abbrev=10 2>/dev/null || echo unknown)
fi
export REFLECTIVE_COMMIT
if [ $MODE = rehearse ]; then
    export REFLECTIVE_SKIP_CUDA_BUILD=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
    if ! TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())'); then
        echo "no GPU that torch can use; benchmarks/gpu_vllm.sh --rehearse runs the same stages on a CPU build of vLLM" >&2
        exit 2
    fi
    export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1
fi
export -f build part
export ROOT PYTHON MODE RESULTS SOURCE SITE

finish() {
    { echo "== seconds a stage"; printf '%s\n' "${SUMMARY[@]}"; echo "in all $SECONDS s"; } | tee -a "$LOG"
    publish
    exit $FAILED
}

copy_sources
TAIL=30 stage build "$(($(left) * 4 / 10))" bash -c build || finish
for name in graphs sync overhead tp best_of_n; do
    if wanted $name; then
        limit=$(share $name)
        # The last engine is begun before this; it takes up to two minutes to start.
        TAIL=9 stage $name "$limit" bash -c "part $name $((limit > 300 ? limit - 120 : limit / 2))"
    fi
done
finish
