#!/usr/bin/env bash
# All GPU rows of the benchmarks, unattended, within ten minutes of one H100 or H200:
#
#     DATA=folder-with-cifar10 benchmarks/gpu.sh [OUT]
#
# The rows: the machine's limit; BN-only ResNet-110, one trial and a grid of 16, and ResNet-866, a grid of 16, against
# the plain loop on the same GPU (timed over some steps; a training of it is so many times as long) and against the
# limit; and the headline, ResNet-866 on CIFAR-10, its rates as one cohort, for as long as there is time. Each part has
# a time limit of its own, so that a slow one does not eat the others, and one that fails leaves the others alone.
#
# From the environment, all of them optional:
#   OUT      folder for gpu.txt, JSON and store.tar.gz (default: results/gpu; the argument says the same)
#   DATA     folder that holds cifar10/; without it the loops see random images and the headline is left out
#   STORE    where the headline goes on from and keeps rows and checkpoints (default: results/headline)
#   FROM     a store.tar.gz of an earlier run, unpacked first where STORE does not exist
#   PYTHON   (default: .venv/bin/python where there is one, or python3); it has torch, torchvision and what bnscale
#            needs to train, which Ray, DeepSpeed and DuckDB are not. Nothing is installed, and nothing fetched.
#   SECONDS_IN_ALL (default: 590), DEVICE (default: cuda), and TINY=1 for a rehearsal in seconds: small networks, digits
set -uo pipefail
here() { [[ -z $1 || $1 == /* || $1 == *://* ]] && echo "$1" || echo "$PWD/$1"; } # what the caller names, before cd
OUT=$(here "${1:-${OUT:-}}") DATA=$(here "${DATA:-}") STORE=$(here "${STORE:-}") FROM=$(here "${FROM:-}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

out=${OUT:-results/gpu}
device=${DEVICE:-cuda}
store=${STORE:-results/headline}
all=${SECONDS_IN_ALL:-590}
python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out" || exit 1
log=$out/gpu.txt
: >"$log"
rm -f "$out"/*.json "$out"/*/cohort.json # figures of an earlier run
tell() { echo "$*" | tee -a "$log"; }

# What is missing is said at once, and not after minutes.
for part in train test; do
    if [[ -n $DATA ]] && ! compgen -G "$DATA/cifar10/$part-*.parquet" >/dev/null; then
        echo "gpu.sh: DATA=$DATA holds no cifar10/$part-*.parquet; name the folder above cifar10, or leave DATA out" >&2
        exit 2
    fi
done
if ! "$python" - "$device" >>"$log" 2>&1 <<'PY'; then
import sys

sys.path.insert(0, "benchmarks")
try:
    import torch

    if sys.argv[1] == "cuda" and not torch.cuda.is_available():
        sys.exit(f"gpu.sh: torch {torch.__version__} sees no GPU; run it where there is one, or with DEVICE=cpu TINY=1")
    import torchvision, bnscale.train, cohort, headline
except ImportError as error:
    sys.exit(f"gpu.sh: {sys.executable} lacks something, {error}; name another Python with PYTHON=")
PY
    cat "$log" >&2
    exit 2
fi
command -v nvidia-smi >/dev/null &&
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >>"$log"

failed=0
# part NAME SECONDS COMMAND...: at most so long, and no longer than what is left of the whole.
part() {
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    ((limit > all - SECONDS)) && limit=$((all - SECONDS))
    if ((limit < 5)); then
        tell "--- $name: left out, no time"
        failed=1
        return
    fi
    tell "--- $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    ((code == 124 || code == 137)) && tell "--- $name: its time was over; what is above was measured"
    ((code)) && failed=1
    tell "--- $name: exit code $code after $((SECONDS - began)) s"
}

data=()
[[ -n ${DATA:-} ]] && data=(--data "$DATA")
run=("$python")
if [[ -n ${TINY:-} ]]; then
    part limit 60 "${run[@]}" benchmarks/limit.py --device "$device" --depth 8 --members 1 2 --batch 8 --quick \
        --out "$out"
    part "cohort 8" 60 "${run[@]}" benchmarks/cohort.py --device "$device" --depth 8 --members 1 2 --batch 8 \
        --precision fp32 --turns 1 --seconds 0.1 --loaders 0 --quick --out "$out/8"
    headline=(--depth 8 --epochs 1 --lr 0.1 0.3)
    minutes=0.5
else
    part limit 50 "${run[@]}" benchmarks/limit.py --device "$device" --depth 110 866 --members 1 16 --out "$out"
    part "cohort 110" 200 "${run[@]}" benchmarks/cohort.py --device "$device" --depth 110 --members 1 16 \
        --turns 3 --seconds 1 --loaders 8 "${data[@]}" --out "$out/110"
    part "cohort 866" 170 "${run[@]}" benchmarks/cohort.py --device "$device" --depth 866 --members 16 \
        --turns 3 --seconds 1 --loaders 8 "${data[@]}" --out "$out/866"
    headline=(--depth 866 --save-every 30)
    # What is left, less what a reading on the way, packing and the start may take.
    minutes=$(awk -v left=$((all - SECONDS - 90)) 'BEGIN { print (left > 0 ? left : 0) / 60 }')
fi

if [[ -z ${TINY:-} && -z ${DATA:-} ]]; then
    tell "--- headline: left out, DATA names no folder with cifar10"
else
    ready=1
    if [[ ! -e $store && -n $FROM ]]; then
        rm -rf "$store.part"
        if mkdir -p "$store.part" && tar --extract --gzip --file "$FROM" --directory "$store.part"; then
            mv "$store.part" "$store"
        else
            tell "--- headline: left out, FROM=$FROM cannot be unpacked; it is left as it is"
            rm -rf "$store.part"
            ready=0 failed=1
        fi
    fi
    headline=("${run[@]}" benchmarks/headline.py "${headline[@]}" "${data[@]}" --store "$store" --out "$out")
    headline+=(--device "$device")
    if ((ready)); then
        part headline $((all - SECONDS - 25)) "${headline[@]}" --minutes "$minutes"
        [[ -e $out/headline.json ]] || part "headline so far" 20 "${headline[@]}" --minutes 0
        # Beside the archive that may be there, which is replaced by a whole one or not at all.
        if [[ -d $store ]] && tar --create --gzip --file "$out/store.tar.gz.part" --directory "$store" .; then
            mv "$out/store.tar.gz.part" "$out/store.tar.gz"
        else
            failed=1
        fi
    fi
fi
tell "--- all: $SECONDS s, $( ((failed)) && echo 'something failed, see above' || echo 'whole')"
exit "$failed"
