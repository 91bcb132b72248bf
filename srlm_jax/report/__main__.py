"""Makes the report of a run, of several runs side by side, or of the seeds of a study.

  python -m srlm_jax.report --workdir=runs/demo
  python -m srlm_jax.report --workdir=runs/a --workdir=runs/b --out=compared.html
  python -m srlm_jax.report --workdir=runs/study
"""
from absl import flags

from srlm_jax import cli, hosts
from srlm_jax.report import page


def main(argv):
  cli.refuse_arguments(argv)
  hosts.log(str(page.remake(flags.FLAGS.workdir, flags.FLAGS.out)))


if __name__ == '__main__':
  flags.DEFINE_multi_string('workdir', None, 'Folder of a run, or of a study; may be repeated.',
                            required=True)
  flags.DEFINE_string('out', '', 'The page; by default report.html in the only workdir.')
  cli.run_app(main)
