"""Builds client.pyx against the installed fastllm: no include path, no fastllm source."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    name="client",
    ext_modules=cythonize([Extension("client", ["client.pyx"], extra_compile_args=["-O0"])], language_level=3),
)
