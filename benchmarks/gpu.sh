#!/usr/bin/env bash
# Build, correctness, the suite and the decode overhead on this machine's GPU, in one call of under nine minutes, offline.
#
#     benchmarks/gpu.sh               # results in benchmarks/results, and in $OUT where that is set
#     benchmarks/gpu.sh --rehearse    # the same stages on CPU, at toy sizes; results in build/rehearsal
#
# Needs python3 with torch, triton, transformers, pytest and matplotlib, a C++ compiler and nvcc. Every stage has its own
# time limit; one that fails does not keep the next from running, and the exit code tells. PYTHON names another python3;
# REFLECTIVE_COMMIT tells the commit where this tree is a copy without its history.
set -uo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
LIMIT=525 # seconds in all
REHEARSE=0
[ "${1:-}" = --rehearse ] && REHEARSE=1
RESULTS=$ROOT/benchmarks/results
[ $REHEARSE = 1 ] && RESULTS=$ROOT/build/rehearsal
mkdir -p "$RESULTS"

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SITE=$WORK/site
LOG=$WORK/gpu.log
SUMMARY=()
FAILED=0

left() { echo $((LIMIT - SECONDS)); }
least() { echo $(($1 < $2 ? $1 : $2)); }

# stage NAME SECONDS COMMAND...: the command's output goes to the log, the end of it to the terminal.
stage() {
    local name=$1 limit=$2 began=$SECONDS status output=$WORK/$1.log
    shift 2
    limit=$(least "$limit" "$(left)")
    if [ "$limit" -le 5 ]; then
        SUMMARY+=("$(printf '%-12s %5s s  left out: no time' "$name" 0)")
        FAILED=1
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$output" 2>&1
    status=$?
    { echo "== $name: $*"; cat "$output"; echo "== $name: exit $status after $((SECONDS - began)) s"; } >>"$LOG"
    echo "== $name" && tail -n "${TAIL:-12}" "$output"
    [ $status = 0 ] || FAILED=1
    SUMMARY+=("$(printf '%-12s %5s s  %s' "$name" $((SECONDS - began)) \
        "$([ $status = 0 ] && echo ok || { [ $status = 124 ] && echo 'stopped at its time limit' || echo "failed ($status)"; })")")
    return $status
}

