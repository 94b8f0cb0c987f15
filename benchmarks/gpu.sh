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

NAME=gpu
LIMIT=525
WEIGHTS=(smoke 18 decode 30 best_of_n 9 generate 22 suite 20 tests 18 memcheck 8 racecheck 8 targets 3)
SMOKE=(90 smoke decode best_of_n)
SIGNAL=INT # pytest then still says what failed
# At most eight files, in no folder.
PUBLISHED=(gpu_decode_overhead.csv gpu_best_of_n.csv gpu_generate.csv gpu_suite.csv gpu_suite_roofline.png gpu_suite_latency.png gpu_tests.xml gpu.log)
. "$(dirname "$0")/gpu_stages.sh"

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

export -f versions run_tests smoke tests sanitize suite overhead

TAIL=30 stage build "$(least 200 $(($(left) * 6 / 10)))" bash -c build || finish

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
