#!/usr/bin/env bash
# What a GPU or TPU can do, measured inside ten minutes: a learning curve first, then speeds.
#
#     benchmarks/accelerator.sh
#     DTYPE=float32 SIZES="size1m size12m" benchmarks/accelerator.sh
#
# Lines go to benchmarks/results/DEVICE-DATE/, one file for each script, and the learning curve with
# them. What takes longer than its share is cut: the lines that it had written by then are kept.
# Numbers are computed in bfloat16 where the device has units for it and in float32 elsewhere,
# unless DTYPE says otherwise. XLA_FLAGS stay as they are.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
DTYPE=${DTYPE:-auto}
SIZES=${SIZES:-size1m size12m size50m size200m}
LIMIT=${LIMIT:-600}

read -r -a sizes <<<"$SIZES"
device=$("$PYTHON" -c 'import jax; print(jax.devices()[0].device_kind)') || exit
device=$(tr -c 'a-zA-Z0-9\n' - <<<"$device")
OUT=${OUT:-benchmarks/results/$device-$(date +%F)}
mkdir -p "$OUT" || exit
SECONDS=0
cut=0

part() { # SECONDS-OF-600 COMMAND...
    local share=$(($1 * LIMIT / 600)) left=$((LIMIT - SECONDS))
    shift
    echo "== ${*:2}" >&2
    if ((left < 5)); then
        echo "== left out: $LIMIT seconds are over" >&2
        cut=1
        return
    fi
    timeout -k 5 $((share < left ? share : left)) "$@" || {
        echo "== ended with $? after at most $share seconds" >&2
        cut=1
    }
}

run=$(mktemp -d)/run
part 180 "$PYTHON" -m jaxwm.cli train dreamer_v3 --preset cartpole --run "$run" \
    --agent.dtype "$DTYPE"
cp "$run/metrics.jsonl" "$OUT/learning-cartpole-seed0.jsonl" || cut=1
cp "$run/curve.png" "$OUT/learning-cartpole-seed0.png" || cut=1
part 150 "$PYTHON" -m benchmarks.throughput --size "${sizes[@]}" --obs vector image \
    --dtype "$DTYPE" --no-loop --out "$OUT/throughput.jsonl"
part 60 "$PYTHON" -m benchmarks.loop --dtype "$DTYPE" --iterations 64 --collect-envs 1024 \
    --out "$OUT/loop.jsonl"
part 150 "$PYTHON" -m benchmarks.scaling --envs 1 64 1024 8192 --seeds 1 8 32 \
    --batch 16 --length 64 --sizes "${sizes[@]}" --dtype "$DTYPE" --budget 20 \
    --picture "$OUT/scaling.png" --out "$OUT/scaling.jsonl"
part 60 "$PYTHON" -m benchmarks.memory --sizes "${sizes[@]}" --obs vector --dtype "$DTYPE" \
    --out "$OUT/memory.jsonl"
part 60 "$PYTHON" -m benchmarks.compile_time --sizes "${sizes[0]}" --dtype "$DTYPE" \
    --out "$OUT/compile_time.jsonl"
echo "== $SECONDS seconds; the results are in $OUT" >&2
exit "$cut"
