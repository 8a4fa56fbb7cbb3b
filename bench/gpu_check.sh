#!/usr/bin/env bash
# Builds, tests and times minivllm on a machine with a GPU, in one go:  bash bench/gpu_check.sh OUT_DIR [part ...]
# Parts: build tests ops e2e start (default: all). Logs and JSON go to OUT_DIR; a short table comes last.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_check.sh OUT_DIR [part ...]}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
parts=${*:-build tests ops e2e start}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=()

part() { # part NAME COMMAND...: runs it when asked for, keeps its log, remembers a failure
  local name=$1
  shift
  [[ " $parts " == *" ${name%%-*} "* ]] || return 0
  echo "== $name"
  "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
  tail -n 25 "$out/$name.log"
}

part build python3 -m minivllm build --force
part build-info python3 -m minivllm info
part tests python3 -m pytest tests -p no:cacheprovider
part ops python3 -m pytest bench/ops --benchmark-only --benchmark-json="$out/ops.json" --benchmark-columns=median,ops -p no:cacheprovider
part e2e python3 bench/throughput.py --device cuda --requests 64 --json "$out/e2e.json"
part e2e-one python3 bench/throughput.py --device cuda --requests 1 --json "$out/e2e_one.json"
part start python3 bench/startup.py --device cuda

echo "== $(git rev-parse --short HEAD 2>/dev/null || echo no-git): failed: ${failed[*]:-nothing}"
[[ ${#failed[@]} -eq 0 ]]
