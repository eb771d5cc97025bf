#!/usr/bin/env bash
# Everything that needs a GPU in one call of about nine minutes:
#
#     OUT=bench/results/h100 bench/gpu.sh
#
#   tests.log       the kernel tests on the device, bf16 included
#   sanitizer.log   memory and race checks of the kernels with barriers and atomics
#   kernels.jsonl   every kernel and layer beside its peers; kernels.log has targets beside ratios
#   train.jsonl     tokens per second and memory of GPT-2 124M, T=1024, bf16, one row a name and impl
#
# A step that fails is reported and the next one runs; the exit code is that of the worst. Needs the
# extras train and test; liger-kernel is measured where it is installed.
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
    --dtype bfloat16 --compile >"$run.log" 2>&1 || { tail -n 3 "$run.log"; return 1; }
  python3 - "$run" "$2" <<'PY' | tee -a "$OUT/train.jsonl"
import json, sys
from pathlib import Path
run = Path(sys.argv[1])
summary = json.loads((run / "summary.json").read_text())
about = json.loads((run / "environment.json").read_text())
keep = ("attention", "tokens_per_second", "peak_memory_bytes", "parameters", "steps", "val_loss")
print(json.dumps({k: summary[k] for k in keep} | {"impl": sys.argv[2], "environment": about}))
PY
}
export -f train
export OUT

step tests 170 bash -c 'logged "$OUT/tests.log" python3 -m pytest -q -n 4 tests/kernels --ignore tests/kernels/test_interpreter.py --ignore tests/kernels/test_compile_sm90.py'
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 40 bash -c "logged '$OUT/sanitizer-$tool.log' compute-sanitizer --tool $tool \
      --error-exitcode 1 python3 -m pytest -q tests/kernels/test_rope_attention.py -k 'float16 and 63'"
  done
fi
step kernels 240 bash -c 'logged "$OUT/kernels.log" python3 -m bench.kernels --out "$OUT/kernels.jsonl"'
for name in rope carope cmha moh; do
  for impl in sdpa fused; do
    step "train $name $impl" 45 bash -c "train $name $impl"
  done
done
exit $worst
