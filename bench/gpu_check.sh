#!/usr/bin/env bash
# Builds, tests and times minivllm on a machine with a GPU, in one go:  bash bench/gpu_check.sh OUT_DIR [part ...]
# Parts: build tests ops sanitizer ptxas e2e start (default: all). The whole output goes to OUT_DIR/log.txt, figures to
# JSON and Markdown beside it; each part's last lines are shown. OPS_CASES="cuda and not flashinfer" times fewer cases.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_check.sh OUT_DIR [part ...]}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
parts=${*:-build tests ops sanitizer ptxas e2e start}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()

part() { # part NAME COMMAND...: runs it when asked for, keeps its output, remembers a failure
  local name=$1
  shift
  [[ " $parts " == *" ${name%%-*} "* ]] || return 0
  echo "== $name" | tee -a "$out/log.txt"
  "$@" >"$out/last.txt" 2>&1 || failed+=("$name")
  cat "$out/last.txt" >>"$out/log.txt"
  tail -n "${LINES_SHOWN:-25}" "$out/last.txt"
}

part build python3 -m minivllm build --force
part build-info python3 -m minivllm info
part tests python3 -m pytest tests -p no:cacheprovider
[[ ${OPS_CASES:-} == *"not flashinfer"* ]] || part ops-peers python3 bench/ops/compile_peers.py
part ops python3 -m pytest bench/ops --benchmark-only -k "${OPS_CASES:-cuda}" --benchmark-json="$out/ops.json" --benchmark-columns=median -p no:cacheprovider
part ops-table bash -o pipefail -c 'python3 bench/kernel_table.py "$1/ops.json" --json "$1/kernels.json" | tee "$1/kernels.md"' table "$out"
part sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 python3 bench/sanitize.py
part sanitizer-initcheck compute-sanitizer --tool initcheck --error-exitcode 9 python3 bench/sanitize.py
part ptxas bash .ci/compile_cuda "$out/ptxas"
part e2e python3 bench/throughput.py --device cuda --requests 64 --json "$out/e2e.json"
part e2e-one python3 bench/throughput.py --device cuda --requests 1 --json "$out/e2e_one.json"
part start python3 bench/startup.py --device cuda
part start-overhead python3 bench/overhead.py --build

rm -f "$out/last.txt"
echo "== $(git rev-parse --short HEAD 2>/dev/null || echo no-git): failed: ${failed[*]:-nothing}"
[[ ${#failed[@]} -eq 0 ]]
