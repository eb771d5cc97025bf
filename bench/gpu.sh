#!/usr/bin/env bash
# All that needs a GPU. Without arguments everything, in about an hour; or the parts named:
#
#     OUT=bench/results/h100 bench/gpu.sh [tests] [kernels] [layers] [routing] [memory] [throughput] [train]
#
# Each part takes less than ten.
#
#   tests    tests.log: the kernel tests on the device, bf16 included; sanitizer-*.log: accesses to
#            memory, and races in shared memory, of the cores with position inside
#   kernels  kernels.jsonl: every kernel beside its peers; kernels.log: targets and ratios
#   layers   layers.jsonl: time and memory of whole attention layers, eager and fused; layers.log
#   routing  routing.jsonl, .png: MoH that skips dropped heads against the share of active ones
#   memory   memory.jsonl: peak, activations and decoding state of layers beside the cost model; .log
#   throughput  throughput.jsonl: tokens per second of layers and their peers, by length; .log
#   train    train.jsonl: tokens per second and memory of GPT-2 124M, T=1024, bf16, compiled
#
# A step that fails is reported and the next one runs; then the exit code is 1. Needs the extras
# train and test; liger-kernel and flash-linear-attention are measured where they are installed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
worst=0

step() { # name, seconds, command ...
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@"
  local code=$?
  [ $code -eq 0 ] || { echo "== $name failed, exit code $code"; worst=1; }
}

logged() { # file, command ...: its last lines are shown, all of them kept
  local file=$1
  shift
  "$@" >"$file" 2>&1
  local code=$?
  tail -n 25 "$file"
  return $code
}
export -f logged

train() { # name, impl
  local run
  run=$(mktemp -d)
  rm -r "$run"
  python3 train.py --attention "$1" --impl "$2" --out "$run" --data stdlib --tokenizer byte \
    --vocab-size 50304 --layers 12 --heads 12 --embed-dim 768 --context 1024 --batch-size 32 \
    --steps 60 --warmup 10 --eval-every 0 --eval-tokens 65536 --save-every 0 --sample-tokens 0 \
    --dtype bfloat16 --compile >"$OUT/train.log" 2>&1 || { tail -n 5 "$OUT/train.log"; return 1; }
  python3 - "$run" "$2" <<'PY' | tee -a "$OUT/train.jsonl"
import json, statistics, sys
from pathlib import Path
run = Path(sys.argv[1])
summary = json.loads((run / "summary.json").read_text())
about = json.loads((run / "environment.json").read_text())
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
# The first steps compile.
rates = [row["tokens_per_second"] for row in rows if row["step"] > 20 and "tokens_per_second" in row]
keep = ("attention", "peak_memory_bytes", "parameters", "steps", "val_loss")
row = {k: summary[k] for k in keep} | {"tokens_per_second": statistics.median(rates)}
print(json.dumps(row | {"impl": sys.argv[2], "environment": about}))
PY
}
export -f train
export OUT

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests kernels layers routing memory throughput train)
for part in "${parts[@]}"; do
  case $part in
    tests)
      step tests 330 bash -c 'logged "$OUT/tests.log" python3 -m pytest -q -n 4 tests/kernels \
        --ignore tests/kernels/test_interpreter.py --ignore tests/kernels/test_compile_sm90.py'
      for tool in memcheck racecheck; do
        step "$tool" 120 bash -c "logged '$OUT/sanitizer-$tool.log' compute-sanitizer --tool $tool \
          --error-exitcode 1 python3 -m pytest -q -k 'outputs_and_gradients and dtype1 and
          (shape2 and not routed or shape4 and routed)' \
          tests/kernels/test_rope_attention.py tests/kernels/test_carope_attention.py \
          tests/kernels/test_relative_kernel.py tests/kernels/test_routed_kernel.py"
      done ;;
    kernels)
      step kernels 590 bash -c \
        'logged "$OUT/kernels.log" python3 -m bench.kernels --part ops --out "$OUT/kernels.jsonl"' ;;
    layers)
      step layers 590 bash -c \
        'logged "$OUT/layers.log" python3 -m bench.kernels --part layers --out "$OUT/layers.jsonl"' ;;
    routing)
      step routing 590 bash -c \
        'logged "$OUT/routing.log" python3 -m bench.routing --out "$OUT/routing.jsonl"' ;;
    memory)
      step memory 590 bash -c 'logged "$OUT/memory.log" python3 -m bench.memory --device cuda \
        --dtype bfloat16 --embed-dim 768 --heads 12 --out "$OUT/memory.jsonl"' ;;
    throughput)
      step throughput 590 bash -c \
        'logged "$OUT/throughput.log" python3 -m bench.throughput --out "$OUT/throughput.jsonl"' ;;
    train)
      for name in rope carope cmha moh rcmha; do
        for impl in sdpa fused; do
          step "train $name $impl" 120 bash -c "train $name $impl"
        done
      done ;;
    *)
      echo "unknown part: $part; expected tests, kernels, layers, routing, memory, throughput or train"
      worst=1 ;;
  esac
done
exit $worst
