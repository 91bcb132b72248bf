#!/usr/bin/env bash
# Evaluates the models of a finished `make demo` as published models are evaluated, without network:
#   launch/evaluate_demo.sh runs/demo
# lm-evaluation-harness measures them with this engine, a judge behind OpenAI's API compares them
# (here the sandbox's oracle on a local port), the prompts of all rounds are mapped, and the report
# shows it all. With PYTHON=FILE that Python is used. What is finished is not done again.
set -euo pipefail
run=${1:?give the folder of a finished run, as in: launch/evaluate_demo.sh runs/demo}
python=${PYTHON:-python}

say() { printf '\n== %s\n' "$*"; }

say 'lm-evaluation-harness: two tasks made of the held-out prompts'
"$python" -m srlm_jax.sandbox.tasks --workdir="$run"
"$python" -m srlm_jax.eval.harness --out="$run/eval/harness.json" \
  --include_path="$run/eval/tasks" --tasks=sandbox_choice,sandbox_exact \
  --model="m1=$run/m1/model" --model="m2=$run/m2/model" --model="m3=$run/m3/model"

say 'an outside judge, behind the API of OpenAI'
exec {oracle}< <(exec "$python" -m srlm_jax.sandbox.endpoint --port=0)
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
read -r -u "$oracle" line || { echo 'error: the judge did not start' >&2; exit 1; }
for pair in m1,sft m2,sft m3,sft m2,m1 m3,m2; do
  a=${pair%,*} b=${pair#*,}
  "$python" -m srlm_jax.eval.head_to_head --a="$run/$a/answers" --b="$run/$b/answers" \
    --out="$run/eval/${a}_$b" --judge="${line##* }" --judge_model=oracle
done

say 'the prompts of all rounds on one map'
"$python" -m srlm_jax.eval.distributions --workdir="$run"

say 'the report'
"$python" -m srlm_jax.report --workdir="$run"
