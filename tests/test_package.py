"""The package as installed: names, metadata, a Cython client; and the wheel, without checkout or compiler.

The tests of the wheel need one: `.ci/run` builds it and names it in FASTLLM_WHEEL. Without that they are
skipped, since building takes a minute or two.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

import pytest

import fastllm

ROOT = Path(__file__).parents[1]
COMPILED = (
    "_core",
    "engine/block_pool",
    "engine/scheduler",
    "engine/sequence",
    "engine/step_batch",
    "engine/step_cost",
    "engine/drafter",
    "engine/model_drafter",
)


def run(
    command: Sequence[str | Path], *, cwd: Path, env: dict[str, str] | None = None, timeout_s: int = 240
) -> str:
    """The standard output of a command that must succeed, run outside the checkout without PYTHONPATH."""
    clean = {
        name: value for name, value in (os.environ if env is None else env).items() if name != "PYTHONPATH"
    }
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- as installed, editable or not -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kernels", "csrc"])
def test_folders_of_the_repository_are_no_modules(name: str, tmp_path: Path) -> None:
    """`kernels` is another project's package; ours is `fastllm.kernels`."""
    code = f"import importlib.util as u; print(u.find_spec({name!r}))"
    assert run([sys.executable, "-I", "-c", code], cwd=tmp_path).strip() == "None"


def test_the_repository_is_not_on_the_path(tmp_path: Path) -> None:
    code = "import fastllm, json, sys; print(json.dumps(sys.path))"
    paths = {
        Path(entry).resolve() for entry in json.loads(run([sys.executable, "-I", "-c", code], cwd=tmp_path))
    }
    assert not paths & {ROOT, ROOT.parent, ROOT / "fastllm", ROOT / "tests"}


def test_kernels_are_installed_as_fastllm_kernels(tmp_path: Path) -> None:
    code = "import fastllm.kernels as k, fastllm; print(k.__name__, fastllm.__version__)"
    name, version = run([sys.executable, "-I", "-c", code], cwd=tmp_path).split()
    assert name == "fastllm.kernels"
    assert version == metadata.version("fastllm")


def test_no_folder_of_the_repository_is_inside_the_package(tmp_path: Path) -> None:
    code = "import importlib.util as u; print([u.find_spec('fastllm.' + n) for n in ('csrc', 'fastllm')])"
    assert run([sys.executable, "-I", "-c", code], cwd=tmp_path).strip() == "[None, None]"


def test_metadata() -> None:
    """Few base dependencies; all else in extras."""
    requirements = metadata.requires("fastllm")
    assert requirements is not None
    base = {re.split(r"[<>=!~;\[ ]", line)[0] for line in requirements if "extra ==" not in line}
    assert base == {"numpy", "tokenizers", "jinja2", "llguidance", "safetensors", "tqdm"}
    assert set(metadata.metadata("fastllm").get_all("Provides-Extra") or []) >= {
        "hub",
        "bench",
        "gpu",
        "test",
        "dev",
    }
    assert metadata.metadata("fastllm")["License-Expression"] == "Apache-2.0"


def test_console_script(tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "fastllm"
    assert "generate" in run([script, "--help"], cwd=tmp_path)
    assert fastllm.__version__ in run([script, "--version"], cwd=tmp_path)


def test_compiled_modules_and_their_types_are_found() -> None:
    for module in COMPILED:
        name = "fastllm." + module.replace("/", ".")
        spec = util.find_spec(name)
        assert spec is not None
        assert (spec.origin or "").endswith(sysconfig.get_config_var("EXT_SUFFIX"))
    package = Path(fastllm.__file__).parent
    assert (package / "py.typed").is_file()
    for module in COMPILED:
        assert (package / f"{module}.pyi").is_file()


def build_and_run_client(python: Path | str, folder: Path) -> dict[str, object]:
    compiler = shlex.split(sysconfig.get_config_var("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler: {compiler}")
    client = folder / "client"
    shutil.copytree(ROOT / "tests" / "cython_client", client)
    run([python, "setup.py", "build_ext", "--inplace", "--quiet"], cwd=client)
    report = json.loads(run([python, "use.py"], cwd=client))
    assert isinstance(report, dict)
    return report


# What use.py reports: 2 blocks of 4 are held for 6 tokens, 5 tokens take 2 more, and all come back.
CLIENT_REPORT = {
    "slots": [0, 1, 2, 3, 4, 5],
    "pool": [0],
    "free": 6,
    "step": [5, True, 5, 2],
    "free while running": 4,
    "free at last": 8,
}


def test_cython_module_can_cimport_scheduler_and_block_pool(tmp_path: Path) -> None:
    assert build_and_run_client(sys.executable, tmp_path) == CLIENT_REPORT


# ---- the wheel ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel() -> Path:
    path = os.environ.get("FASTLLM_WHEEL")
    if not path:
        pytest.skip("FASTLLM_WHEEL names no wheel")
    return Path(path).resolve(strict=True)


@pytest.fixture(scope="module")
def wheel_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new virtual environment that holds the wheel, its dependencies, and no more."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "venv", folder / "venv"], cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", wheel], cwd=folder, env=without_compiler(python))
    return python


