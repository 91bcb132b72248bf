"""`python -m srlm_jax.sandbox --config=sft:tiny --workdir=runs/demo`: see data.py."""
from srlm_jax import cli
from srlm_jax.sandbox import data

if __name__ == '__main__':
  cli.main(data.run)
