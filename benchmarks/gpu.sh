#!/usr/bin/env bash
# Build, tests and every measurement on this machine's GPU, offline, in one call of limited length that always leaves something.
#
#     benchmarks/gpu.sh [--seconds 525] [STAGE...]   # results in benchmarks/results and, after each stage, in $OUT where that is set
#     benchmarks/gpu.sh --smoke                      # does it build, run and capture at all? 90 s
#     benchmarks/gpu.sh --rehearse                   # the same stages on CPU, at toy sizes; results in build/rehearsal
#
# Stages, in this order: smoke decode best_of_n generate suite tests memcheck racecheck targets; by default all of them. Each has a
# share of the time that is left, and what it leaves over goes to the next ones. One that fails does not keep the next from
# running, and the exit code tells; only a failed build ends the run.
#
# Needs python3 with torch, triton, transformers, pytest and matplotlib, a C++ compiler and nvcc. PYTHON names another python3.
# REFLECTIVE_SITE names a folder with the package built elsewhere, as `setup.py build --build-lib` leaves it: nothing is built then.
# REFLECTIVE_COMMIT tells the commit where this tree is a copy without its history.
set -uo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
LIMIT=525 # seconds in all
MODE=measure
STAGES=" "
while [ $# -gt 0 ]; do
    case $1 in
        --rehearse) MODE=rehearse ;;
        --smoke) MODE=smoke LIMIT=90 STAGES=" smoke decode best_of_n " ;;
        --seconds) LIMIT=$2 && shift ;;
        smoke | decode | best_of_n | generate | suite | tests | memcheck | racecheck | targets) STAGES="$STAGES$1 " ;;
        *) echo "gpu.sh: $1 is neither an option nor a stage" >&2 && exit 2 ;;
    esac
    shift
done
RESULTS=$ROOT/benchmarks/results
[ $MODE = rehearse ] && RESULTS=$ROOT/build/rehearsal
mkdir -p "$RESULTS"

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SOURCE=$WORK/source
SITE=${REFLECTIVE_SITE:-$WORK/site}
LOG=$WORK/gpu.log
STAMP=$WORK/stamp # what is newer than this is of this run
SUMMARY=()
FAILED=0
# Commands run here: in a checkout python would import its sources, which lack what is built.
mkdir -p "$SOURCE" "$WORK/run" && touch "$STAMP" && cd "$WORK/run" || exit 2

left() { echo $((LIMIT - SECONDS)); }
least() { echo $(($1 < $2 ? $1 : $2)); }
wanted() { [ "$STAGES" = " " ] || [[ $STAGES == *" $1 "* ]]; }

# The stages in their order, each with its weight when time is shared out.
WEIGHTS=(smoke 18 decode 30 best_of_n 9 generate 22 suite 20 tests 18 memcheck 8 racecheck 8 targets 3)