# A copy, so that neither an old build in this tree nor a read-only one is in the way.
build() {
    (cd "$ROOT" && tar -c --exclude='*.so' --exclude='__pycache__' csrc kernels reflective benchmarks/*.py tests \
        pyproject.toml setup.py README.md LICENSE) | tar -x -C "$WORK" || return
    # setuptools before 77 knows another spelling of the licence alone, and cannot be replaced here.
    if "$PYTHON" -c 'import setuptools; raise SystemExit(int(setuptools.__version__.split(".")[0]) >= 77)'; then
        sed -i -e 's/^license = \(".*"\)$/license = {text = \1}/' -e '/^license-files/d' "$WORK/pyproject.toml"
    fi
    # Neither pip nor wheel: a machine without a network may lack what they need.
    (cd "$WORK" && "$PYTHON" setup.py --quiet build --build-lib "$SITE")
}

versions() {
    "$PYTHON" - <<'PY'
import platform, torch, transformers, reflective
from reflective.benchmarks import record
print("python", platform.python_version())
for name, value in record.environment("cuda" if torch.cuda.is_available() else "cpu").items():
    print(name, value)
for name, info in reflective.backends().items():
    print(f"{name:7}{'yes' if info.available else 'no ':4} {info.detail}")
PY
}

# What runs on the GPU, in as many processes as help; and, on the GPU beside it, the sanitizer.
correctness() {
    local tests=() many=()
    for name in test_cuda test_triton test_sprm_loss_triton test_scorer test_decoding test_backend; do
        [ -e "$WORK/tests/$name.py" ] && tests+=("$name.py")
    done
    "$PYTHON" -c 'import xdist' 2>/dev/null && many=(-n 6)
    local chosen=()
    if [ $REHEARSE = 1 ]; then tests=(test_triton.py test_backend.py) chosen=(-k 'score_rows or backend') many=(); fi
    cd "$WORK/tests" && "$PYTHON" -m pytest -q --maxfail=40 -p no:cacheprovider "${many[@]}" "${chosen[@]}" "${tests[@]}"
}

sanitize() {
    local tool=$1
    shift
    if [ $REHEARSE = 1 ] || ! command -v compute-sanitizer >/dev/null; then
        echo "no compute-sanitizer here, or no GPU: the ops run without it"
        "$PYTHON" -m reflective.benchmarks.sanitize --dtype bfloat16
        return
    fi
    # Without torch's cache of memory every tensor is an allocation of its own, whose end the sanitizer knows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "$PYTHON" -m reflective.benchmarks.sanitize "$@"
}

suite() {
    local how=(--device cuda --seconds 0.03 --budget "$1")
    [ $REHEARSE = 1 ] && how=(--device cpu --quick)
    "$PYTHON" -c 'from reflective.cli import main; main()' bench "${how[@]}" --out "$RESULTS"
}

decode_overhead() {
    local how=(--seconds "$1")
    [ $REHEARSE = 1 ] && how=(--quick --seconds 10)
    "$PYTHON" -m reflective.benchmarks.decode_overhead_gpu "${how[@]}" --out "$RESULTS"
}

export PYTHONPATH=$SITE PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
if [ -z "${REFLECTIVE_COMMIT:-}" ]; then
    REFLECTIVE_COMMIT=$(git -C "$ROOT" describe --always --dirty --abbrev=10 2>/dev/null || echo unknown)
fi
export REFLECTIVE_COMMIT
if [ $REHEARSE = 1 ]; then
    export REFLECTIVE_SKIP_CUDA_BUILD=1 CUDA_VISIBLE_DEVICES=""
else
    if ! TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())'); then
        echo "no GPU that torch can use; benchmarks/gpu.sh --rehearse runs the same stages on CPU" >&2
        exit 2
    fi
    export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1
fi
export -f build versions correctness sanitize suite decode_overhead
export ROOT PYTHON REHEARSE RESULTS WORK SITE

# Without its CUDA kernels the package still has Triton's to check and to measure.
if stage build 170 bash -c build || stage build-cpp 60 env FORCE_CUDA=0 REFLECTIVE_SKIP_CUDA_BUILD=1 bash -c build; then
    TAIL=30 stage versions 60 bash -c versions
    # Correctness does not mind company: the sanitizer's two passes run beside the tests.
    (timeout 110 bash -c 'sanitize memcheck --dtype bfloat16 --dtype float8_e4m3fn' >"$WORK/memcheck.out" 2>&1; echo $? >"$WORK/memcheck.rc") &
    (timeout 110 bash -c 'sanitize racecheck --backend cuda --dtype bfloat16' >"$WORK/racecheck.out" 2>&1; echo $? >"$WORK/racecheck.rc") &
    stage tests 130 bash -c correctness
    wait
    for tool in memcheck racecheck; do
        stage $tool 10 bash -c "cat '$WORK/$tool.out'; exit \$(cat '$WORK/$tool.rc')"
    done
    budget=$(($(left) - 170)) # the rest is for the compilation of two models and more
    TAIL=6 stage suite $((budget + 25)) bash -c "suite $budget"
    overhead=$(($(left) - 15))
    stage overhead "$overhead" bash -c "decode_overhead $((overhead - 25))"
    TAIL=30 stage targets 30 "$PYTHON" -m reflective.benchmarks.targets "$RESULTS"
fi

{ echo "== seconds a stage"; printf '%s\n' "${SUMMARY[@]}"; echo "in all $SECONDS s"; } | tee -a "$LOG"
cp "$LOG" "$RESULTS/gpu.log"
if [ -n "${OUT:-}" ]; then
    for file in gpu_suite.csv gpu_suite_roofline.png gpu_suite_latency.png gpu_decode_overhead.csv gpu.log; do
        [ -e "$RESULTS/$file" ] && cp "$RESULTS/$file" "$OUT"
    done
fi
exit $FAILED
