# What gpu.sh and gpu_vllm.sh have in common: options, a copy of the sources to work from, a build, stages that share a limit of time, and what is
# kept after each of them. They set before they read this, in bash:
#
#     NAME       what the log is called
#     LIMIT      seconds in all
#     WEIGHTS    the stages in their order, each with its weight when time is shared out
#     SMOKE      seconds and stages of --smoke; empty: there is no such option
#     SIGNAL     by which a stage is stopped at its limit
#     PUBLISHED  patterns of the files in $RESULTS that go to $OUT

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
MODE=measure
STAGES=" "
SUMMARY=()
FAILED=0

is_stage() { [[ " ${WEIGHTS[*]} " == *" $1 "* && ! $1 =~ ^[0-9]+$ ]]; }

while [ $# -gt 0 ]; do
    case $1 in
        --rehearse) MODE=rehearse ;;
        --seconds) LIMIT=$2 && shift ;;
        *)
            if [ "$1" = --smoke ] && [ ${#SMOKE[@]} -gt 0 ]; then
                MODE=smoke LIMIT=${SMOKE[0]} STAGES=" ${SMOKE[*]:1} "
            elif is_stage "$1"; then
                STAGES="$STAGES$1 "
            else
                echo "$NAME.sh: $1 is neither an option nor a stage" >&2 && exit 2
            fi
            ;;
    esac
    shift
done
RESULTS=$ROOT/benchmarks/results
[ $MODE = rehearse ] && RESULTS=$ROOT/build/rehearsal
mkdir -p "$RESULTS"

[ -z "${REFLECTIVE_SITE:-}" ] || REFLECTIVE_SITE=$(realpath "$REFLECTIVE_SITE") # before the folder is left to which it may be relative

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SOURCE=$WORK/source
SITE=$WORK/site
LOG=$WORK/$NAME.log
STAMP=$WORK/stamp # what is newer than this is of this run
# Commands run here: in a checkout python would import its sources, which lack what is built.
mkdir -p "$SOURCE" "$SITE" "$WORK/run" && touch "$STAMP" && cd "$WORK/run" || exit 2

left() { echo $((LIMIT - SECONDS)); }
least() { echo $(($1 < $2 ? $1 : $2)); }
wanted() { [ "$STAGES" = " " ] || [[ $STAGES == *" $1 "* ]]; }

# share STAGE [MOST]: its seconds of those that are left for it and the stages behind it; at most MOST.
share() {
    local i mine=0 all=0
    for ((i = 0; i < ${#WEIGHTS[@]}; i += 2)); do
        [ "${WEIGHTS[i]}" = "$1" ] && mine=${WEIGHTS[i + 1]}
        [ "$mine" != 0 ] && wanted "${WEIGHTS[i]}" && all=$((all + WEIGHTS[i + 1]))
    done
    least "$(($(left) * mine / all))" "${2:-$LIMIT}"
}

publish() {
    { cat "$LOG"; echo "== seconds a stage, of $LIMIT"; printf '%s\n' "${SUMMARY[@]}"; } >"$RESULTS/$NAME.log"
    [ -n "${OUT:-}" ] || return 0
    local pattern file
    for pattern in "${PUBLISHED[@]}"; do
        for file in "$RESULTS"/$pattern; do
            [ "$file" -nt "$STAMP" ] && cp "$file" "$OUT"
        done
    done
    return 0
}

# stage STAGE SECONDS COMMAND...: the command's output goes to the log, the end of it to the terminal.
stage() {
    local name=$1 limit=$2 began=$SECONDS status how output=$WORK/$1.log
    shift 2
    limit=$(least "$limit" "$(left)")
    if [ "$limit" -le 5 ]; then
        SUMMARY+=("$(printf '%-12s %5s s  left out: no time' "$name" 0)")
        FAILED=1
        return 125
    fi
    timeout --signal="$SIGNAL" --kill-after=10 "$limit" "$@" >"$output" 2>&1
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

finish() {
    { echo "== seconds a stage"; printf '%s\n' "${SUMMARY[@]}"; echo "in all $SECONDS s"; } | tee -a "$LOG"
    publish
    exit $FAILED
}

# Into $SITE. A copy of the sources, so that neither an old build in this tree nor a read-only one is in the way; the links of a checkout for development
# stay behind. Neither pip nor wheel: a machine without a network may lack what they need.
build() {
    (cd "$ROOT" && tar -c --exclude='*.so' --exclude='__pycache__' --exclude='benchmarks/results' --exclude='reflective/kernels' \
        --exclude='reflective/benchmarks' --exclude='reflective/csrc' csrc kernels reflective benchmarks tests pyproject.toml setup.py README.md \
        LICENSE) | tar -x -C "$SOURCE" || return
    # setuptools before 77 knows another spelling of the licence alone, and cannot be replaced here.
    if "$PYTHON" -c 'import setuptools; raise SystemExit(int(setuptools.__version__.split(".")[0]) >= 77)'; then
        sed -i -e 's/^license = \(".*"\)$/license = {text = \1}/' -e '/^license-files/d' "$SOURCE/pyproject.toml"
    fi
    if [ -z "${REFLECTIVE_SITE:-}" ]; then
        (cd "$SOURCE" && "$PYTHON" setup.py --quiet build --build-lib "$SITE")
    elif compgen -G "$REFLECTIVE_SITE/reflective/*.so" >/dev/null && [ -d "$REFLECTIVE_SITE/reflective/kernels" ]; then
        cp -r "$REFLECTIVE_SITE/." "$SITE"
    else
        echo "REFLECTIVE_SITE=$REFLECTIVE_SITE holds no built package: expected reflective/*.so and reflective/kernels in it"
        return 2
    fi
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
        echo "no GPU that torch can use; benchmarks/$NAME.sh --rehearse runs the same stages on a CPU" >&2
        exit 2
    fi
    export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1
fi
export -f build least
export ROOT PYTHON MODE RESULTS WORK SOURCE SITE