# share NAME MOST: its seconds of those that are left for it and the stages behind it; at most MOST.
share() {
    local i mine=0 all=0
    for ((i = 0; i < ${#WEIGHTS[@]}; i += 2)); do
        [ "${WEIGHTS[i]}" = "$1" ] && mine=${WEIGHTS[i + 1]}
        [ "$mine" != 0 ] && wanted "${WEIGHTS[i]}" && all=$((all + WEIGHTS[i + 1]))
    done
    least "$(($(left) * mine / all))" "$2"
}

# To $OUT go at most eight files, in no folder.
publish() {
    { cat "$LOG"; echo "== seconds a stage, of $LIMIT"; printf '%s\n' "${SUMMARY[@]}"; } >"$RESULTS/gpu.log"
    [ -n "${OUT:-}" ] || return 0
    local name
    for name in gpu_decode_overhead.csv gpu_best_of_n.csv gpu_generate.csv gpu_suite.csv gpu_suite_roofline.png \
        gpu_suite_latency.png gpu_tests.xml gpu.log; do
        [ "$RESULTS/$name" -nt "$STAMP" ] && cp "$RESULTS/$name" "$OUT"
    done
    return 0
}

# stage NAME SECONDS COMMAND...: the command's output goes to the log, the end of it to the terminal.
stage() {
    local name=$1 limit=$2 began=$SECONDS status how output=$WORK/$1.log
    shift 2
    limit=$(least "$limit" "$(left)")
    if [ "$limit" -le 5 ]; then
        SUMMARY+=("$(printf '%-12s %5s s  left out: no time' "$name" 0)")
        FAILED=1
        return 125
    fi
    # By SIGINT: pytest then still says what failed.
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$output" 2>&1
    status=$?
    { echo "== $name, at most $limit s: $*"; cat "$output"; echo "== $name: exit $status after $((SECONDS - began)) s"; } >>"$LOG"
    echo "== $name" && tail -n "${TAIL:-12}" "$output"
    how=ok
    [ $status = 0 ] || how="failed ($status)"
    [ $status = 124 ] || [ $status = 137 ] && how="stopped at its limit of $limit s"
    [ $status = 0 ] || FAILED=1
    SUMMARY+=("$(printf '%-12s %5s s  %s' "$name" $((SECONDS - began)) "$how")")
    publish
    return $status
}

# A copy, so that neither an old build in this tree nor a read-only one is in the way.
copy_sources() {
    (cd "$ROOT" && tar -c --exclude='*.so' --exclude='__pycache__' --exclude='benchmarks/results' csrc kernels reflective \
        benchmarks tests pyproject.toml setup.py README.md LICENSE) | tar -x -C "$SOURCE"
}

build() {
    # setuptools before 77 knows another spelling of the licence alone, and cannot be replaced here.
    if "$PYTHON" -c 'import setuptools; raise SystemExit(int(setuptools.__version__.split(".")[0]) >= 77)'; then
        sed -i -e 's/^license = \(".*"\)$/license = {text = \1}/' -e '/^license-files/d' "$SOURCE/pyproject.toml"
    fi
    # Neither pip nor wheel: a machine without a network may lack what they need.
    (cd "$SOURCE" && "$PYTHON" setup.py --quiet build --build-lib "$SITE")
}

versions() {
    "$PYTHON" - <<'PY'
import platform, torch, reflective
from reflective.benchmarks import record
print("python", platform.python_version())
for name, value in record.environment("cuda" if torch.cuda.is_available() else "cpu").items():
    print(name, value)
for name, info in reflective.backends().items():
    print(f"{name:7}{'yes' if info.available else 'no ':4} {info.detail}")
PY
}

# Each test's name when it ends, and what failed at once: a run that is stopped has told all that it knew.
run_tests() {
    local many=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && [ "$(nproc)" -gt 2 ] && many=(-n "$(least 12 "$(nproc)")")
    cat >"$WORK/run/as_they_fail.py" <<'PY'
def pytest_runtest_logreport(report):
    if report.failed:
        print("\n" + report.nodeid + "\n" + report.longreprtext, flush=True)
PY
    cd "$SOURCE/tests" && OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2 PYTHONPATH=$PYTHONPATH:$WORK/run \
        "$PYTHON" -m pytest -v --tb=short --maxfail=40 -p no:cacheprovider -p no:benchmark -p as_they_fail "${many[@]}" "$@"
}

smoke() {
    versions &
    local chosen=(test_cuda.py)
    [ $MODE = rehearse ] && chosen=(test_backend.py)
    run_tests "${chosen[@]}"
    local status=$?
    wait
    return $status
}

tests() {
    local names=() chosen=() name
    for name in $1 test_seats test_scorer test_taps test_heads test_decoding test_backend test_sprm_loss_triton test_triton; do
        [ -e "$SOURCE/tests/$name.py" ] && names+=("$name.py")
    done
    [ $MODE = rehearse ] && names=(test_triton.py test_backend.py) chosen=(-k 'score_rows or backend')
    run_tests --junitxml="$RESULTS/gpu_tests.xml" "${chosen[@]}" "${names[@]}"
}

sanitize() {
    local tool=$1
    shift
    if [ $MODE = rehearse ] || ! command -v compute-sanitizer >/dev/null; then
        echo "no compute-sanitizer here, or no GPU: the ops run without it"
        "$PYTHON" -m reflective.benchmarks.sanitize --dtype bfloat16 --backend "$([ $MODE = rehearse ] && echo cpu || echo cuda)"
        return
    fi
    # Without torch's cache of memory every tensor is an allocation of its own, whose end the sanitizer knows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "$PYTHON" -m reflective.benchmarks.sanitize --backend cuda "$@"
}

suite() {
    local how=(--device cuda --seconds 0.03 --budget "$1")
    [ $MODE = rehearse ] && how=(--device cpu --quick)
    "$PYTHON" -c 'from reflective.cli import main; main()' bench "${how[@]}" --out "$RESULTS"
}

# overhead PART SECONDS: seconds, after which nothing further is begun, are counted from when the imports are done.
overhead() {
    local part=$1 how=(--seconds "$2")
    shift 2
    [ $MODE = measure ] || how=(--seconds 8 --quick)
    "$PYTHON" -m reflective.benchmarks.decode_overhead_gpu "$part" "${how[@]}" --out "$RESULTS" "$@"
}

export PYTHONPATH=$SITE PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
if [ -z "${REFLECTIVE_COMMIT:-}" ]; then
    REFLECTIVE_COMMIT=$(git -C "$ROOT" describe --always --dirty --abbrev=10 2>/dev/null || echo unknown)
fi
export REFLECTIVE_COMMIT
if [ $MODE = rehearse ]; then
    export REFLECTIVE_SKIP_CUDA_BUILD=1 CUDA_VISIBLE_DEVICES=""
else
    if ! TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())'); then
        echo "no GPU that torch can use; benchmarks/gpu.sh --rehearse runs the same stages on CPU" >&2
        exit 2
    fi
    export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1
fi
export -f build versions run_tests smoke tests sanitize suite overhead least
export ROOT PYTHON MODE RESULTS WORK SOURCE SITE

finish() {
    { echo "== seconds a stage"; printf '%s\n' "${SUMMARY[@]}"; echo "in all $SECONDS s"; } | tee -a "$LOG"
    publish
    exit $FAILED
}

copy_sources
if [ -n "${REFLECTIVE_SITE:-}" ]; then
    if ! compgen -G "$SITE/reflective/*.so" >/dev/null || [ ! -d "$SITE/reflective/kernels" ]; then
        echo "REFLECTIVE_SITE=$SITE holds no built package: expected reflective/*.so and reflective/kernels in it" >&2
        exit 2
    fi
else
    TAIL=30 stage build "$(least 200 $(($(left) * 6 / 10)))" bash -c build || finish
fi

smoked=0
if wanted smoke; then
    TAIL=25 stage smoke "$(share smoke 45)" bash -c smoke
    smoked=$?
fi
if wanted decode; then
    limit=$(share decode 200)
    stage decode "$limit" bash -c "overhead decode $((limit > 60 ? limit - 25 : limit / 3))"
fi
if wanted best_of_n; then
    limit=$(share best_of_n 45)
    stage best_of_n "$limit" bash -c "overhead best_of_n $((limit / 3))"
fi
if wanted generate; then
    limit=$(share generate 150)
    # A model of all 28 layers takes about a minute to compile. Fewer make the sampler's share larger; the file says how many there were.
    layers=
    [ $MODE = measure ] && [ "$limit" -lt 80 ] && layers="--layers 8"
    stage generate "$limit" bash -c "overhead generate $limit $layers"
fi
if wanted suite; then
    limit=$(share suite 400)
    TAIL=6 stage suite "$limit" bash -c "suite $((limit > 40 ? limit - 20 : limit / 2))"
fi
if wanted tests; then
    # Those of CUDA again if there was no time for all of them.
    again=
    [ $smoked = 124 ] || [ $smoked = 137 ] && again=test_cuda
    stage tests "$(share tests 300)" bash -c "tests '$again'"
fi
wanted memcheck && stage memcheck "$(share memcheck 90)" bash -c 'sanitize memcheck --dtype bfloat16'
wanted racecheck && stage racecheck "$(share racecheck 90)" bash -c 'sanitize racecheck --dtype bfloat16'
wanted targets && TAIL=30 stage targets 30 "$PYTHON" -m reflective.benchmarks.targets "$RESULTS"
finish
