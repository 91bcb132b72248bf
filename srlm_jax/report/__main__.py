"""Makes WORKDIR/report.html from the files of a run.

  python -m srlm_jax.report --workdir=runs/demo
"""
from absl import flags

from srlm_jax import cli, hosts
from srlm_jax.report import page


def main(argv):
  cli.refuse_arguments(argv)
  hosts.log(str(page.remake(flags.FLAGS.workdir)))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
  cli.run_app(main)
