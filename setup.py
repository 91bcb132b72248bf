"""Installs srlm_jax; the ranges are those that the tests have run on."""
from setuptools import find_packages, setup

setup(
    name='srlm_jax',
    version='0.1.0',
    description='Self-rewarding language models (Yuan et al. 2024) in JAX',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['srlm_jax', 'srlm_jax.*']),
    package_data={'srlm_jax.data': ['*.txt'], 'srlm_jax.reward': ['*.txt'],
                  'srlm_jax.report': ['*.html'], 'srlm_jax.sandbox': ['m0/*']},
    install_requires=[
        'jax>=0.10.2,<0.12',
        'flax>=0.12,<0.13',
        'optax>=0.2.6,<0.3',
        'orbax-checkpoint>=0.11.30,<0.13',
        'transformers>=5,<6',
        'sentencepiece>=0.2,<0.3',
        'protobuf>=4',
        'tensorflow-datasets>=4.9.10,<5',
        'array_record>=0.8,<0.9; sys_platform != "win32"',
        'ml_collections>=1.1,<2',
        'absl-py>=2.1,<3',
        'etils[epath]>=1.12,<2',
        'safetensors>=0.5,<0.9',
        'rouge-score>=0.1.2,<0.2',
        'scipy>=1.14,<2',
        'matplotlib>=3.9,<4',
        'jinja2>=3.1,<4',
        'tqdm>=4.66,<5',
        'tensorboardX>=2.6,<3',
    ],
    extras_require={
        'tpu': ['jax[tpu]>=0.10.2,<0.12'],
        'gpu': ['jax[cuda13]>=0.10.2,<0.12'],
        'test': ['pytest>=8,<10', 'pytest-xdist>=3,<4', 'hypothesis>=6,<7', 'pyyaml>=6,<7'],
        'lint': ['ruff>=0.14,<0.18'],
        'bench': ['torch>=2.6,<3', 'trl>=1.16,<2'],
        # alpaca_eval imports pkg_resources, which newer setuptools lack; its warning asks for <81.
        'eval': ['lm-eval[hf]>=0.4,<0.5', 'alpaca-eval>=0.6,<0.7', 'setuptools<81'],
        'aot': ['jax[tpu]==0.10.2'],
    },
)