def without_compiler(python: Path) -> dict[str, str]:
    """The environment with nothing on PATH but the folder of `python`."""
    env = {**os.environ, "PATH": str(python.parent)}
    assert shutil.which("gcc", path=env["PATH"]) is None
    return {name: value for name, value in env.items() if name not in ("CC", "CXX", "VIRTUAL_ENV")}


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    wanted = {f"fastllm/{module}{end}" for module in COMPILED for end in (suffix, ".pyi")}
    wanted |= {f"fastllm/{module}.pxd" for module in COMPILED if module.startswith("engine/")}
    wanted |= {"fastllm/__init__.py", "fastllm/py.typed"}
    for folder in ("fastllm", "kernels"):  # all that git keeps under the two folders
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "kernels" not in path.relative_to(ROOT).parts[1:]:
                relative = path.relative_to(ROOT).as_posix()
                wanted.add(relative if folder == "fastllm" else f"fastllm/{relative}")
    assert wanted <= names
    assert {name.split("/")[0] for name in names} == {
        "fastllm",
        f"fastllm-{metadata.version('fastllm')}.dist-info",
    }
    assert not [name for name in names if name.endswith((".pyx", ".cpp", ".cxx", ".h", ".o", ".a", ".pyc"))]
    assert not [name for name in names if re.match(r"fastllm/(csrc|tests|docs)/", name)]
    assert len([name for name in names if name.endswith(".so")]) == len(COMPILED)


def test_wheel_works_without_compiler_and_checkout(wheel_python: Path, tmp_path: Path) -> None:
    code = """
import sys, fastllm, fastllm._core, importlib.util
assert fastllm.__file__.startswith(sys.prefix), fastllm.__file__
assert importlib.util.find_spec("kernels") is None
assert importlib.util.find_spec("fastllm.kernels") is not None
try:
    import fastllm.kernels
except ImportError as error:  # what it needs comes with an extra, which is not installed here
    assert "fastllm[gpu]" in str(error), error
else:
    raise AssertionError("torch is here, and with it what this should have said")
print(*fastllm._core.built_isas())
"""
    built = run([wheel_python, "-c", code], cwd=tmp_path, env=without_compiler(wheel_python))
    assert built.split() == ["avx512vnni", "avxvnni", "avx2", "baseline"]


@pytest.mark.model
def test_wheel_generates_text(wheel_python: Path, default_model_path: Path, tmp_path: Path) -> None:
    command = [wheel_python.parent / "fastllm", "generate", "The capital of France is", "--max-tokens", "8"]
    text = run(command, cwd=tmp_path, env=without_compiler(wheel_python))
    assert text.startswith(" Paris.")
    model = [*command, "--model", default_model_path]
    assert run(model, cwd=tmp_path, env=without_compiler(wheel_python)) == text


def test_wheel_can_be_cimported(wheel_python: Path, tmp_path: Path) -> None:
    run([wheel_python, "-m", "pip", "install", "--quiet", "cython", "setuptools"], cwd=tmp_path)
    assert build_and_run_client(wheel_python, tmp_path) == CLIENT_REPORT
