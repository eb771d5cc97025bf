#!/usr/bin/env bash
# All that needs a GPU. Without arguments a quick pass over everything, in under ten minutes; or the
# parts named, each whole and in less than ten:
#
#     OUT=bench/results/h100 bench/gpu.sh [quick] [tests] [kernels] [layers] [throughput] [routing]
#                                         [memory] [train]
#
#   tests       the kernel tests on the device, bf16 included; accesses to memory, and races in
#               shared memory, of the cores with position inside
#   kernels     kernels.jsonl: every kernel beside its peers, then targets and ratios
#   layers      layers.jsonl: time and memory of whole attention layers, eager and fused
#   throughput  throughput.jsonl: tokens a second of layers and their peers, by length
#   routing     routing.jsonl, .png: MoH that skips dropped heads against the share of active ones
#   memory      memory.jsonl: peak, activations and decoding state of layers beside the cost model
#   train       train.jsonl: loss and tokens a second of GPT-2 124M, T=1024, bf16, compiled
#   quick       outputs and gradients of every kernel, memcheck, S1 of kernels, one length of
#               throughput, routing and memory, short pretraining of RoPE by sdpa and fused, eager
#
# What the steps say is in gpu.log. One that fails is reported and the next one runs; then the exit
# code is 1. Rows are written as they are measured: a limit that ends a step keeps those before it;
# but those of train, which compare runs, all at its end.
# Needs the extras train, test and bench; liger-kernel and flash-linear-attention are measured where
# they are installed. `python -m bench.report $OUT` makes a page of the rows.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
worst=0

step() { # name, seconds, command ..: all it says goes to gpu.log, its last lines are shown
  local name=$1 limit=$2 said
  shift 2
  said=$(mktemp)
  echo "== $name" | tee -a "$OUT/gpu.log"
  timeout --kill-after 2 "$limit" "$@" >"$said" 2>&1
  local code=$?
  cat "$said" >>"$OUT/gpu.log"
  tail -n 25 "$said"
  rm "$said"
  [ $code -eq 0 ] || { echo "== $name failed, exit code $code"; worst=1; }
}

rows() { # name, seconds, arguments ..: a benchmark that writes NAME.jsonl
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" python3 -m "bench.$name" "$@" --out "$OUT/$name.jsonl"
}

train() { # seconds, steps, --compile or --no-compile, methods ..: at the shape of GPT-2 124M
  local limit=$1 steps=$2 compile=$3
  shift 3
  step train "$limit" python3 -m bench.perplexity --attention "$@" \
    --baseline "$1" --seeds 1 --contexts 1 --runs "$(mktemp -d)" --out "$OUT/train.jsonl" -- \
    --data stdlib --tokenizer byte --vocab-size 50304 --layers 12 --heads 12 --embed-dim 768 \
    --context 1024 --batch-size 32 --steps "$steps" --warmup 10 --save-every 0 --dtype bfloat16 \
    "$compile"
}

sanitized() { # tool, seconds, expression: which tests run under compute-sanitizer
  step "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 1 \
    python3 -m pytest -q -k "$3" \
    tests/kernels/test_rope_attention.py tests/kernels/test_carope_attention.py \
    tests/kernels/test_relative_kernel.py tests/kernels/test_routed_kernel.py
}

MEMORY=(--device cuda --dtype bfloat16 --embed-dim 768 --heads 12)
SMALL='outputs_and_gradients and dtype1 and (shape2 and not routed or shape4 and routed)'
TESTS=(python3 -m pytest -q -n 4 tests/kernels --ignore tests/kernels/test_interpreter.py
  --ignore tests/kernels/test_compile_sm90.py)

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(quick)
for part in "${parts[@]}"; do
  case $part in
    quick)
      step tests 130 "${TESTS[@]}" -k "outputs_and_gradients or bfloat16 or decode_kernel and gpu"
      sanitized memcheck 60 "$SMALL"
      rows kernels 130 --part ops --shapes S1
      rows throughput 80 --lengths 1024 --impls auto fused
      rows routing 50 --lengths 2048 --levels core layer --modes fwd+bwd decode
      rows memory 30 --lengths 1024 "${MEMORY[@]}"
      # Compiling training and evaluation of two models takes longer than their steps.
      train 100 40 --no-compile rope:impl=sdpa rope:impl=fused ;;
    tests)
      step tests 330 "${TESTS[@]}"
      for tool in memcheck racecheck; do sanitized "$tool" 120 "$SMALL"; done ;;
    kernels) rows kernels 590 --part ops ;;
    layers)
      step layers 590 python3 -m bench.kernels --part layers \
        --out "$OUT/layers.jsonl" ;;
    throughput | routing) rows "$part" 590 ;;
    memory) rows memory 590 "${MEMORY[@]}" ;;
    train)
      train 590 60 --compile rope:impl=sdpa rope:impl=fused carope:impl=fused cmha:impl=fused \
        moh:impl=fused rcmha:impl=fused ;;
    *)
      echo "unknown part: $part; expected quick, tests, kernels, layers, throughput, routing," \
        "memory or train"
      worst=1 ;;
  esac
done
exit $worst
