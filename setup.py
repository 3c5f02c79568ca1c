"""Build ``megatron-mhc``; all metadata is here, lint and test settings are in pyproject.toml."""

import re
import runpy
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
# Executed, not imported: importing the package would need torch, which a build does not have.
COMPAT = runpy.run_path(str(ROOT / 'megatron_mhc' / 'compat.py'))
VERSION = re.search(
    r"^__version__ = '(.+)'$", (ROOT / 'megatron_mhc' / '__init__.py').read_text(), re.MULTILINE
).group(1)
README = ROOT / 'README.md'

# `kernels`, `schedules` and `patches` are symbolic links inside `megatron_mhc`, followed here, so
# that a wheel, an editable install and a bare PYTHONPATH all see the same `megatron_mhc.kernels`.
PACKAGES = find_namespace_packages(include=['megatron_mhc*'], exclude=['*__pycache__*'])
if 'megatron_mhc.kernels' not in PACKAGES:
    raise SystemExit(
        'megatron_mhc/kernels is not a folder: the symbolic links were lost when these sources '
        'were unpacked. Clone with git (on Windows with core.symlinks=true) and try again.'
    )

setup(
    name='megatron-mhc',
    version=VERSION,
    description='Hyper-connection residuals (HC and mHC) for released Megatron-Core',
    long_description=README.read_text(encoding='utf-8') if README.exists() else '',
    long_description_content_type='text/markdown',
    author='The megatron-mhc authors',
    # An SPDX expression; the text is in LICENSE, which every wheel and sdist has.
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=PACKAGES,
    # The guides, which messages name and `megatron-mhc docs` prints, with their pictures.
    package_data={
        '': ['py.typed', '*.html', '*.json', '*.md', '*.txt'],
        'megatron_mhc.docs': ['*.png'],
    },
    python_requires='>=' + '.'.join(map(str, COMPAT['PYTHON_MIN'])),
    # torch carries no version: whatever a vendor container brings satisfies it, so pip never
    # replaces that build. Triton is an extra, because everything has a plain torch path.
    install_requires=['torch'],
    extras_require={
        'training': [
            'megatron-core[training]' + COMPAT['CORE_SPECIFIER'],
            'tensorboard',
            # Megatron's Mamba layers, on any device.
            'einops',
            # The quick start in tools/: plot, progress, and an orderly end of its processes.
            'matplotlib',
            'psutil',
            'tqdm',
            # `megatron-mhc convert`, for DeepSeek-V4's layout.
            'huggingface_hub',
            'safetensors',
        ],
        'completion': ['shtab'],
        'te': ['transformer-engine[pytorch]'],
        'kernels': ['triton>=' + COMPAT['core_minor'](COMPAT['TRITON_TESTED'][0])],
        'test': [
            'build',
            'codespell',
            'emerging-optimizers>=0.3',
            'hypothesis',
            'mypy',
            'pytest',
            'pytest-timeout',
            'pytest-xdist',
            'ruff',
            'setuptools>=68',
        ],
        # What was exported, in the libraries that others use: examples/evaluate.sh, fine-tuning.
        'evaluate': ['lm-eval', 'peft', 'transformers'],
        'docs': ['mkdocs>=1.6', 'mkdocstrings[python]>=0.26'],
    },
    entry_points={'console_scripts': ['megatron-mhc = megatron_mhc.cli:main']},
    classifiers=[
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3 :: Only',
        *(f'Programming Language :: Python :: {version}' for version in COMPAT['PYTHON_TESTED']),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
