"""`python -m srlm_jax.train --config=configs/iter2.py --workdir=runs/x`: see run.py."""
from srlm_jax import cli
from srlm_jax.train import run

if __name__ == '__main__':
  cli.main(run.run)
